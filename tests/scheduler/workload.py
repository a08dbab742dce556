"""Requests, a machine, and a run of them that is checked after every step."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from quire.errors import InvalidRequest
from quire.scheduler.blocks import BlockPool
from quire.scheduler.checkpoints import Checkpoints
from quire.scheduler.limits import Limits
from quire.scheduler.loop import Loop
from quire.scheduler.near import Near
from quire.scheduler.plan import Emitted, Plan, Result
from quire.scheduler.scheduler import NewSequence, Scheduler, SequenceStats
from quire.scheduler.trace import Recorder
from quire.types import CacheMisses
from tests.scheduler.checks import check
from tests.scheduler.device import EOS, SECRET, Device, Model, spans_of
from tests.scheduler.misses import Misses


@dataclass(frozen=True)
class Case:
    """A request of `n` sequences, and what happens to it."""

    prompt: tuple[int, ...]
    max_tokens: int
    arrival: int  # step
    n: int = 1
    priority: int = 0
    tenant: str = ""
    share: float = 1.0
    root: int = 0
    read_cache: bool = True
    stops: frozenset[int] = frozenset({EOS})
    min_tokens: int = 0
    abort_after: int | None = None  # steps, the first sequence only
    fail_at: int = 0  # output, the first sequence only
    had: int = 0  # outputs that the first sequence brings along; each further one brings one less


@dataclass(frozen=True)
class Machine:
    block_size: int = 4
    num_blocks: int = 64
    max_seqs: int = 4
    spare_tokens: int = 60  # of a step, beyond one for each sequence
    depth: int = 1
    drafts: int = 0
    caching: bool = True
    max_gap_s: float | None = None
    min_prefill: int = 16
    min_prefill_time: float = 0.0
    good_drafts: bool = True
    num_states: int | None = None  # rows for states beside the slots'; None: the network has none
    near: Near | None = None  # how layers see that do not see all positions
    lose_every: int = 0  # steps, of which each such one loses a state
    stages: int = 1  # that compute different steps at the same time
    spanned: frozenset[int] = frozenset()  # tokens whose runs see each other


class Run:
    """One workload on one machine, checked after every step."""

    def __init__(self, todo: Sequence[Case], machine: Machine, trace: Path | None = None):
        self.machine, self.model = machine, Model(good_drafts=machine.good_drafts)
        how = {"caching": machine.caching, "near": machine.near}
        self.pool = BlockPool(machine.num_blocks, machine.block_size, secret=SECRET, **how)
        first, states = machine.max_seqs + 1, machine.num_states
        limits = Limits(
            max_batched_tokens=machine.max_seqs + machine.spare_tokens,
            max_seqs=machine.max_seqs,
            drafts=machine.drafts,
            max_gap_s=machine.max_gap_s,
            min_prefill_tokens=machine.min_prefill,
            min_prefill_time=machine.min_prefill_time,
            stages=machine.stages,
        )
        kept = None if states is None else Checkpoints(range(first, first + states))
        self.scheduler = Scheduler(self.pool, limits, checkpoints=kept)
        self.sequences: dict[int, NewSequence] = {}
        self.seeds: dict[int, int] = {}
        self.arrivals: dict[int, list[int]] = defaultdict(list)
        self.aborts: dict[int, list[int]] = defaultdict(list)
        fails: dict[int, int] = {}
        for group, case in enumerate(todo):
            for i in range(case.n):
                id = len(self.sequences)
                self._sequence(id, group, case, max(case.had - i, 0))
                if i == 0 and case.abort_after is not None:
                    self.aborts[case.arrival + case.abort_after].append(id)
                if i == 0 and case.fail_at:
                    fails[id] = max(case.fail_at, len(self.sequences[id].output) + 1)
        self.device = Device(
            self.model, self.scheduler.limits, machine.block_size, self.sequences, self.seeds, fails
        )
        self.device.near = machine.near
        if states is not None:
            self.device.rows, self.device.lose_every = {}, machine.lose_every
        self.misses = Misses(self.scheduler)
        self.recorder = Recorder(self.scheduler, trace) if trace else None
        self.planner = self.recorder or self.scheduler
        self.loop = Loop(self, self.device, depth=machine.depth, now=self.device.clock)
        self.got: dict[int, list[Emitted]] = {}
        self.aborted: set[int] = set()
        self.stats: dict[int, SequenceStats] = {}

    def _sequence(self, id: int, group: int, case: Case, num_outputs: int) -> None:
        root = case.root if self.machine.caching else group + 2  # as the engine does
        new = NewSequence(
            id=id,
            prompt=case.prompt,
            max_tokens=case.max_tokens,
            stop_token_ids=case.stops - {EOS},
            eos_token_ids=case.stops & {EOS},
            min_tokens=min(case.min_tokens, case.max_tokens),
            priority=case.priority,
            tenant=case.tenant,
            share=case.share,
            cache_root=bytes([root]),
            read_cache=case.read_cache,
            spans=spans_of(case.prompt, self.machine.spanned),
        )
        outputs = self.model.answer(new, seed=id)[0]
        self.sequences[id] = replace(new, output=tuple(outputs[: min(num_outputs, len(outputs) - 1)]))
        self.seeds[id] = id
        self.arrivals[case.arrival].append(id)

    def steps(self) -> Iterator[int]:
        """Run; yields the number of steps after each one."""
        step = 0
        while step <= max(self.arrivals) or not self.loop.idle:
            for id in self.arrivals.get(step, ()):
                self._add(id)
            for id in self.aborts.get(step, ()):
                if id in self.scheduler.seqs:
                    self.aborted.add(id)
                    self.planner.abort(id)
            for emitted in self.loop.step():
                self._take(emitted)
            assert len(self.loop.inflight) < self.machine.depth
            step += 1
            assert step < 2000, "no progress"
            yield step
        self._finish()

    @property
    def idle(self) -> bool:
        return self.planner.idle

    def schedule(self, now: float) -> Plan:
        """As the scheduler's, which is looked at closely."""
        scheduler, limits = self.scheduler, self.scheduler.limits
        decoding = {s.id: s.epoch for s in scheduler.seats.decoding if s.planned < s.limit}
        ready = {id for id in decoding if limits.stages == 1 or not scheduler.seqs[id].pending}
        self.misses.about_to_schedule()
        plan = self.planner.schedule(now)
        check(scheduler, self.device)
        planned = {w.seq for w in plan.work}
        kept = [id for id, epoch in decoding.items() if scheduler.seqs[id].epoch == epoch]
        left = sum(id not in planned for id in kept if id in ready)
        assert left <= max(len(ready) - -(-len(kept) // limits.stages), 0), "a decoding sequence skips a step"
        self.misses.scheduled()
        # One that was preempted and seated again in this very plan is a prefill.
        decodes = sum(w.count + w.drafts for w in plan.work if decoding.get(w.seq) == w.epoch)
        prefills = scheduler.batched_tokens - decodes
        assert prefills == scheduler.prefill_tokens
        assert prefills or not scheduler.seats.prefilling or self.machine.near, "prefills starve"
        if decodes and limits.max_gap_s:
            decodes_s = scheduler.cost.least(decodes)
            seconds = max(
                limits.max_gap_s / limits.stages, decodes_s + self.machine.min_prefill_time * decodes_s
            )
            most = scheduler.cost.most_tokens(seconds)
            longest = max((self.longest_span(seq) for seq in planned), default=0)
            assert most is None or prefills <= max(most - decodes, limits.min_prefill_tokens, longest)
        return plan

    def commit(self, plan: Plan, result: Result, now: float) -> list[Emitted]:
        """As the scheduler's, checked."""
        emitted = self.planner.commit(plan, result, now)
        check(self.scheduler, self.device)
        return emitted

    def _add(self, id: int) -> None:
        new, capacity = self.sequences[id], self.scheduler.holdings.room
        fits = capacity is None or len(new.prompt) + new.max_tokens - 1 <= capacity
        limits, longest = self.scheduler.limits, self.longest_span(id)
        others = limits.max_seqs - 1
        drafts = (limits.max_batched_tokens - limits.max_seqs) // 2 if limits.drafts else 0
        whole = longest <= limits.max_batched_tokens - others - drafts
        if fits and whole:
            self.got[id] = []
            self.stats[id] = self.planner.add(new, self.device.now)
            return
        with pytest.raises(
            InvalidRequest, match=f"{new.max_tokens}" if whole else f"{longest} tokens .* each other"
        ):
            self.planner.add(new, self.device.now)

    def longest_span(self, id: int) -> int:
        return max((end - start for start, end in self.sequences[id].spans), default=0)

    def _take(self, emitted: Emitted) -> None:
        got = self.got[emitted.seq]
        assert emitted.seq not in self.aborted, "news of a sequence after its abort"
        assert not got or got[-1].finish is None, "news after the last token"
        got.append(emitted)

    def _finish(self) -> None:
        for id, got in self.got.items():
            self._check_answer(id, got)
            stats, new = self.stats[id], self.sequences[id]
            whole = stats.num_cached_tokens % self.machine.block_size == 0
            if new.output:
                assert whole or stats.num_cached_tokens == len(new.prompt)
                assert stats.num_cached_tokens <= len(new.prompt)
            else:
                assert whole and stats.num_cached_tokens < len(new.prompt)
            assert new.read_cache or not stats.num_cached_tokens
        if self.recorder is not None:
            self.recorder.close()
        assert not any(self.pool.refs) and not self.device.slots
        assert not self.scheduler.cost._begun
        ahead = self.machine.depth if self.machine.stages == 1 else 1
        assert all(rows < ahead for rows in self.device.ended.values()), "rows wasted after the end"
        seated = [id for id, s in self.stats.items() if s.seated_s is not None]
        assert self.scheduler.lookups.queries == sum(len(self.sequences[id].prompt) for id in seated)
        assert self.scheduler.lookups.hits == sum(self.stats[id].num_cached_tokens for id in seated)
        assert self.scheduler.lookups.misses == sum(map(self.misses_of, seated), CacheMisses())
        assert sum(s.num_preemptions for s in self.stats.values()) == self.scheduler.num_preemptions

    def misses_of(self, id: int) -> CacheMisses:
        """Of a sequence that was seated."""
        misses = self.stats[id].cache_misses
        assert misses is not None
        return misses

    def _check_answer(self, id: int, got: list[Emitted]) -> None:
        outputs, finish, stop = self.model.answer(self.sequences[id], self.seeds[id])
        brought = list(self.sequences[id].output)
        tokens = brought + [e.token for e in got if e.token is not None]
        assert tokens == outputs[: len(tokens)]
        if id in self.aborted:
            return
        fail_at = self.device.fails.get(id, 0)
        last = got[-1]
        if 0 < fail_at <= len(outputs):
            assert last.finish == "error" and last.token is None and last.error and len(tokens) < fail_at
            return
        assert tokens == outputs
        assert (last.finish, last.stop_token) == (finish, stop)


def run(todo: Sequence[Case], machine: Machine, trace: Path | None = None) -> Run:
    """Run to the end."""
    done = Run(todo, machine, trace)
    for _ in done.steps():
        pass
    return done
