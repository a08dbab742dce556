# mypy: disable-error-code="no-untyped-def"
"""What the attention kernels share: reaching pages, scores, and the running softmax. Knows no launch.

Heads are taken in groups that share a key head. Row x of a sequence's group is query x // GROUP of head x % GROUP:

    rows    q0 h0 | q0 h1 | .. | q1 h0 | q1 h1 | ..      the last position is `length - 1`
    tiles   TILE tokens of keys and values, counted from the sequence's first token

A head dimension is cut into two powers of two (96 = 64 + 32, 576 = 512 + 64), so that nothing is computed in vain;
the second width is 0 where the first one is enough. Scores are in units of log2, so that exp2 is all it takes.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1.0e30)  # below every score, and finite: of rows that see nothing yet, exp2(m - m) is 1


@triton.jit
def extent(length, num_queries, window, TILE: tl.constexpr):
    """(first tile that any query sees, number of tiles from there on); of one sequence or of many."""
    first = tl.maximum(length - num_queries - window + 1, 0) // TILE
    return first, tl.where(num_queries > 0, (length + TILE - 1) // TILE - first, 0)


@triton.jit
def page_ids(table, tile, last, PAGE: tl.constexpr, TILE: tl.constexpr):
    """The page of a tile, or of each of its tokens where pages are smaller; never past entry `last`."""
    tokens = tile * TILE if PAGE % TILE == 0 else tile * TILE + tl.arange(0, TILE)
    entry = tokens // PAGE
    return tl.load(table + tl.minimum(entry, last))


@triton.jit
def token_pointers(
    pool, pages, tile, stride, head, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr
):
    """[TILE] pointers to where a head's tokens begin; `stride` is between pages, DIM between tokens."""
    rows = tl.arange(0, TILE)
    if PAGE % TILE == 0:  # one pointer and small offsets, which take fewer registers than many pointers
        pool += pages.to(tl.int64) * stride + (head * PAGE + tile * TILE % PAGE) * DIM
        offsets = rows * DIM
    else:
        offsets = pages.to(tl.int64) * stride + (head * PAGE + (tile * TILE + rows) % PAGE) * DIM
    return pool + offsets


