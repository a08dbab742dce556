"""Launches of the kernels that keep a state of each sequence (recurrence.py), registered beside their references."""

import torch
from torch import Tensor

from quire.kernels.recurrent import causal_conv, recurrence, selective_scan
from quire.kernels.triton import recurrence as kernels
from quire.kernels.triton.machine import machine
from quire.kernels.triton.ops import DTYPES, power_of_two

MATRIX_NUMBERS = 4096  # of a head's matrix that a program holds
WARP_NUMBERS = 1024  # of them that a warp holds
LEAST_COLUMNS = 16  # of a matrix, where a program has a part of it
CHANNELS = 128  # of a convolution, to a program
POSITIONS = 32  # of a convolution at a time, where sequences have many
SCAN_CHANNELS = 64  # of a scan, to a program
LEAST_CHUNKED = 16  # positions of a sequence from which on it is computed in chunks
MOST_CHUNKED_KEYS = 256  # dimensions: what a chunk of the fewest positions has room for
CHUNK_NUMBERS = 8192  # of a chunk's keys, of which each takes so many bytes of shared memory
CHUNK_BYTES = 16
CHUNK_WARPS, CHUNK_STAGES = 4, 1
CHUNKS = (16, 64)  # positions of a chunk, least and most


@recurrence.on("cuda", *DTYPES)
def recurrence_triton(
    v: Tensor,
    q: Tensor,
    k: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    state: Tensor,
    rows: Tensor,
    query_starts: Tensor,
    in_chunks: bool = False,
) -> Tensor:
    (num_rows, heads, dv), (_, key_heads, dk) = v.shape, k.shape
    if not len(rows):
        return torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    v, q, k = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (v, q, k))
    decay, beta = decay.contiguous(), None if beta is None else beta.contiguous()
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    keys, per_channel = power_of_two(dk), decay.shape[2] > 1
    in_chunks = in_chunks and num_rows > 2 * len(rows) and not per_channel
    in_chunks = in_chunks and min(dk, dv) >= LEAST_COLUMNS and keys <= MOST_CHUNKED_KEYS
    piece = min(power_of_two(dv), max(MATRIX_NUMBERS // keys, LEAST_COLUMNS))
    strides = v.stride(0), q.stride(0), k.stride(0), state.stride(0)
    sizes = {"HEADS": heads, "GROUP": heads // key_heads, "DK": dk, "DV": dv, "KEYS": keys, "PIECE": piece}
    kernels.recur[len(rows), heads, -(-dv // piece)](
        *(v, q, k, decay, beta, state, rows, query_starts, out, num_rows, len(rows), *strides),
        **sizes,
        PER_CHANNEL=per_channel,
        MOST=LEAST_CHUNKED - 1 if in_chunks else 0,
        num_warps=min(max(piece * keys // WARP_NUMBERS, 1), 4),
    )
    if in_chunks:
        chunk = min(max(_chunk_numbers(v.device) // keys, CHUNKS[0]), CHUNKS[1])
        solved = None if beta is None else _solved(k, decay, beta, query_starts, chunk)
        kernels.recur_chunks[len(rows), heads, -(-dv // piece)](
            *(v, q, k, decay, solved, state, rows, query_starts, out, *strides),
            **sizes,
            CHUNK=chunk,
            LEAST=LEAST_CHUNKED,
            num_warps=CHUNK_WARPS,
            num_stages=CHUNK_STAGES,
        )
    return out


def _chunk_numbers(device: torch.device) -> int:
    _, shared_bytes, _ = machine(device)
    return CHUNK_NUMBERS if shared_bytes >= CHUNK_BYTES * CHUNK_NUMBERS else CHUNK_NUMBERS // 2


def _solved(k: Tensor, decay: Tensor, beta: Tensor, query_starts: Tensor, chunk: int) -> Tensor:
    """What keys of a chunk make of each other [T, H, chunk]."""
    (num_rows, key_heads, dk), heads, num_seqs = k.shape, decay.shape[1], len(query_starts) - 1
    solved = torch.empty(num_rows, heads, chunk, dtype=torch.float32, device=k.device)
    most = -(-num_rows // chunk) + min(num_seqs, num_rows // LEAST_CHUNKED)
    kernels.solve[most, heads](
        *(k, decay, beta, query_starts, solved, num_seqs, k.stride(0)),
        HEADS=heads,
        GROUP=heads // key_heads,
        DK=dk,
        KEYS=power_of_two(dk),
        CHUNK=chunk,
        LEVELS=chunk.bit_length() - 1,
        SEQS=power_of_two(num_seqs),
        LEAST=LEAST_CHUNKED,
    )
    return solved


@causal_conv.on("cuda", *DTYPES)
def causal_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    rows: Tensor,
    query_starts: Tensor,
    silu: bool,
) -> Tensor:
    if not len(rows):
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels, width = weight.shape
    kernels.convolve[len(rows), -(-channels // CHANNELS)](
        *(x, weight.contiguous(), bias, state, rows, query_starts, out, len(x), len(rows)),
        *(x.stride(0), state.stride(0)),
        CHANNELS=channels,
        PIECE=CHANNELS,
        WIDTH=width,
        ROUND=power_of_two(width - 1),
        AT_ONCE=POSITIONS if len(x) > 2 * len(rows) else 1,
        SILU=silu,
    )
    return out


@selective_scan.on("cuda", torch.float32)
def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor,
    rows: Tensor,
    query_starts: Tensor,
) -> Tensor:
    if not len(rows):
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    x, dt, b, c = (part if part.stride(1) == 1 else part.contiguous() for part in (x, dt, b, c))
    (size, channels), out = rate.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels.scan_states[len(rows), -(-channels // SCAN_CHANNELS)](
        *(x, dt, rate.contiguous(), b, c, skip, state, rows, query_starts, out, len(x), len(rows)),
        *(x.stride(0), dt.stride(0), b.stride(0), c.stride(0), state.stride(0)),
        CHANNELS=channels,
        SIZE=size,
        NUMBERS=power_of_two(size),
        PIECE=SCAN_CHANNELS,
    )
    return out
