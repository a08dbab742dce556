"""Experts of Transformers' modules by our products, where modules leave them to its experts interface."""

from typing import Any

import torch
from torch import Tensor, nn

from quire.kernels import ops
from quire.layers.base import Build

NAME = "quire"
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def register() -> None:
    """Make `experts` known to Transformers by its name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


def experts(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """As Transformers' experts interface has it: x [T, dim], chosen and weights [T, k] -> [T, dim]."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if x.device.type == "meta":
        return torch.empty_like(x)
    found: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, x, chosen, weights)
    return found


def is_experts(module: nn.Module) -> bool:
    """Whether a module computes its experts through that interface."""
    return {"is_transposed", "is_concatenated", "has_gate", "has_bias"} <= vars(module).keys()


class Experts(nn.Module):
    """One module's experts, their weights packed and perhaps quantized. The host looks at the choices."""

    def __init__(self, module: Any, build: Build, bits: int | None):
        super().__init__()
        self.module, self.build, self.bits = module, build, bits
        self.up_name = "gate_up_proj" if module.has_gate else "up_proj"
        self.up, self.down = self._packed(self.up_name), self._packed("down_proj")

    def _packed(self, name: str) -> list[Any]:
        """Each expert's weight; the module's own is gone then."""
        stack = self.module.get_parameter(name).detach()
        delattr(self.module, name)
        weights = (w.t().contiguous() if self.module.is_transposed else w for w in stack)
        if self.bits is None:
            return [self.build.pack(weight) for weight in weights]
        return [ops.quantize_linear(weight, self.bits) for weight in weights]

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [T, dim], chosen and weights [T, k] -> [T, dim]."""
        top_k, flat = chosen.shape[-1], chosen.flatten()
        order = flat.argsort(stable=True)  # (token, choice) pairs, expert by expert
        tokens, scale = order // top_k, weights.flatten()[order, None].float()
        # Sums are float32 and in the order of the experts: a token's result does not depend on the others.
        y, start = torch.zeros_like(x, dtype=torch.float32), 0
        for i, count in enumerate(flat.bincount(minlength=len(self.up)).tolist()[: len(self.up)]):
            if count:
                rows = tokens[start : start + count]
                y[rows] += self._expert(x[rows], i).float() * scale[start : start + count]
            start += count
        return y.to(x.dtype)

    def _expert(self, x: Tensor, i: int) -> Tensor:
        module = self.module
        hidden = ops.linear(x, self.up[i], self._bias(self.up_name, i))
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        out = ops.linear(hidden, self.down[i], self._bias("down_proj", i))
        return module.post_expert_norm(out) if vars(module).get("has_post_expert_norm") else out

    def _bias(self, name: str, i: int) -> Tensor | None:
        bias: Tensor | None = self.module.get_parameter(f"{name}_bias")[i] if self.module.has_bias else None
        return bias