@triton.jit
def columns_of(rows, keep, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Columns FIRST .. FIRST + WIDTH of rows at pointers [N]; 0 where keep [N] is false and from DIM on."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = keep[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (columns < DIM)[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def two_parts(rows, keep, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr):
    """Both parts of rows at pointers [N]; the second is the first again where its width is 0."""
    part0 = columns_of(rows, keep, 0, W0, DIM)
    part1 = part0
    if W1 > 0:
        part1 = columns_of(rows, keep, W0, W1, DIM)
    return part0, part1


@triton.jit
def fresh_columns(rows, keep, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """columns_of what the kernel ahead wrote, past the first-level cache, which may hold what was there before."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = keep[:, None] & (columns < DIM)[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _to_turn(
    rows, keep, weight, cos, sin, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """(columns FIRST .. of rows [N], those they turn with, weights of both, cos, sin), all on their way at once."""
    columns = FIRST + tl.arange(0, WIDTH)
    turns = columns < 2 * HALF
    both = keep[:, None] & turns[None, :]
    partners, pairs = (columns + HALF) % (2 * HALF), columns % HALF
    if INTERLEAVED:
        partners, pairs = columns ^ 1, columns // 2
    x = fresh_columns(rows, keep, FIRST, WIDTH, DIM).to(tl.float32)
    y = tl.load(rows[:, None] + partners[None, :], mask=both, other=0.0, cache_modifier=".cg").to(tl.float32)
    x_weight, y_weight = x, y
    if weight is not None:
        x_weight = columns_of(weight, keep, FIRST, WIDTH, DIM)
        y_weight = tl.load(weight[:, None] + partners[None, :], mask=both, other=0.0)
    c = tl.load(cos + pairs, mask=turns, other=1.0)[None, :]
    s = tl.load(sin + pairs, mask=turns, other=0.0)[None, :]
    return x, y, x_weight, y_weight, c, s


@triton.jit
def _turn(part, normed, scale, FIRST: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """What `_to_turn` found, turned; and before that scaled by scale [N] and weights if it is `normed`."""
    x, y, x_weight, y_weight, c, s = part
    columns = FIRST + tl.arange(0, x.shape[1])
    is_first = columns % 2 == 0 if INTERLEAVED else columns < HALF
    if normed:
        x = x * scale[:, None] * x_weight
        y = y * scale[:, None] * y_weight
    return tl.where(is_first[None, :], x * c - y * s, x * c + y * s)


@triton.jit
def turned_parts(
    rows, keep, weight, cos, sin, eps, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """two_parts of heads at pointers [N], normed by weights at pointers [N], or None, and turned: float32.

    HALF pairs of numbers turn, by cos and sin [HALF].
    """
    found0, scale = _to_turn(rows, keep, weight, cos, sin, 0, W0, DIM, HALF, INTERLEAVED), eps
    found1 = found0
    if W1 > 0:
        found1 = _to_turn(rows, keep, weight, cos, sin, W0, W1, DIM, HALF, INTERLEAVED)
    if weight is not None:
        squares = tl.sum(found0[0] * found0[0], 1)
        if W1 > 0:
            squares += tl.sum(found1[0] * found1[0], 1)
        scale = tl.rsqrt(squares / DIM + eps)
    part0 = _turn(found0, weight is not None, scale, 0, HALF, INTERLEAVED)
    part1 = part0
    if W1 > 0:
        part1 = _turn(found1, weight is not None, scale, W0, HALF, INTERLEAVED)
    return part0, part1


@triton.jit
def scores_of(q0, q1, k0, k1, scale, cap, K1: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """(q k^T [ROWS, TILE], what to multiply it by); soft caps are applied, and their factor is 1.

    Without a cap `scale` is in units of log2. With one it is 2 log2(e) / softcap of that, and `cap` in units of log2:
    tanh(y) = 1 - 2 / (exp(2 y) + 1), whose ends are right when exp overflows or vanishes.
    """
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if K1 > 0:
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    if CAPPED:
        s = cap * (1.0 - 2.0 / (tl.exp2(s * scale) + 1.0))
        factor = 1.0
    else:
        factor = scale
    return s, factor


@triton.jit
def start_state(sinks, heads, use_sinks, ROWS: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr):
    """(acc0, acc1, greatest score, sum of weights) of rows that have seen nothing but their sinks."""
    acc0 = tl.zeros([ROWS, V0], tl.float32)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 else 16], tl.float32)
    m = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=use_sinks, other=-float("inf")) * LOG2E
        m = tl.maximum(m, sink)
        total = tl.exp2(sink - m)
    return acc0, acc1, m, total


@triton.jit
def accumulate(acc0, acc1, m, total, s, factor, v0, v1, V1: tl.constexpr, PRECISION: tl.constexpr):
    """The state after a tile of scores s [ROWS, TILE], -inf where hidden, and its values."""
    new = tl.maximum(m, tl.max(s, 1) * factor)
    weights = tl.exp2(s * factor - new[:, None])
    fade = tl.exp2(m - new)
    total = total * fade + tl.sum(weights, 1)
    weights = weights.to(v0.dtype)
    acc0 = tl.dot(weights, v0, acc0 * fade[:, None], input_precision=PRECISION)
    if V1 > 0:
        acc1 = tl.dot(weights, v1, acc1 * fade[:, None], input_precision=PRECISION)
    return acc0, acc1, new, total


@triton.jit
def logarithm(m, total):
    """Of the sums of exponentials, whose greatest scores are m: natural, and -inf of rows that see nothing."""
    return (m + tl.log2(total)) / LOG2E


@triton.jit
def store_rows(rows, keep, part0, part1, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr):
    """Store [N, W0] and [N, W1] at row pointers [N], side by side; DIM columns in all, if that is fewer."""
    columns = tl.arange(0, W0)
    tl.store(rows[:, None] + columns[None, :], part0, mask=keep[:, None] & (columns < DIM)[None, :])
    if W1 > 0:
        columns = W0 + tl.arange(0, W1)
        tl.store(rows[:, None] + columns[None, :], part1, mask=keep[:, None] & (columns < DIM)[None, :])


@triton.jit
def zero_padding(out, starts, num_seqs, num_rows, SIZE: tl.constexpr):
    """Zero the rows, SIZE numbers each, that belong to no sequence; the programs of axis 0 share them."""
    row = tl.load(starts + num_seqs) + tl.program_id(0)
    while row < num_rows:
        for first in range(0, SIZE, 1024):
            columns = first + tl.arange(0, 1024)
            tl.store(out + row.to(tl.int64) * SIZE + columns, 0.0, mask=columns < SIZE)
        row += tl.num_programs(0)
