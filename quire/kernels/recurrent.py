"""What operations with a state of each sequence compute, in plain torch. Knows no layers.

A step's sequences lie end to end: sequence s owns rows query_starts[s] .. query_starts[s + 1] of the input, and row
rows[s] of the state, which is read first and left as it is after the sequence's last row. Rows of the input past the
last sequence are padding, and what comes of them means nothing.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from quire.kernels.dispatch import op

LARGE = 20.0  # from here on, softplus(x) is x in float32


@op
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    rows: Tensor,
    query_starts: Tensor,
    silu: bool,
) -> Tensor:
    """A convolution of x [T, C] over time, each channel by itself, with weight [C, K] and bias [C] -> [T, C].

    Position t sees t - K + 1 .. t. `state` [num_rows, C, K - 1]: the last inputs before a sequence's first row here.
    """
    y = torch.zeros_like(x)
    ends = query_starts.tolist()
    for row, begin, end in zip(rows.tolist(), ends, ends[1:], strict=False):
        if begin == end:
            continue
        seen = torch.cat((state[row], x[begin:end].T), 1)
        out = F.conv1d(seen[None].float(), weight[:, None].float(), None, groups=len(weight))[0].T
        out = out if bias is None else out + bias.float()
        y[begin:end] = (F.silu(out) if silu else out).to(x.dtype)
        state[row] = seen[:, -state.shape[-1] :]
    return y


@op
def recurrence(
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
    """A matrix S for each head, that keys write values into and queries read -> [T, H, Dv] in v's dtype.

        S = decay * S;  S += outer(k, v), or, by the delta rule, S += outer(k, beta * (v - S^T k));  y = S^T q

    Lightning attention, Mamba-2, gated DeltaNet and Kimi's delta attention are this. In float32, position by position.

    Args:
        v: [T, H, Dv].
        q, k: [T, Hk, Dk]; heads h * H / Hk .. (h + 1) * H / Hk - 1 share the h-th.
        decay: [T, H, Dk], or [T, H, 1] if it is the same for all of a head's S, float32.
        beta: [T, H] float32; None if S is not corrected.
        state: [num_rows, H, Dk, Dv] float32, S before a sequence's first row here.
        in_chunks: a kernel may compute long sequences in chunks, by products of numbers of 10 bits.
    """
    y, group = torch.zeros_like(v), v.shape[1] // k.shape[1]
    queries, keys = (x.float().repeat_interleave(group, 1) for x in (q, k))
    ends = query_starts.tolist()
    for row, begin, end in zip(rows.tolist(), ends, ends[1:], strict=False):
        s = state[row].clone()
        for t in range(begin, end):
            s *= decay[t, :, :, None]
            value = v[t].float()
            if beta is not None:
                value = beta[t, :, None] * (value - (s * keys[t, :, :, None]).sum(1))
            s += keys[t, :, :, None] * value[:, None]
            y[t] = (s * queries[t, :, :, None]).sum(1)
        state[row] = s
    return y


@op
def selective_scan(
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
    """A vector h for each channel of x [T, C], as Mamba has it -> [T, C]; everything is float32.

        h = exp(dt * rate) * h + dt * x * b;  y = sum(c * h) + skip * x

    Args:
        dt: [T, C].
        rate: [N, C], negative.
        b, c: [T, N], the same for all channels.
        skip: [C].
        state: [num_rows, N, C], h before a sequence's first row here.
    """
    y, ends = torch.zeros_like(x), query_starts.tolist()
    for row, begin, end in zip(rows.tolist(), ends, ends[1:], strict=False):
        h = state[row].clone()
        for t in range(begin, end):
            h = torch.exp(dt[t] * rate) * h + dt[t] * x[t] * b[t, :, None]
            y[t] = (c[t, :, None] * h).sum(0) + skip * x[t]
        state[row] = h
    return y


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x). Torch's own computes the last numbers of a tensor otherwise than those before."""
    return torch.where(x > LARGE, x, torch.log1p(torch.exp(x.clamp(max=LARGE))))
