"""After which blocks of a sequence its state is kept, in which rows. Knows no budget and no policy."""

from itertools import islice

from quire.scheduler.blocks import BlockPool
from quire.scheduler.checkpoints import Checkpoints
from quire.scheduler.sequence import Holding, Sequence


def place_cuts(seq: Sequence, checkpoints: Checkpoints, pool: BlockPool, last: int) -> None:
    """Hold the state that a sequence begins with, and say after which of its blocks others may want it.

    After the `last` that the same prompt would look up, and where it leaves what was computed before: the next one that
    does so finds a state there.
    """
    kv = seq.kv
    if seq.planned:
        kv.restore = checkpoints.hold(kv.keys[seq.planned // pool.block_size - 1])
    kv.cuts = {last, len(pool.match(islice(kv.keys, last)))}


def will_keep(owner: Sequence, num_blocks: int, block_size: int) -> bool:
    """Have a sequence keep its state after so many blocks, unless they are planned already; whether it does."""
    if owner.planned >= num_blocks * block_size:
        return num_blocks in owner.kv.saves
    owner.kv.cuts.add(num_blocks)
    return True


def until_cut(seq: Sequence, count: int, block_size: int) -> int:
    """Positions to compute of `count` that could be: up to the next cut, or else to the end of a block."""
    start = seq.planned
    for cut in seq.kv.cuts:
        if start < cut * block_size < start + count:
            count = cut * block_size - start
    over = (start + count) % block_size
    return count - over if count < seq.num_to_prefill and over < count else count


def keep(kv: Holding, checkpoints: Checkpoints | None, num_positions: int, block_size: int) -> int:
    """The row for a sequence's state after so many positions; -1 if it is not at the end of a block."""
    num_blocks, over = divmod(num_positions, block_size)
    if over or checkpoints is None or (row := checkpoints.take()) is None:
        return -1
    kv.saves[num_blocks] = row
    return row


def publish(kv: Holding, checkpoints: Checkpoints, full: int) -> None:
    """Make states findable after blocks that are; of those that nobody wanted only the latest is kept."""
    for num_blocks in [num for num in kv.saves if num <= full]:
        key = kv.keys[num_blocks - 1]
        checkpoints.publish(key, kv.saves.pop(num_blocks))
        if num_blocks not in kv.cuts:
            checkpoints.demote(kv.passing)
            kv.passing = key


def let_go_of_restored(kv: Holding, checkpoints: Checkpoints | None) -> None:
    """Plans run in order, so the row may be written by any plan from now on."""
    if checkpoints is not None and kv.restore >= 0:
        checkpoints.release(kv.restore)
        kv.restore = -1


def release(kv: Holding, checkpoints: Checkpoints) -> None:
    """Give up all rows."""
    let_go_of_restored(kv, checkpoints)
    for row in kv.saves.values():
        checkpoints.release(row)
