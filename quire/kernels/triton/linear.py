# mypy: disable-error-code="no-untyped-def"
"""Products of few rows with a weight, as Triton kernels, and what is done to them before they leave. Knows no launch.

y [M, N] = x [M, K] @ w [N, K]^T, where M <= 64: the weight passes by once and is all that takes time. A program has
TILE rows of w, that is, columns of y, for all rows of x, as y^T [TILE, ROWS]:

    scale     each row of y is multiplied by 1 / rms, from sums of squares that were left by who wrote x
    bias      is added
    gate      act(y) * up, where w has 2 N rows: gates, then ups
    residual  y + residual is stored; out is that times the next norm's weight, and each tile leaves its sums of squares

Sums are float32 and in one order for given sizes and tiles, whatever the rows hold and however many there are.

Programs that follow early (PDL): a kernel may start while the one before it ends. It then waits before it touches
anything but its weight, and reads past the first-level cache, which may hold what was there before.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quire.kernels.triton.elementwise import gated

# When the next kernel may start: with this one, once it has what it waits for, or when its sums are done.
NEVER, EARLY, AFTER, LATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def follow(NEXT: tl.constexpr):
    """Wait for the kernel ahead, where this one has been launched before its end."""
    if NEXT == EARLY:
        gdc_launch_dependents()
    if NEXT != NEVER:
        gdc_wait()
    if NEXT == AFTER:
        gdc_launch_dependents()


@triton.jit
def fetch_ahead(rows, num_bytes):
    """Rows at pointers [N], `num_bytes` of each (a multiple of 16), on their way to the second-level cache."""
    at = rows.to(tl.int64)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [at, tl.zeros_like(at).to(tl.int32) + num_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def inverse_rms(squares, rows, num_rows, num_parts, size, eps, PARTS: tl.constexpr):
    """1 / rms of rows of `size` numbers, from squares [num_rows, num_parts]; added up PARTS at a time."""
    parts = tl.arange(0, PARTS)
    at = squares + rows[:, None] * num_parts + parts[None, :]
    total = tl.zeros_like(rows).to(tl.float32)
    for first in range(0, num_parts, PARTS):
        keep = (rows < num_rows)[:, None] & (first + parts < num_parts)[None, :]
        total += tl.sum(tl.load(at + first, mask=keep, other=0.0, cache_modifier=".cg"), 1)
    return tl.rsqrt(total / size + eps)


@triton.jit
def _finish(
    y, up, bias, out, residual, total, gain, squares, new_squares, tile, num_tiles,
    num_rows, N, K, num_parts, eps, offset,
    ROWS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Store a tile of y [TILE, ROWS], and of up where there is an ACT, as the top of this file says."""
    columns, rows = tile * TILE + tl.arange(0, TILE), tl.arange(0, ROWS)
    inside = columns < N
    keep = inside[:, None] & (rows < num_rows)[None, :]
    if squares is not None:
        scale = inverse_rms(squares, rows, num_rows, num_parts, K, eps, PARTS)[None, :]
        y = y * scale
        if ACT != "":
            up = up * scale
    if bias is not None:
        y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
        if ACT != "":
            up += tl.load(bias + N + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    if ACT != "":
        y = gated(y, up, ACT)
    at = rows[None, :] * N + columns[:, None]
    if residual is not None:
        y += tl.load(residual + at, mask=keep, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(total + at, y, mask=keep)
        sums = tl.sum(tl.where(keep, y * y, 0.0), 0)
        tl.store(new_squares + rows * num_tiles + tile, sums, mask=rows < num_rows)
        if gain is not None:
            y = y * (tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32) + offset)[:, None]
    tl.store(out + at, y, mask=keep)


@triton.jit
def _add_parts(
    y, up, partials, arrivals, tile, part, num_rows,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """(y, up, True) added up over a tile's programs by the last one to arrive, in the order of the parts."""
    size: tl.constexpr = TILE * ROWS
    num: tl.constexpr = 2 if GATED else 1
    keep = (tl.arange(0, ROWS) < num_rows)[None, :]
    mine = tl.arange(0, TILE)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    at = partials + tile.to(tl.int64) * (SPLIT * num * size) + mine
    tl.store(at + part * (num * size), y, mask=keep)
    if GATED:
        tl.store(at + part * (num * size) + size, up, mask=keep)
    tl.debug_barrier()  # one thread counts this program in, after the stores of all its threads
    last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        tl.store(arrivals + tile, 0)  # for the next step
        y = tl.zeros([TILE, ROWS], tl.float32)
        up = tl.zeros([TILE, ROWS], tl.float32)
        for other in tl.static_range(SPLIT):
            theirs = at + other * (num * size)
            y += tl.load(theirs, mask=keep, other=0.0, cache_modifier=".cg")
            if GATED:
                up += tl.load(theirs + size, mask=keep, other=0.0, cache_modifier=".cg")
    return y, up, last


@triton.jit
def inputs_at(at, k, keep, inputs, K, EVEN: tl.constexpr):
    """A step of x; 0 where rows are not there and past K."""
    if EVEN:
        x = tl.load(at + k, mask=keep, other=0.0)
    else:
        x = tl.load(at + k, mask=keep & (inputs + k < K)[None, :], other=0.0)
    return x


@triton.jit
def weights_at(at, k, inputs, K, EVEN: tl.constexpr):
    """A step of w, which is read once and kept in no cache; 0 past K."""
    if EVEN:
        w = tl.load(at + k, eviction_policy="evict_first")
    else:
        w = tl.load(at + k, mask=(inputs + k < K)[None, :], other=0.0, eviction_policy="evict_first")
    return w


@triton.jit(do_not_specialize=["num_rows"])
def stream(
    x, w, bias, out, residual, total, gain, squares, new_squares, partials, arrivals,
    num_rows, x_stride, share, N, K, num_parts, eps, offset,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr, NEXT: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile for up to ROWS rows. SPLIT programs share it, `share` inputs each; EVEN: K is a multiple of STEP.

    AHEAD inputs of its weight, or as many as there are, are fetched while the kernel ahead still runs.
    """
    part, tile = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT
    columns, rows = tile * TILE + tl.arange(0, TILE), tl.arange(0, ROWS)
    first = part * share
    inputs = first + tl.arange(0, STEP)
    # Columns past the end multiply the last one again: a mask would cost more, and they are not stored.
    w_rows = w + tl.minimum(columns, N - 1).to(tl.int64) * K
    w_at = w_rows[:, None] + inputs[None, :]
    up_at = tl.cast(N, tl.int64) * K
    x_at = x + rows[:, None] * x_stride + inputs[None, :]
    keep = (rows < num_rows)[:, None]
    y = tl.zeros([TILE, ROWS], tl.float32)
    up = tl.zeros([TILE, ROWS], tl.float32)
    if NEXT != NEVER and AHEAD > 0:
        ahead = tl.minimum(tl.minimum(share, K - first), AHEAD) * (w.dtype.element_ty.primitive_bitwidth // 8)
        fetch_ahead(w_rows + first, ahead)
        if ACT != "":
            fetch_ahead(w_rows + up_at + first, ahead)
    follow(NEXT)
    for k in tl.range(0, tl.minimum(share, K - first), STEP, num_stages=STAGES):
        some = tl.trans(inputs_at(x_at, k, keep, inputs, K, EVEN))
        y = tl.dot(weights_at(w_at, k, inputs, K, EVEN), some, y, input_precision=PRECISION)
        if ACT != "":
            up = tl.dot(weights_at(w_at + up_at, k, inputs, K, EVEN), some, up, input_precision=PRECISION)
    if NEXT == LATE:
        gdc_launch_dependents()
    last = True
    if SPLIT > 1:
        y, up, last = _add_parts(
            y, up, partials, arrivals, tile, part, num_rows, ROWS, TILE, SPLIT, ACT != ""
        )  # fmt: skip
    if last:
        _finish(
            y, up, bias, out, residual, total, gain, squares, new_squares, tile, tl.num_programs(0) // SPLIT,
            num_rows, N, K, num_parts, eps, offset, ROWS, TILE, PARTS, ACT,
        )  # fmt: skip


@triton.jit
def one_row(
    x, w, bias, out, residual, total, gain, squares, new_squares, N, K, num_parts, eps, offset,
    TILE: tl.constexpr, STEP: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr,
    EVEN: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """A tile for the only row: products by threads, since a tensor core would compute 8 rows to keep one."""
    tile = tl.program_id(0)
    columns, inputs = tile * TILE + tl.arange(0, TILE), tl.arange(0, STEP)
    w_at = w + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + inputs[None, :]
    up_at = tl.cast(N, tl.int64) * K
    if NEXT == EARLY:
        gdc_launch_dependents()
    weights = weights_at(w_at, 0, inputs, K, EVEN)
    ups = weights
    if ACT != "":
        ups = weights_at(w_at + up_at, 0, inputs, K, EVEN)
    if NEXT != NEVER:
        gdc_wait()
    some = tl.load(x + inputs, mask=inputs < K, other=0.0, cache_modifier=".cg").to(tl.float32)[None, :]
    y = weights.to(tl.float32) * some
    up = ups.to(tl.float32) * some
    for k in tl.range(STEP, K, STEP, loop_unroll_factor=UNROLL):
        weights = weights_at(w_at, k, inputs, K, EVEN)
        if ACT != "":
            ups = weights_at(w_at + up_at, k, inputs, K, EVEN)
        at = x + k + inputs
        if EVEN:
            some = tl.load(at, cache_modifier=".cg").to(tl.float32)[None, :]
        else:
            some = tl.load(at, mask=k + inputs < K, other=0.0, cache_modifier=".cg").to(tl.float32)[None, :]
        y += weights.to(tl.float32) * some
        if ACT != "":
            up += ups.to(tl.float32) * some
    if NEXT == LATE:
        gdc_launch_dependents()
    _finish(
        tl.sum(y, 1)[:, None], tl.sum(up, 1)[:, None], bias, out, residual, total, gain, squares, new_squares,
        tile, tl.num_programs(0), 1, N, K, num_parts, eps, offset, 1, TILE, PARTS, ACT,
    )  # fmt: skip


@triton.jit
def finish_norm(
    values, squares, out, num_parts, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr
):
    """A row of out [M, SIZE] = values / rms, from its sums of squares [M, num_parts]."""
    row, columns = tl.program_id(0), tl.arange(0, WIDTH)
    rows = row + tl.arange(0, 1)
    scale = inverse_rms(squares, rows, row + 1, num_parts, SIZE, eps, PARTS)
    at = row.to(tl.int64) * SIZE + columns
    y = tl.load(values + at, mask=columns < SIZE, other=0.0).to(tl.float32)
    tl.store(out + at, y * scale, mask=columns < SIZE)


@triton.jit
def _part(
    x_at, w_at, up_at, keep, inputs, first, share, K,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    ACT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(y, up) [TILE, ROWS] of the `share` inputs from `first` on, step after step."""
    y = tl.zeros([TILE, ROWS], tl.float32)
    up = tl.zeros([TILE, ROWS], tl.float32)
    for k in tl.range(first, tl.minimum(first + share, K), STEP, num_stages=STAGES):
        some = tl.trans(inputs_at(x_at, k, keep, inputs, K, EVEN))
        y = tl.dot(weights_at(w_at, k, inputs, K, EVEN), some, y, input_precision=PRECISION)
        if ACT != "":
            up = tl.dot(weights_at(w_at + up_at, k, inputs, K, EVEN), some, up, input_precision=PRECISION)
    return y, up


@triton.jit
def _place_of(number, num_tiles, num_row_tiles, BAND: tl.constexpr):
    """(tile, tile of rows) of a program: BAND tiles of rows share a tile before the next, so that it is read once."""
    band, inside = number // (num_tiles * BAND), number % (num_tiles * BAND)
    height = tl.minimum(num_row_tiles - band * BAND, BAND)
    return inside // height, band * BAND + inside % height


@triton.jit(do_not_specialize=["num_rows"])
def alike(
    x, w, bias, out, partials, arrivals, num_rows, x_stride, x_head_stride, share, N, K,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr, SPREAD: tl.constexpr,
    STAGES: tl.constexpr, BAND: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr, NEXT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile for ROWS of any number of rows, of out [H, M, N] = x [M, H, K] @ w [H, N, K]^T; see invariant.py.

    SPLIT parts are added up, in order, by SPREAD programs: as many, or one.
    """
    part, number, head = tl.program_id(0) % SPREAD, tl.program_id(0) // SPREAD, tl.program_id(1).to(tl.int64)
    num_tiles = tl.cdiv(N, TILE)
    tile, row_tile = _place_of(number, num_tiles, tl.cdiv(num_rows, ROWS), BAND)
    first_row = row_tile.to(tl.int64) * ROWS
    out += (head * num_rows + first_row) * N
    num_rows = tl.minimum(num_rows - first_row, ROWS).to(tl.int32)
    columns, rows, inputs = tile * TILE + tl.arange(0, TILE), tl.arange(0, ROWS), tl.arange(0, STEP)
    w_at = w + (head * N + tl.minimum(columns, N - 1))[:, None] * K + inputs[None, :]
    up_at = tl.cast(N, tl.int64) * K
    x_at = x + head * x_head_stride + first_row * x_stride + rows[:, None] * x_stride + inputs[None, :]
    keep = (rows < num_rows)[:, None]
    follow(NEXT)
    if SPREAD == SPLIT:
        y, up = _part(
            x_at, w_at, up_at, keep, inputs, part * share, share, K, ROWS, TILE, STEP, STAGES, ACT, EVEN, PRECISION
        )  # fmt: skip
    else:
        y = tl.zeros([TILE, ROWS], tl.float32)
        up = tl.zeros([TILE, ROWS], tl.float32)
        for one in tl.range(0, SPLIT, num_stages=1):
            more, more_up = _part(
                x_at, w_at, up_at, keep, inputs, one * share, share, K, ROWS, TILE, STEP, STAGES, ACT, EVEN, PRECISION
            )  # fmt: skip
            y += more
            up += more_up
    if NEXT == LATE:
        gdc_launch_dependents()
    last = True
    if SPREAD > 1:
        y, up, last = _add_parts(
            y, up, partials, arrivals, number, part, num_rows, ROWS, TILE, SPLIT, ACT != ""
        )  # fmt: skip
    if last:
        _finish(
            y, up, bias, out, None, None, None, None, None, tile, num_tiles, num_rows, N, K, 0, 1.0, 0.0,
            ROWS, TILE, 1, ACT,
        )  # fmt: skip
