"""What must hold of a scheduler after every step."""

from collections import Counter

from quire.scheduler.near import Near
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence, State
from tests.scheduler.device import Device, first_seen

RUNNING = (State.PREFILLING, State.DECODING)


def check_blocks(scheduler: Scheduler) -> None:
    pool = scheduler.pool
    held = Counter(block for seq in scheduler.seqs.values() for block in scheduler.holdings.held(seq.kv))
    assert pool.refs == [held[block] for block in range(pool.num_blocks)], "blocks balance"
    assert set(pool.free) == {block for block, refs in enumerate(pool.refs) if not refs}
    assert {block: key for key, block in pool.by_key.items()} == pool.key_of
    assert pool.caching or all(pool.refs[block] for block in pool.key_of), "findable, though nobody holds it"


def check_states(scheduler: Scheduler, device: Device) -> None:
    kept = scheduler.checkpoints
    if kept is None:
        return
    held = Counter(row for seq in scheduler.seqs.values() for row in (*seq.kv.saves.values(), seq.kv.restore))
    assert kept.refs == {row: held[row] for row in kept.refs}, "rows balance"
    assert set(kept.free) == {row for row, refs in kept.refs.items() if not refs}
    assert {row: key for key, row in kept.by_key.items()} == kept.key_of
    for seq in scheduler.seqs.values():
        kv, running = seq.kv, seq.state in RUNNING
        assert running or (kv.restore < 0 and not kv.saves), "holds a state without a seat"
        assert kv.restore < 0 or (seq.slot < 0 and seq.planned), "holds what the device has restored"
        assert all(kv.num_published < num for num in kv.saves), "a state of blocks that are findable is not"
    device.check_states(kept)


def check_sequence(seq: Sequence, near: Near | None, size: int) -> None:
    kv, running = seq.kv, seq.state in RUNNING
    assert running or (not kv.blocks and not seq.planned and seq.slot < 0), "holds something without a seat"
    parts = near.parts if near else 0
    assert parts or not kv.near
    assert all(len(beside) == parts for beside in kv.near)
    end = kv.passed + len(kv.near) if parts else len(kv.blocks)
    assert kv.capacity == end * size >= seq.planned >= kv.num_published * size
    assert kv.passed <= kv.num_published, "gives up what nobody can find"
    if near is not None and running:
        assert kv.passed * size <= first_seen(near, min(seq.planned, len(seq.tokens) - 1)), (
            "gives up what it needs"
        )
    assert kv.num_published * size < len(seq.tokens), "claims KV of a token that is not known"
    assert kv.next_full == (kv.num_published + 1) * size or not running
    assert seq.planned <= seq.limit
    assert len(seq.tokens) + seq.pending <= seq.limit + 1
    if seq.state is State.PREFILLING:
        assert seq.planned < len(seq.tokens) and not seq.pending
    elif seq.state is State.DECODING:
        assert seq.slot >= 0 and seq.planned == len(seq.tokens) + seq.pending - 1
    elif seq.state is State.RETURNING:
        assert seq.pending


def check_places(scheduler: Scheduler) -> None:
    """Every sequence is in exactly one place, and nobody waits for somebody who waits."""
    seats, sharing = scheduler.seats, scheduler.sharing
    queued = [s for tenants in scheduler.queue._waiting.values() for line in tenants.values() for s in line]
    places = {
        State.QUEUED: queued,
        State.PARKED: list(sharing._waits_for),
        State.RETURNING: [s for s in scheduler.seqs.values() if s.state is State.RETURNING],
        State.PREFILLING: seats.prefilling,
        State.DECODING: seats.decoding,
    }
    assert sorted(s.id for line in places.values() for s in line) == sorted(scheduler.seqs)
    assert all(s.state is state for state, line in places.items() for s in line)
    for line in (seats.prefilling, seats.decoding):
        assert line == sorted(line, key=lambda seq: seq.rank)
    assert seats.num_taken <= seats.num_seats
    slots = [s.slot for s in (*seats.prefilling, *seats.decoding) if s.slot >= 0]
    assert len(set(slots)) == len(slots) and sorted(slots + seats._free) == list(range(seats.num_seats))
    assert all(owner.state in RUNNING for owner in sharing._owner.values()), "a promise nobody keeps"
    assert all(key in sharing._owner for key in sharing._waiting)
    assert {s: key for key, line in sharing._waiting.items() for s in line} == sharing._waits_for
    tenants = Counter(s.tenant.name for s in scheduler.seqs.values())
    assert {
        t.name: t.num_sequences for t in scheduler.tenants._by_name.values() if t.num_sequences
    } == tenants


def check(scheduler: Scheduler, device: Device) -> None:
    check_blocks(scheduler)
    check_places(scheduler)
    for seq in scheduler.seqs.values():
        check_sequence(seq, scheduler.pool.near, scheduler.pool.block_size)
    device.check_findable(scheduler.pool)
    check_states(scheduler, device)
