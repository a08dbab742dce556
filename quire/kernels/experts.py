"""What operations of sparse experts compute, in plain torch: where a token goes, and what becomes of it there.

Beside reference.py, whose operations these are made of. Here the host looks at the choices and calls the chosen experts
one after the other; kernels take any choice without telling the host.
"""

import dataclasses
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quire.kernels.dispatch import op
from quire.kernels.reference import (
    RmsNorm,
    RowScale,
    act,
    act_mul_within,
    add_norm,
    finish_norm,
    linear,
    normed_act_mul,
    pack_linear,
)

SPARSE_MIXER, JITTER = "sparse_mixer", 0.01
SIGMOID_TOPK = "sigmoid_topk"
PLAIN_ONLY = (SPARSE_MIXER, SIGMOID_TOPK)  # scores that no kernel has


class Rule(NamedTuple):
    """How experts are chosen and weighed; see spec.MoE."""

    top_k: int
    score: str = "softmax"  # softmax | sigmoid | softmax_topk | sigmoid_topk | sparse_mixer
    renorm: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


class Routes(NamedTuple):
    """Where tokens go. Experts from the number of those in a stack on are held elsewhere, and add nothing here."""

    experts: Tensor  # [T, top_k] int32, all different, but for those held elsewhere
    weights: Tensor  # [T, top_k] float32


class Experts(NamedTuple):
    """The weights of experts, as `pack_experts` made them, and their activation."""

    up: Any  # [E, 2 * hidden, dim]: gates, then ups; or [E, hidden, dim]
    down: Any  # [E, dim, hidden]
    up_bias: Tensor | None  # [E, 2 * hidden or hidden]
    down_bias: Tensor | None  # [E, dim]
    act: str
    gated: bool
    invariant: bool = False  # a token's results are the same bits whatever else is in its batch
    limit: float | None = None  # see `act_mul_within`; C++ kernels have none
    total: int = 0  # how many experts tokens choose from, where some are held elsewhere; 0: all are here


class Shared(NamedTuple):
    """What an expert that sees every token made of them."""

    values: Tensor  # [T, dim]
    gate: Tensor | None  # [T, 1], before its sigmoid


@op
def route(logits: Tensor, rule: Rule, correction: Tensor | None) -> Routes:
    """The experts of each token, best first. logits [T, E] and correction [E], float32."""
    scores = logits
    if rule.score == SPARSE_MIXER:
        scores = _sparse_mixer(logits, rule.top_k)
    elif rule.score == "softmax":
        scores = scores.softmax(-1)
    elif rule.score == "sigmoid":
        scores = act(scores, "sigmoid")
    choice = scores if correction is None else scores + correction
    if rule.groups > 1:
        choice = _best_groups(choice, rule, correction is not None)
    experts = choice.topk(rule.top_k, -1).indices
    weights = scores.gather(-1, experts)
    if rule.score == SIGMOID_TOPK:
        weights = act(weights, "sigmoid")
    if rule.score == "softmax_topk":
        weights = weights.softmax(-1)
    elif rule.renorm:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routes(experts.int(), weights * rule.scale)


def _sparse_mixer(logits: Tensor, top_k: int) -> Tensor:
    """Scores of the best experts one by one, against those near it that are left; 0 of others (Liu et al. 2024)."""
    scores, left = torch.zeros_like(logits), logits
    for _ in range(top_k):
        best, index = left.max(-1, keepdim=True)
        is_far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * JITTER
        near = left.masked_fill(is_far, -torch.inf).softmax(-1)
        scores = scores.scatter(-1, index, near.gather(-1, index))
        left = left.scatter(-1, index, -torch.inf)
    return scores


def _best_groups(choice: Tensor, rule: Rule, corrected: bool) -> Tensor:
    """Rule out all experts but those of the best groups (DeepSeek-V2; by their two best in V3)."""
    grouped = choice.unflatten(-1, (rule.groups, -1))
    best = grouped.topk(2, -1).values.sum(-1) if corrected else grouped.amax(-1)
    ruled_out = torch.ones_like(best, dtype=torch.bool)
    ruled_out.scatter_(-1, best.topk(rule.top_groups, -1).indices, False)
    return grouped.masked_fill(ruled_out[..., None], -torch.inf).flatten(-2)


@op
def experts(
    values: Tensor, scale: RowScale | None, routes: Routes, stack: Experts, shared: Shared | None
) -> Tensor:
    """The weighed sum of what a token's experts make of it, and of the shared one's: values [T, dim] -> [T, dim].

    values are a norm's result, whose rows may be unscaled.
    """
    x, top_k = finish_norm(values, scale), routes.experts.shape[1]
    chosen = routes.experts.flatten()
    order = chosen.argsort(stable=True)  # (token, choice) pairs, expert by expert
    tokens, weights = order // top_k, routes.weights.flatten()[order, None]
    # Sums are float32 and in the order of the experts: a token's result does not depend on the others.
    y = torch.zeros_like(x, dtype=torch.float32)
    start = 0
    for i, count in enumerate(chosen.bincount().tolist()[: len(stack.up)]):
        if count:
            rows = tokens[start : start + count]
            y[rows] += _expert(x[rows], stack, i).float() * weights[start : start + count]
            start += count
    y = y.to(x.dtype)
    if shared is None:
        return y
    return y + (shared.values if shared.gate is None else shared.values * act(shared.gate, "sigmoid"))


def _expert(x: Tensor, stack: Experts, i: int) -> Tensor:
    up_bias, down_bias = (None if b is None else b[i] for b in (stack.up_bias, stack.down_bias))
    if stack.limit is not None:
        hidden = act_mul_within(linear(x, stack.up[i], up_bias), stack.act, stack.limit)
    elif stack.gated:
        hidden = normed_act_mul(x, None, stack.up[i], up_bias, stack.act)
    else:
        hidden = act(linear(x, stack.up[i], up_bias), stack.act)
    return linear(hidden, stack.down[i], down_bias)


@op
def experts_add_norm(
    values: Tensor,
    scale: RowScale | None,
    routes: Routes,
    stack: Experts,
    shared: Shared | None,
    residual: Tensor,
    norm: RmsNorm,
) -> tuple[Tensor, Tensor, RowScale | None]:
    """(residual + experts(...), its norm, what the norm's rows have still to be multiplied by); see linear_add_norm."""
    return *add_norm(experts(values, scale, routes, stack, shared), residual, norm), None


def tensors_of(weight: Any) -> tuple[Tensor, ...]:
    """All that the weight of one expert consists of, in whatever form it is."""
    if isinstance(weight, Tensor):
        return (weight,)
    parts = (getattr(weight, f.name) for f in dataclasses.fields(weight))
    return tuple(part for part in parts if isinstance(part, Tensor))


@op
def pack_experts(
    first: Tensor, others: Iterable[Tensor], count: int, pack: Callable[[Tensor], Any] = pack_linear
) -> Any:
    """Weights [outputs, inputs] of `count` experts, in the form that `experts` is fastest with; one of each index.

    Here each is as `pack` makes it. At most one is held twice.
    """
    return tuple(pack(weight) for weight in chain((first,), others))
