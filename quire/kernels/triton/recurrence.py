# mypy: disable-error-code="no-untyped-def"
"""What keeps a state of each sequence, as Triton kernels; float32 inside. Knows no launch.

A program owns a part of one sequence's state, goes through the sequence's positions, and leaves the state as it then
is. So nothing depends on other sequences, and a sequence's end may be anywhere: nobody need know it to launch.

Of long sequences a matrix is computed in chunks, by products (Yang et al. 2024). With G the product of a chunk's decays
up to a position, S the matrix before the chunk, and (I + L) the part of the keys' own products that is below the
diagonal, by beta and decays:

    V' = (I + L)^-1 beta (V - G K S);  Y = G Q S + (Q K^T decays) V';  S = G_last S + (K G_last / G)^T V'

Without the delta rule V' is V. All the inverses are computed first, side by side.
"""

import triton
import triton.language as tl

LEAST_DECAY = tl.constexpr(1e-37)  # whose logarithm there is
PRECISION = tl.constexpr("tf32")  # of products


@triton.jit
def clear(out, columns, keep, sequence, used, num_rows, num_seqs, SIZE: tl.constexpr):
    """Zeros in some columns of a sequence's share of the rows that are padding: whoever reads them finds numbers."""
    at = out + (used + sequence).to(tl.int64) * SIZE + columns
    for _ in range(used + sequence, num_rows, num_seqs):
        tl.store(at, tl.zeros_like(columns).to(out.dtype.element_ty), mask=keep)
        at += num_seqs * SIZE


