"""C++ kernels of sparse experts (experts.cpp), registered beside their references where the library was built."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from quire.kernels.cpu.calls import kernel
from quire.kernels.cpu.native import isa, load
from quire.kernels.cpu.products import ACTIVATIONS, BOTH, PackedQuantized, PackedWeight, pointer, rows_of
from quire.kernels.experts import PLAIN_ONLY, Experts, Routes, Rule, Shared, experts, pack_experts, route
from quire.kernels.reference import RowScale, finish_norm, pack_linear

SCORES = {"softmax": 0, "sigmoid": 1, "softmax_topk": 2}  # as in experts.cpp


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The weight of each expert, all alike, and where they lie."""

    weights: tuple[PackedWeight | PackedQuantized, ...]
    data: Tensor  # addresses [count] int64
    scales: Tensor | None  # the same of quantized weights' scales

    @property
    def bits(self) -> int:
        """0 if they are not quantized."""
        first = self.weights[0]
        return first.bits if isinstance(first, PackedQuantized) else 0

    def __getitem__(self, i: int) -> PackedWeight | PackedQuantized:
        return self.weights[i]

    def __len__(self) -> int:
        return len(self.weights)


def _addresses(tensors: Iterable[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def choose(logits: Tensor, rule: Rule, correction: Tensor | None, level: int, threads: int) -> Routes:
    """`route` on an instruction set (native.isa) and so many threads."""
    logits, rows, stride = rows_of(logits)
    chosen = torch.empty((rows, rule.top_k), dtype=torch.int32)
    weights = torch.empty((rows, rule.top_k), dtype=torch.float32)
    kernel("quire_route")(
        *(level, threads, SCORES[rule.score], rule.renorm, chosen.data_ptr(), weights.data_ptr()),
        *(logits.data_ptr(), pointer(correction), rows, logits.shape[-1], stride),
        *(rule.top_k, rule.groups, rule.top_groups, rule.scale),
    )
    return Routes(chosen, weights)


def mix(
    x: Tensor, routes: Routes, stack: Experts, shared: Shared | None, level: int, threads: int
) -> Tensor | None:
    """`experts` likewise; None if weights are not packed for it, or gates are limited."""
    up, down = stack.up, stack.down
    if stack.limit is not None:
        return None
    if not isinstance(up, PackedExperts) or not isinstance(down, PackedExperts) or up.bits != down.bits:
        return None
    x, rows, stride = rows_of(x)
    chosen, weights = routes.experts.contiguous(), routes.weights.contiguous()
    more, gate, more_stride = None, None, 0
    if shared is not None:
        (more, _, more_stride), gate = rows_of(shared.values), shared.gate
    out = torch.empty(x.shape, dtype=x.dtype)
    kernel("quire_experts")(
        *(level, threads, x.dtype is torch.bfloat16, up.bits, ACTIVATIONS[stack.act], stack.gated),
        *(out.data_ptr(), x.data_ptr(), chosen.data_ptr(), weights.data_ptr(), pointer(more), pointer(gate)),
        *(up.data.data_ptr(), pointer(up.scales), pointer(stack.up_bias)),
        *(down.data.data_ptr(), pointer(down.scales), pointer(stack.down_bias)),
        *(rows, chosen.shape[-1], len(up.weights), x.shape[-1], down[0].inputs, stride, more_stride),
    )
    return out


def mix_held(
    x: Tensor, routes: Routes, stack: Experts, shared: Shared | None, level: int, threads: int
) -> Tensor | None:
    """`mix` where only some of the choices are of experts in the stack: each of these is a row by itself."""
    top_k, chosen = routes.experts.shape[1], routes.experts.flatten()
    pairs = (chosen < len(stack.up)).nonzero().flatten()
    tokens = pairs // top_k
    alone = Routes(chosen[pairs, None], torch.ones(len(pairs), 1))
    made = mix(x[tokens], alone, stack, None, level, threads)
    if made is None:
        return None
    y = torch.zeros(x.shape)
    y.index_add_(0, tokens, made.float() * routes.weights.flatten()[pairs, None])
    if shared is not None:
        y += shared.values if shared.gate is None else shared.values * shared.gate.float().sigmoid()
    return y.to(x.dtype)


def _register(level: int, threads: Callable[[], int]) -> None:
    @route.on("cpu", torch.float32)
    def route_native(logits: Tensor, rule: Rule, correction: Tensor | None) -> Routes:
        if rule.score in PLAIN_ONLY:
            return route.reference(logits, rule, correction)
        return choose(logits, rule, correction, level, threads())

    @pack_experts.on("cpu", *BOTH)
    def pack_experts_native(
        first: Tensor, others: Iterable[Tensor], count: int, pack: Callable[[Tensor], Any] = pack_linear
    ) -> PackedExperts:
        weights = tuple(pack(weight) for weight in chain((first,), others))
        scales = [weight.scales for weight in weights if isinstance(weight, PackedQuantized)]
        data = _addresses(weight.data for weight in weights)
        return PackedExperts(weights, data, _addresses(scales) if scales else None)

    @experts.on("cpu", *BOTH)
    def experts_native(
        values: Tensor, scale: RowScale | None, routes: Routes, stack: Experts, shared: Shared | None
    ) -> Tensor:
        compute = mix_held if stack.total else mix
        found = compute(finish_norm(values, scale), routes, stack, shared, level, threads())
        return experts.reference(values, scale, routes, stack, shared) if found is None else found


if load()[0] is not None:
    _register(isa(), torch.get_num_threads)
