"""Latent attention of Transformers' modules, absorbed as in layers/mla.py: the cache holds latents as they are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quire.kernels import ops


class Latent:
    """In the place of a module's `expand_kv`: one head of keys, whose beginnings are values, for all of its queries."""

    def __init__(self, module: Any, pack: Callable[[Tensor], Any]):
        self.nope_dim = module.qk_nope_head_dim
        up = module.kv_b_proj.weight.detach().unflatten(0, (-1, self.nope_dim + module.v_head_dim))
        up_k, up_v = up.split((self.nope_dim, module.v_head_dim), 1)
        self.up_k, self.up_v = pack(up_k.transpose(1, 2)), pack(up_v)

    def __call__(self, latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """latent [1, 1, T, rank], rotated key [1, 1, T, D] -> what is cached as key, and as value."""
        return torch.cat((latent, key), -1), latent

    def absorb(self, q: Tensor) -> Tensor:
        """Queries [T, H, nope_dim + D] -> [T, H, rank + D]."""
        nope, rope = q.split((self.nope_dim, q.shape[-1] - self.nope_dim), -1)
        return torch.cat((ops.linear(nope, self.up_k, None), rope), -1)

    def expand(self, found: Tensor) -> Tensor:
        """Sums of latents [T, H, rank] -> of values [T, H, v_dim]."""
        return ops.linear(found, self.up_v, None)


def keep_latents(model: Any, pack: Callable[[Tensor], Any]) -> None:
    """Have modules that could expand what they cache leave it as it is."""
    for module in [*model.modules()]:
        if "expand_kv" in dir(type(module)) and module.kv_b_proj.bias is None:
            module.expand_kv = Latent(module, pack)
            del module.kv_b_proj