@triton.jit(do_not_specialize=["num_rows", "num_seqs"])
def recur(
    v, q, k, decay, beta, state, rows, starts, out, num_rows, num_seqs, v_stride, q_stride, k_stride, state_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
    PIECE: tl.constexpr, PER_CHANNEL: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """PIECE columns of a head's matrix [DK, DV]. GROUP heads share a key; KEYS is a power of two >= DK.

    Sums over a column are within the program, in an order that its sizes alone decide. Sequences of more than MOST
    rows are left to `recur_chunks`, if MOST is not 0.
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * PIECE + tl.arange(0, PIECE)
    has_column = columns < DV
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    used = tl.load(starts + num_seqs)
    clear(out, head * DV + columns, has_column, sequence, used, num_rows, num_seqs, HEADS * DV)
    if begin < end and (MOST == 0 or end - begin <= MOST):
        keys = tl.arange(0, KEYS)
        has_key = keys < DK
        at = state + tl.load(rows + sequence).to(tl.int64) * state_stride + head * DK * DV
        at += keys[:, None] * DV + columns[None, :]
        inside = has_key[:, None] & has_column[None, :]
        matrix = tl.load(at, mask=inside, other=0.0)
        first, key_at = begin.to(tl.int64), head // GROUP * DK + keys
        q_at, k_at = q + first * q_stride + key_at, k + first * k_stride + key_at
        v_at = v + first * v_stride + head * DV + columns
        of_head = first * HEADS + head
        for _ in range(begin, end):
            query = tl.load(q_at, mask=has_key, other=0.0).to(tl.float32)
            key = tl.load(k_at, mask=has_key, other=0.0).to(tl.float32)
            value = tl.load(v_at, mask=has_column, other=0.0).to(tl.float32)
            if PER_CHANNEL:
                matrix *= tl.load(decay + of_head * DK + keys, mask=has_key, other=0.0)[:, None]
            else:
                matrix *= tl.load(decay + of_head)
            if beta is not None:
                value = (value - tl.sum(matrix * key[:, None], 0)) * tl.load(beta + of_head)
            matrix += key[:, None] * value[None, :]
            tl.store(out + of_head * DV + columns, tl.sum(matrix * query[:, None], 0), mask=has_column)
            q_at += q_stride
            k_at += k_stride
            v_at += v_stride
            of_head += HEADS
        tl.store(at, matrix, mask=inside)


@triton.jit
def _powers(decay, inside):
    """Logarithms of the products of decays [CHUNK] up to each position, and of all."""
    logs = tl.log(tl.maximum(tl.load(decay, mask=inside, other=1.0), LEAST_DECAY))
    return tl.cumsum(logs, 0), tl.sum(logs, 0)


@triton.jit
def _between(powers, later):
    """Products of the decays between two positions [CHUNK, CHUNK], 0 where it is not `later`."""
    apart = tl.minimum(powers[:, None] - powers[None, :], 0.0)
    return tl.where(later, tl.exp(apart), 0.0)


@triton.jit(do_not_specialize=["num_seqs"])
def solve(
    k, decay, beta, starts, solved, num_seqs, k_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, SEQS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """(I + L)^-1 beta of one chunk, in its positions' rows of solved [T, HEADS, CHUNK]. Grid (chunks or more, HEADS).

    Inverses of blocks of 2^n come of those of their two halves: [[A, 0], [B, C]] has -C^-1 B A^-1 below the diagonal.
    SEQS is a power of two >= num_seqs; sequences of less than LEAST rows have no chunks.
    """
    program, head = tl.program_id(0), tl.program_id(1)
    each = tl.arange(0, SEQS)
    counts = tl.load(starts + each + 1, mask=each < num_seqs, other=0)
    counts -= tl.load(starts + each, mask=each < num_seqs, other=0)
    chunks = tl.where(counts >= LEAST, (counts + CHUNK - 1) // CHUNK, 0)
    sequence = tl.sum((tl.cumsum(chunks, 0) <= program).to(tl.int32), 0)
    if sequence < num_seqs:
        before = tl.sum(tl.where(each < sequence, chunks, 0), 0)
        first = tl.load(starts + sequence) + (program - before) * CHUNK
        i, keys = tl.arange(0, CHUNK), tl.arange(0, KEYS)
        t = (first + i).to(tl.int64)
        inside = t < tl.load(starts + sequence + 1)
        at = k + t[:, None] * k_stride + (head // GROUP * DK + keys)[None, :]
        key = tl.load(at, mask=inside[:, None] & (keys < DK)[None, :], other=0.0).to(tl.float32)
        powers, _ = _powers(decay + t * HEADS + head, inside)
        strength = tl.load(beta + t * HEADS + head, mask=inside, other=0.0)
        low = tl.dot(key, tl.trans(key), input_precision=PRECISION)
        low *= strength[:, None] * _between(powers, i[:, None] > i[None, :])
        inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
        for level in tl.static_range(LEVELS):
            a, b = i[:, None] >> level, i[None, :] >> level
            part = tl.where((a == b + 1) & (a % 2 == 1), low, 0.0)
            if level == 0:
                inverse -= part
            else:
                right = tl.dot(part, inverse, input_precision=PRECISION)
                inverse -= tl.dot(inverse, right, input_precision=PRECISION)
        at = solved + (t * HEADS + head)[:, None] * CHUNK + i[None, :]
        tl.store(at, inverse * strength[None, :], mask=inside[:, None])


@triton.jit
def recur_chunks(
    v, q, k, decay, solved, state, rows, starts, out, v_stride, q_stride, k_stride, state_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
    PIECE: tl.constexpr, CHUNK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """As `recur`, for sequences of at least LEAST rows, CHUNK at a time. `solved`: None without the delta rule."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * PIECE + tl.arange(0, PIECE)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    if end - begin >= LEAST:
        keys, i = tl.arange(0, KEYS), tl.arange(0, CHUNK)
        has_key, has_column = keys < DK, columns < DV
        at = state + tl.load(rows + sequence).to(tl.int64) * state_stride + head * DK * DV
        at += keys[:, None] * DV + columns[None, :]
        matrix = tl.load(at, mask=has_key[:, None] & has_column[None, :], other=0.0)
        for first in range(begin, end, CHUNK):
            t = (first + i).to(tl.int64)
            inside = t < end
            key_at, of_key = (head // GROUP * DK + keys)[None, :], inside[:, None] & has_key[None, :]
            query = tl.load(q + t[:, None] * q_stride + key_at, mask=of_key, other=0.0).to(tl.float32)
            key = tl.load(k + t[:, None] * k_stride + key_at, mask=of_key, other=0.0).to(tl.float32)
            of_value = inside[:, None] & has_column[None, :]
            value_at = v + t[:, None] * v_stride + (head * DV + columns)[None, :]
            value = tl.load(value_at, mask=of_value, other=0.0).to(tl.float32)
            powers, whole = _powers(decay + t * HEADS + head, inside)
            kept = tl.exp(powers)[:, None]
            if solved is not None:
                value -= kept * tl.dot(key, matrix, input_precision=PRECISION)
                inverse_at = solved + (t * HEADS + head)[:, None] * CHUNK + i[None, :]
                inverse = tl.load(inverse_at, mask=inside[:, None], other=0.0)
                value = tl.dot(inverse, value, input_precision=PRECISION)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            scores *= _between(powers, i[:, None] >= i[None, :])
            y = kept * tl.dot(query, matrix, input_precision=PRECISION)
            y += tl.dot(scores, value, input_precision=PRECISION)
            tl.store(out + (t * HEADS + head)[:, None] * DV + columns[None, :], y, mask=of_value)
            key *= tl.exp(whole - powers)[:, None]
            matrix = matrix * tl.exp(whole) + tl.dot(tl.trans(key), value, input_precision=PRECISION)
        tl.store(at, matrix, mask=has_key[:, None] & has_column[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_seqs"])
def scan_states(
    x, dt, rate, b, c, skip, state, rows, starts, out, num_rows, num_seqs,
    x_stride, dt_stride, b_stride, c_stride, state_stride,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, NUMBERS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """PIECE of CHANNELS, of which each has SIZE numbers of state; NUMBERS is a power of two >= SIZE."""
    sequence, channels = tl.program_id(0), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    has_channel = channels < CHANNELS
    used = tl.load(starts + num_seqs)
    clear(out, channels, has_channel, sequence, used, num_rows, num_seqs, CHANNELS)
    if begin < end:
        numbers = tl.arange(0, NUMBERS)
        has_number = numbers < SIZE
        inside = has_number[:, None] & has_channel[None, :]
        here = numbers[:, None] * CHANNELS + channels[None, :]
        at = state + tl.load(rows + sequence).to(tl.int64) * state_stride + here
        h = tl.load(at, mask=inside, other=0.0)
        rates = tl.load(rate + here, mask=inside, other=0.0)
        skips = tl.load(skip + channels, mask=has_channel, other=0.0)
        t = begin.to(tl.int64)
        for _ in range(begin, end):
            step = tl.load(dt + t * dt_stride + channels, mask=has_channel, other=0.0)
            value = tl.load(x + t * x_stride + channels, mask=has_channel, other=0.0)
            key = tl.load(b + t * b_stride + numbers, mask=has_number, other=0.0)
            query = tl.load(c + t * c_stride + numbers, mask=has_number, other=0.0)
            h = tl.exp(step[None, :] * rates) * h + (step * value)[None, :] * key[:, None]
            y = tl.sum(query[:, None] * h, 0) + skips * value
            tl.store(out + t * CHANNELS + channels, y, mask=has_channel)
            t += 1
        tl.store(at, h, mask=inside)


@triton.jit
def _seen(x, before, p, begin, channels, keep, x_stride, WIDTH: tl.constexpr):
    """Inputs at positions p [N] of a sequence that begins at `begin`: x's, or earlier ones from its state."""
    now = x + p.to(tl.int64)[:, None] * x_stride + channels[None, :]
    early = before + channels[None, :] * (WIDTH - 1) + (p - begin + WIDTH - 1)[:, None]
    is_new = (p >= begin)[:, None]
    new = tl.load(now, mask=keep & is_new, other=0.0)
    return tl.where(is_new, new, tl.load(early, mask=keep & (is_new == 0), other=0.0))


@triton.jit(do_not_specialize=["num_rows", "num_seqs"])
def convolve(
    x, weight, bias, state, rows, starts, out, num_rows, num_seqs, x_stride, state_stride,
    CHANNELS: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr, ROUND: tl.constexpr, AT_ONCE: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """PIECE of CHANNELS, AT_ONCE positions at a time. ROUND is a power of two >= WIDTH - 1."""
    sequence, channels = tl.program_id(0), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    inside, used = channels < CHANNELS, tl.load(starts + num_seqs)
    clear(out, channels, inside, sequence, used, num_rows, num_seqs, CHANNELS)
    if begin < end:
        before = state + tl.load(rows + sequence).to(tl.int64) * state_stride
        for first in range(begin, end, AT_ONCE):
            t = first + tl.arange(0, AT_ONCE)
            keep = (t < end)[:, None] & inside[None, :]
            y = tl.zeros((AT_ONCE, PIECE), tl.float32)
            for j in tl.static_range(WIDTH):
                w = tl.load(weight + channels * WIDTH + j, mask=inside, other=0.0).to(tl.float32)
                seen = _seen(x, before, t - (WIDTH - 1) + j, begin, channels, keep, x_stride, WIDTH)
                y += seen.to(tl.float32) * w[None, :]
            if bias is not None:
                y += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            tl.store(out + t.to(tl.int64)[:, None] * CHANNELS + channels[None, :], y, mask=keep)
        j = tl.arange(0, ROUND)
        keep = (j < WIDTH - 1)[:, None] & inside[None, :]
        last = _seen(x, before, end - (WIDTH - 1) + j, begin, channels, keep, x_stride, WIDTH)
        tl.debug_barrier()  # all threads have read the state before one of them writes it
        tl.store(before + channels[None, :] * (WIDTH - 1) + j[:, None], last, mask=keep)
