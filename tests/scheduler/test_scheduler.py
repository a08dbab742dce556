"""The scheduler on a simulated device: whatever is asked for, whatever the limits and the depth of the pipeline,
every sequence gets the answer that it would get alone."""

from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequest
from quire.scheduler.blocks import BlockPool
from quire.scheduler.loop import Loop
from quire.scheduler.plan import Emitted
from quire.scheduler.scheduler import NewSequence, Scheduler
from tests.scheduler.checks import check
from tests.scheduler.device import EOS, SECRET, STOP, Device, Model


@dataclass(frozen=True)
class Case:
    """A request of `n` sequences, and what happens to it."""

    prompt: tuple[int, ...]
    max_tokens: int
    arrival: int  # step
    n: int = 1
    priority: int = 0
    tenant: str = ""
    root: int = 0
    read_cache: bool = True
    stops: frozenset[int] = frozenset({EOS})
    min_tokens: int = 0
    abort_after: int | None = None  # steps, the first sequence only
    fail_at: int = 0  # output, the first sequence only


@dataclass(frozen=True)
class Machine:
    block_size: int
    num_blocks: int
    max_seqs: int
    spare_tokens: int  # of a step, beyond one for each sequence
    depth: int
    drafts: int
    caching: bool
    max_gap_s: float | None
    min_prefill: int


