"""Records what a scheduler was told and what it planned, and replays it. Knows no policy.

A trace is JSON lines: settings first, then calls in order. It holds users' prompts and outputs as token ids,
so it is as private as they are; the secret of the cache's keys is not in it.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quire.errors import InvalidRequest, QuireError
from quire.scheduler.blocks import BlockPool
from quire.scheduler.checkpoints import Checkpoints
from quire.scheduler.limits import Limits
from quire.scheduler.lookups import Lookups
from quire.scheduler.near import Near
from quire.scheduler.plan import Emitted, Plan, Result
from quire.scheduler.scheduler import NewSequence, Scheduler
from quire.scheduler.sequence import SequenceStats
from quire.types import Coordinates

VERSION = 5
SECRET = b"replay"  # plans depend on which keys are equal, not on their values


class TraceError(QuireError):
    """A trace cannot be read, or its replay went another way; the message names the first such line."""


class Recorder:
    """A scheduler that writes every call down before it carries it out, and every plan once it is made.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, scheduler: Scheduler, path: Path):
        self._scheduler = scheduler
        self._file = path.open(
            "w", encoding="utf-8", buffering=1
        )  # a line at a time, so a crash keeps all but one
        pool = scheduler.pool
        sizes = {"num_blocks": pool.num_blocks, "block_size": pool.block_size, "caching": pool.caching}
        near = None if pool.near is None else asdict(pool.near)
        rows = None if scheduler.checkpoints is None else list(scheduler.checkpoints.refs)
        self._write(
            {
                "version": VERSION,
                "pool": sizes,
                "near": near,
                "rows": rows,
                "limits": asdict(scheduler.limits),
            }
        )

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def add(self, new: NewSequence, now: float) -> SequenceStats:
        """See `Scheduler.add`."""
        self._write(["add", now, _new_to_json(new)])
        return self._scheduler.add(new, now)

    def abort(self, id: int) -> None:
        """See `Scheduler.abort`."""
        self._write(["abort", id])
        self._scheduler.abort(id)

    def schedule(self, now: float) -> Plan:
        """See `Scheduler.schedule`."""
        self._write(["schedule", now])
        plan = self._scheduler.schedule(now)
        self._write(["plan", _plan_to_json(plan)])
        return plan

    def commit(self, plan: Plan, result: Result, now: float) -> list[Emitted]:
        """See `Scheduler.commit`."""
        self._write(
            ["commit", now, plan.step, result.tokens, list(result.errors.items()), sorted(result.lost)]
        )
        return self._scheduler.commit(plan, result, now)

    @property
    def idle(self) -> bool:
        """See `Scheduler.idle`."""
        return self._scheduler.idle

    @property
    def pool(self) -> BlockPool:
        """The scheduler's; for reading."""
        return self._scheduler.pool

    @property
    def num_running(self) -> int:
        """See `Scheduler.num_running`."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """See `Scheduler.num_waiting`."""
        return self._scheduler.num_waiting

    @property
    def num_preemptions(self) -> int:
        """See `Scheduler`."""
        return self._scheduler.num_preemptions

    @property
    def num_parked(self) -> int:
        """See `Scheduler.num_parked`."""
        return self._scheduler.num_parked

    @property
    def lookups(self) -> Lookups:
        """See `Scheduler`; for reading."""
        return self._scheduler.lookups

    @property
    def prefill_tokens(self) -> int:
        """See `Scheduler`."""
        return self._scheduler.prefill_tokens

    @property
    def batched_tokens(self) -> int:
        """See `Scheduler`."""
        return self._scheduler.batched_tokens

    def _write(self, line: object) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")


def replay(source: Path | Iterable[str]) -> int:
    """Make a trace's calls again, and compare each plan; return how many there were.

    Whatever the recorded scheduler raised last, this raises too.

    Raises:
        TraceError: the source is no trace of this version, or a plan differs.
    """
    lines = _parse(
        source.read_text(encoding="utf-8").splitlines(True) if isinstance(source, Path) else source
    )
    _, head = next(lines, (0, None))
    if not isinstance(head, dict) or head.get("version") != VERSION:
        raise TraceError(f"the first line is not the head of a version {VERSION} trace; record it again")
    states = None if head["rows"] is None else Checkpoints(head["rows"])
    near = None if head["near"] is None else Near(**head["near"])
    pool = BlockPool(secret=SECRET, **head["pool"], near=near)
    scheduler = Scheduler(pool, Limits(**head["limits"]), checkpoints=states)
    inflight: deque[Plan] = deque()
    plan = Plan(0, ())
    num_plans = 0
    for number, (call, *args) in lines:
        if call == "add":
            _add_again(scheduler, args[1], args[0])
        elif call == "abort":
            scheduler.abort(args[0])
        elif call == "schedule":
            plan = scheduler.schedule(args[0])
            if plan.work:
                inflight.append(plan)
        elif call == "plan":
            _compare(number, args[0], plan)
            num_plans += 1
        elif call == "commit":
            now, _, tokens, errors, lost = args
            result = Result(tuple(map(tuple, tokens)), dict(errors), frozenset(lost))
            scheduler.commit(inflight.popleft(), result, now)
        else:
            raise TraceError(f"line {number}: there is no call {call!r}")
    return num_plans


def _parse(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            return  # torn by a crash
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise TraceError(f"line {number} is not JSON: {error}") from None


def _add_again(scheduler: Scheduler, new: dict[str, Any], now: float) -> None:
    sets = {name: frozenset(new[name]) for name in ("stop_token_ids", "eos_token_ids")}
    lists = {name: tuple(new[name]) for name in ("prompt", "output")}
    others: dict[str, Any] = {"cache_root": bytes.fromhex(new["cache_root"])}
    others["spans"] = tuple(map(tuple, new["spans"]))
    if (at := new.get("coordinates")) is not None:
        others["coordinates"] = Coordinates(tuple(map(tuple, at["rows"])), at["offset"])
    try:
        scheduler.add(NewSequence(**{**new, **sets, **lists, **others}), now)
    except InvalidRequest:
        return  # as it was when it was recorded


def _compare(number: int, recorded: list[Any], plan: Plan) -> None:
    planned = json.loads(json.dumps(_plan_to_json(plan)))
    if planned == recorded:
        return
    was, now = next(pair for pair in zip(recorded, planned, strict=True) if pair[0] != pair[1])
    raise TraceError(f"line {number}, step {recorded[0]}: the trace has {was}, the replay {now}")


def _new_to_json(new: NewSequence) -> dict[str, Any]:
    stops = {"stop_token_ids": sorted(new.stop_token_ids), "eos_token_ids": sorted(new.eos_token_ids)}
    return {**asdict(new), **stops, "cache_root": new.cache_root.hex()}


def _plan_to_json(plan: Plan) -> list[Any]:
    work = [
        (
            *(w.seq, w.slot, w.epoch, w.start, w.exact, w.count, w.drafts, w.new_blocks, w.samples, w.save),
            w.token,
        )
        for w in plan.work
    ]
    starts = [(s.seq, s.slot, s.tokens, s.prompt_len, s.restore, s.spans) for s in plan.starts]
    return [plan.step, work, starts, plan.ends, plan.beside]
