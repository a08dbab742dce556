# mypy: disable-error-code="no-untyped-def"
"""Which experts tokens go to, and which tokens an expert gets, as Triton kernels. Knows no launch.

    logits ──route──> experts, weights [T, top_k] ──arrange──> order [T * top_k], slots [3, T * top_k // ROWS + E]

A pair is (token, choice), t * top_k + j. `order` holds pairs expert by expert, those of an expert in order. A slot is a
tile of up to ROWS of them: (expert, first place in `order`, end), or (-1, ..) where there is none. An expert whose
pairs begin at place p has its slots from p // ROWS + expert on: no two experts' can meet, so none need be counted
first, and the number of slots depends on sizes only.
"""

import triton
import triton.language as tl

from quire.kernels.triton.linear import follow

NOBODY = tl.constexpr(-1)
SLOTS_AT_ONCE = tl.constexpr(64)


@triton.jit
def _best(choice, left, ids, NUM: tl.constexpr):
    """The first of ids [R, C] where `choice` is greatest, among those left."""
    best = tl.max(tl.max(tl.where(left, choice, -float("inf")), 1), 0)
    return tl.min(tl.min(tl.where(left & (choice == best), ids, NUM), 1), 0)


@triton.jit
def _best_groups(choice, valid, columns, rows, GROUPS: tl.constexpr, TOP: tl.constexpr, TWO: tl.constexpr):
    """Which rows of choice [R, C] are the TOP best, by their greatest number, or by the sum of their TWO."""
    lowest = -float("inf")
    best = tl.max(tl.where(valid, choice, lowest), 1)
    if TWO:
        width: tl.constexpr = choice.shape[1]
        greatest = valid & (choice == best[:, None])
        first = tl.min(tl.where(greatest, columns[None, :], width), 1)
        others = valid & (columns[None, :] != first[:, None])
        best += tl.max(tl.where(others, choice, lowest), 1)
    found = rows < 0
    for _ in tl.static_range(TOP):
        left = (rows < GROUPS) & (found == 0)
        most = tl.max(tl.where(left, best, lowest), 0)
        found = found | (rows == tl.min(tl.where(left & (best == most), rows, GROUPS), 0))
    return found


@triton.jit
def _scores(logits, valid, SCORE: tl.constexpr):
    if SCORE == "softmax":
        least = tl.where(valid, logits, -float("inf"))
        powers = tl.where(valid, tl.exp(logits - tl.max(tl.max(least, 1), 0)), 0.0)
        logits = powers / tl.sum(tl.sum(powers, 1), 0)
    elif SCORE == "sigmoid":
        logits = 1.0 / (1.0 + tl.exp(-logits))
    return logits


@triton.jit
def route(
    logits, correction, experts, weights, scale,
    NUM: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORE: tl.constexpr, RENORM: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """A token: experts and weights [T, TOP_K] from logits [T, NUM], as kernels/experts.py says. A group is a row.

    What is not a number is chosen last, so that all choices exist and differ, whatever comes in.
    """
    token, size = tl.program_id(0).to(tl.int64), NUM // GROUPS
    rows, columns, choices = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    valid = (rows < GROUPS)[:, None] & (columns < size)[None, :]
    ids = tl.where(valid, rows[:, None] * size + columns[None, :], NUM)
    follow(NEXT)
    at = logits + token * NUM + ids
    scores = _scores(tl.load(at, mask=valid, other=0.0, cache_modifier=".cg"), valid, SCORE)
    choice = scores
    if correction is not None:
        choice += tl.load(correction + ids, mask=valid, other=0.0)
    choice = tl.where(choice == choice, choice, -float("inf"))
    if GROUPS > 1:
        groups = _best_groups(choice, valid, columns, rows, GROUPS, TOP_GROUPS, correction is not None)
        choice = tl.where(groups[:, None], choice, -float("inf"))
    left = valid
    chosen = tl.zeros([WIDTH], tl.int32)
    found = tl.zeros([WIDTH], tl.float32)
    for j in tl.static_range(TOP_K):
        best = _best(choice, left, ids, NUM)
        score = tl.sum(tl.sum(tl.where(ids == best, scores, 0.0), 1), 0)
        left = left & (ids != best)
        chosen = tl.where(choices == j, best, chosen)
        found = tl.where(choices == j, score, found)
    keep = choices < TOP_K
    if SCORE == "softmax_topk":
        powers = tl.exp(found - tl.max(tl.where(keep, found, -float("inf")), 0))
        found = tl.where(keep, powers, 0.0)
    if RENORM or SCORE == "softmax_topk":
        found = found / tl.sum(found, 0)
    tl.store(experts + token * TOP_K + choices, chosen, mask=keep)
    tl.store(weights + token * TOP_K + choices, found * scale, mask=keep)


@triton.jit(do_not_specialize=["num_pairs", "num_slots"])
def arrange(
    experts, order, slots, num_pairs, num_slots, ROWS: tl.constexpr, COUNT: tl.constexpr, NEXT: tl.constexpr
):
    """An expert's share of `order` and of `slots`; COUNT pairs are looked at at once."""
    expert, some = tl.program_id(0), tl.arange(0, COUNT)
    follow(NEXT)
    below = tl.zeros([COUNT], tl.int32)
    equal = tl.zeros([COUNT], tl.int32)
    for first in range(0, num_pairs, COUNT):
        keep = first + some < num_pairs
        theirs = tl.load(experts + first + some, mask=keep, other=2147483647, cache_modifier=".cg")
        below += (theirs < expert).to(tl.int32)
        equal += (theirs == expert).to(tl.int32)
    start, num_mine = tl.sum(below, 0), tl.sum(equal, 0)
    place = start
    for first in range(0, num_pairs, COUNT):
        keep = first + some < num_pairs
        theirs = tl.load(experts + first + some, mask=keep, other=2147483647, cache_modifier=".cg")
        mine = (theirs == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, 0) - 1, first + some, mask=mine != 0)
        place += tl.sum(mine, 0)
    slot = start // ROWS + expert
    last = (start + num_mine) // ROWS + expert + 1
    last = tl.where(expert == tl.num_programs(0) - 1, num_slots, last)  # those of pairs that others compute
    for i in range(0, last - slot, SLOTS_AT_ONCE):
        more = i + tl.arange(0, SLOTS_AT_ONCE)
        inside, begin = slot + more < last, start + more * ROWS
        owner = tl.where(more * ROWS < num_mine, expert, NOBODY)
        tl.store(slots + slot + more, owner, mask=inside)
        tl.store(slots + num_slots + slot + more, begin, mask=inside)
        tl.store(slots + 2 * num_slots + slot + more, tl.minimum(begin + ROWS, start + num_mine), mask=inside)
