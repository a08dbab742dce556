"""One layer of a decoder: a mixer, a feed-forward part, and the norms around them."""

from torch import Tensor, nn

from quire.attention.base import LayerCache, Ragged
from quire.layers.attention import Attention
from quire.layers.base import Build, Weights
from quire.layers.mla import MLA
from quire.layers.mlp import MLP
from quire.layers.moe import MoE
from quire.layers.norm import Norm
from quire.models import spec


class Block(nn.Module):
    """Sequential: h = x + post(mixer(pre(x))); h + post(mlp(pre(h))).

    Parallel: x + mixer(n(x)) + mlp(n(x)).
    """

    def __init__(self, s: spec.Block, build: Build):
        super().__init__()
        self.spec = s
        self.mixer = MLA(s.mixer, build) if isinstance(s.mixer, spec.MLA) else Attention(s.mixer, build)
        self.mlp = MoE(s.mlp, build) if isinstance(s.mlp, spec.MoE) else MLP(s.mlp, build)

        def norm(n: spec.Norm | None) -> Norm | None:
            return Norm(n, (build.dim,), build) if n else None

        self.attn_norm, self.attn_post_norm = norm(s.attn_norm), norm(s.attn_post_norm)
        self.mlp_norm, self.mlp_post_norm = norm(s.mlp_norm), norm(s.mlp_post_norm)

    def load(self, weights: Weights, name: str) -> None:
        self.mixer.load(weights, f"{name}.mixer")
        self.mlp.load(weights, f"{name}.mlp")
        norms = {
            "attn_norm": self.attn_norm,
            "attn_post_norm": self.attn_post_norm,
            "mlp_norm": self.mlp_norm,
            "mlp_post_norm": self.mlp_post_norm,
        }
        for part, norm in norms.items():
            if norm is not None:
                norm.load(weights, f"{name}.{part}")

    def forward(self, x: Tensor, step: Ragged, cache: LayerCache) -> Tensor:
        """x [T, dim] -> [T, dim]."""
        y = _apply(self.attn_norm, x)
        h = x + self._scaled(_apply(self.attn_post_norm, self.mixer(y, step, cache)))
        if not self.spec.parallel:
            y = _apply(self.mlp_norm, h)
        elif self.mlp_norm is not None:
            y = self.mlp_norm(x)
        return h + self._scaled(_apply(self.mlp_post_norm, self.mlp(y)))

    def _scaled(self, x: Tensor) -> Tensor:
        scale = self.spec.residual_scale
        return x if scale == 1.0 else x * scale


def _apply(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