BASE = tuple((i * i + i // 3) % 3 for i in range(12))
rarely = st.integers(0, 7).map(lambda n: n == 7)
prompts = st.builds(
    lambda common, rest: BASE[:common] + tuple(rest),
    st.integers(0, 12),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
cases = st.builds(
    Case,
    prompt=prompts,
    max_tokens=st.integers(1, 10),
    arrival=st.integers(0, 12),
    n=st.sampled_from((1, 1, 1, 2, 3)),
    priority=st.sampled_from((0, 0, 0, 1, -1)),
    tenant=st.sampled_from("aab"),
    root=st.sampled_from((0, 0, 0, 1)),
    read_cache=rarely.map(lambda skip: not skip),
    stops=st.sampled_from((frozenset({EOS}), frozenset({EOS, STOP}), frozenset())),
    min_tokens=st.sampled_from((0, 0, 3)),
    abort_after=st.none() | st.integers(0, 12),
    fail_at=st.sampled_from((0, 0, 0, 0, 1, 2, 5)),
)
machines = st.builds(
    Machine,
    block_size=st.integers(1, 4),
    num_blocks=st.integers(6, 24),
    max_seqs=st.integers(1, 4),
    spare_tokens=st.integers(0, 12),
    depth=st.integers(1, 4),
    drafts=st.sampled_from((0, 0, 1, 2, 3)),
    caching=st.booleans(),
    max_gap_s=st.sampled_from((None, None, 0.005, 0.014, 0.02)),
    min_prefill=st.integers(1, 4),
)


class Run:
    """One workload on one machine, checked after every step."""

    def __init__(self, todo: list[Case], machine: Machine):
        self.machine, self.model = machine, Model()
        self.pool = BlockPool(machine.num_blocks, machine.block_size, secret=SECRET, caching=machine.caching)
        self.scheduler = Scheduler(
            self.pool,
            max_batched_tokens=machine.max_seqs + machine.spare_tokens,
            max_seqs=machine.max_seqs,
            drafts=machine.drafts,
            max_gap_s=machine.max_gap_s,
            min_prefill_tokens=machine.min_prefill,
        )
        self.sequences: dict[int, NewSequence] = {}
        self.seeds: dict[int, int] = {}
        self.arrivals: dict[int, list[int]] = defaultdict(list)
        self.aborts: dict[int, list[int]] = defaultdict(list)
        fails: dict[int, int] = {}
        for group, case in enumerate(todo):
            for i in range(case.n):
                id = len(self.sequences)
                self._sequence(id, group, case)
                if i == 0 and case.abort_after is not None:
                    self.aborts[case.arrival + case.abort_after].append(id)
                if i == 0 and case.fail_at:
                    fails[id] = case.fail_at
        self.device = Device(
            self.model, self.scheduler.limits, machine.block_size, self.sequences, self.seeds, fails
        )
        self.loop = Loop(self.scheduler, self.device, depth=machine.depth, now=self.device.clock)
        self.got: dict[int, list[Emitted]] = {}
        self.aborted: set[int] = set()
        self.stats = {}

    def _sequence(self, id: int, group: int, case: Case) -> None:
        root = case.root if self.machine.caching else group + 2  # as the engine does
        self.sequences[id] = NewSequence(
            id=id,
            prompt=case.prompt,
            max_tokens=case.max_tokens,
            stop_token_ids=case.stops - {EOS},
            eos_token_ids=case.stops & {EOS},
            min_tokens=min(case.min_tokens, case.max_tokens),
            priority=case.priority,
            tenant=case.tenant,
            cache_root=bytes([root]),
            read_cache=case.read_cache,
        )
        self.seeds[id] = id
        self.arrivals[case.arrival].append(id)

    def run(self) -> None:
        step = 0
        while step <= max(self.arrivals) or not self.loop.idle:
            for id in self.arrivals.get(step, ()):
                self._add(id)
            for id in self.aborts.get(step, ()):
                if id in self.scheduler.seqs:
                    self.aborted.add(id)
                    self.scheduler.abort(id)
            for emitted in self.loop.step():
                self._take(emitted)
            check(self.scheduler, self.device)
            assert len(self.loop.inflight) < self.machine.depth
            step += 1
            assert step < 2000, "no progress"
        self._finish()

    def _add(self, id: int) -> None:
        new, capacity = self.sequences[id], self.machine.num_blocks * self.machine.block_size
        fits = len(new.prompt) + new.max_tokens - 1 <= capacity
        if fits:
            self.got[id] = []
            self.stats[id] = self.scheduler.add(new, self.device.now)
            return
        with pytest.raises(InvalidRequest, match=str(new.max_tokens)):
            self.scheduler.add(new, self.device.now)

    def _take(self, emitted: Emitted) -> None:
        got = self.got[emitted.seq]
        assert emitted.seq not in self.aborted, "news of a sequence after its abort"
        assert not got or got[-1].finish is None, "news after the last token"
        got.append(emitted)
        if emitted.finish:
            cached = self.scheduler.cached_tokens(emitted.seq)
            assert cached == self.stats[emitted.seq].num_cached_tokens

    def _finish(self) -> None:
        for id, got in self.got.items():
            self._check_answer(id, got)
            stats, new = self.stats[id], self.sequences[id]
            assert stats.num_cached_tokens % self.machine.block_size == 0
            assert stats.num_cached_tokens < len(new.prompt)
            assert new.read_cache or not stats.num_cached_tokens
        assert not any(self.pool.refs) and not self.device.slots
        assert not self.scheduler.cost._begun
        assert all(rows < self.machine.depth for rows in self.device.ended.values()), (
            "rows wasted after the end"
        )
        assert sum(s.num_preemptions for s in self.stats.values()) == self.scheduler.num_preemptions

    def _check_answer(self, id: int, got: list[Emitted]) -> None:
        outputs, finish, stop = self.model.answer(self.sequences[id], self.seeds[id])
        tokens = [e.token for e in got if e.token is not None]
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


def run(todo: list[Case], machine: Machine) -> Run:
    done = Run(todo, machine)
    done.run()
    return done


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(cases, min_size=1, max_size=7), machines)
def test_every_schedule_gives_the_sequential_answer(todo: list[Case], machine: Machine) -> None:
    run(todo, machine)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(cases, min_size=1, max_size=9), machines)
def test_every_schedule_gives_the_sequential_answer_at_length(todo: list[Case], machine: Machine) -> None:
    run(todo, machine)
