"""One layer of a decoder: a mixer, a feed-forward part, and the norms around them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from quire.attention.base import Cache, Ragged
from quire.kernels import ops
from quire.layers.attention import Attention
from quire.layers.base import Build, Weights
from quire.layers.both import Both
from quire.layers.conv import ShortConv
from quire.layers.delta import DeltaNet, KimiDelta
from quire.layers.embeddings import Gated
from quire.layers.griffin import RGLRU
from quire.layers.guided import Guided
from quire.layers.lightning import Lightning
from quire.layers.mamba import Mamba, Mamba2
from quire.layers.mla import MLA
from quire.layers.mlp import MLP
from quire.layers.moe import MoE
from quire.layers.norm import Norm, Normed, add, normed
from quire.models import spec
from quire.parallel.axis import Axis

MIXERS: dict[type, Callable[..., Any]] = {
    spec.Attention: Attention,
    spec.MLA: MLA,
    spec.ShortConv: ShortConv,
    spec.DeltaNet: DeltaNet,
    spec.KimiDelta: KimiDelta,
    spec.Lightning: Lightning,
    spec.Mamba: Mamba,
    spec.Mamba2: Mamba2,
    spec.RGLRU: RGLRU,
    spec.Both: Both,
    spec.Guided: Guided,
}


class Spread(NamedTuple):
    """Whose ranks have parts of a block's mixer, and of its feed-forward part."""

    mixer: Axis = Axis()
    mlp: Axis = Axis()


def mixer(s: spec.Mixer | None, build: Build, axis: Axis | None = None) -> Any:
    """The layer that computes it: `load`, `heads`, and `out`, the product that follows `heads`."""
    if s is None:
        return None
    return MIXERS[type(s)](s, build, axis) if axis and axis.size > 1 else MIXERS[type(s)](s, build)


def feed_forward(s: spec.MLP | spec.MoE | None, build: Build, axis: Axis) -> MLP | MoE | None:
    """The layer that computes it."""
    if s is None:
        return None
    return MoE(s, build, axis) if isinstance(s, spec.MoE) else MLP(s, build, axis)


class Block(nn.Module):
    """Sequential: h = x + post(mixer(pre(x))); h + post(mlp(pre(h))).

    Parallel: x + mixer(n(x)) + mlp(n(x)). Of one part: x + post(part(pre(x))). Then what the layer makes of its
    embedding is added, and all multiplied by its scalar, where it has these.
    """

    def __init__(self, s: spec.Block, build: Build, spread: Spread):
        super().__init__()
        self.spec = s
        self.mixer = mixer(s.mixer, build, spread.mixer)
        self.mlp: Any = feed_forward(s.mlp, build, spread.mlp)

        def norm(n: spec.Norm | None) -> Norm | None:
            return Norm(n, (build.dim,), build) if n else None

        self.attn_norm, self.attn_post_norm = norm(s.attn_norm), norm(s.attn_post_norm)
        self.mlp_norm, self.mlp_post_norm = norm(s.mlp_norm), norm(s.mlp_post_norm)
        self.embedding = Gated(s.embedding, build) if s.embedding else None
        self.scalar: Tensor | None = None  # [1]
        self.build = build
        self.picks = False  # whether it computes only what is wanted after its mixer, as a last layer may

    @property
    def is_plain(self) -> bool:
        """Whether nothing but what its mixer found, and the residual, is needed after it."""
        s = self.spec
        is_sequential = s.mixer is not None and not s.parallel and s.normed_residual is None
        return is_sequential and s.embedding is None

    def load(self, weights: Weights, name: str) -> None:
        parts = {
            "mixer": self.mixer,
            "mlp": self.mlp,
            "attn_norm": self.attn_norm,
            "attn_post_norm": self.attn_post_norm,
            "mlp_norm": self.mlp_norm,
            "mlp_post_norm": self.mlp_post_norm,
        }
        for part, layer in parts.items():
            if layer is not None:
                layer.load(weights, f"{name}.{part}")
        if self.embedding is not None:
            self.embedding.load(weights, name)
        if self.spec.scalar:
            self.scalar = self.build.pull(weights, f"{name}.layer_scalar", 1)

    def forward(
        self,
        x: Tensor,
        y: Normed,
        step: Ragged,
        cache: Cache,
        following: Norm | None,
        own: Tensor | None = None,
    ) -> tuple[Tensor, Normed]:
        """x [T, dim] and y, its norm by this block -> the same after it, by the norm that follows.

        x becomes more precise than y where kernels hold it so. `own` [T, size]: tokens' embeddings for this layer.
        """
        last = following if self.scalar is None else None
        if self.embedding is None or own is None:
            x, y = self._mixed(x, y, step, cache, last)
        else:
            x, y = self._mixed(x, y, step, cache, None)
            x, y = add(self.embedding(y.tensor(), own), x, self.embedding.norm, last)
        if self.scalar is None:
            return x, y
        x = x * self.scalar
        return x, normed(x.to(y.values.dtype), following)

    def _mixed(
        self, x: Tensor, y: Normed, step: Ragged, cache: Cache, following: Norm | None
    ) -> tuple[Tensor, Normed]:
        """The same of the mixer and the feed-forward part."""
        if self.mixer is None:
            return self._fed(x, y, self.attn_post_norm, following)
        mixed = self.mixer.heads(y, step, cache)
        if self.picks and step.wanted is not None:
            x, mixed = ops.embed(step.wanted, x), ops.embed(step.wanted, mixed)
        if self.spec.parallel:
            return self._parallel(x, y, self.mixer.out(mixed), following)
        if self.spec.normed_residual is not None:
            first, second = self.spec.normed_residual
            _, y = add(self.mixer.out(mixed), y.tensor() * first, self.attn_post_norm, self.mlp_norm)
            x = y.tensor()
            return add(self.mlp(x), x * second, self.mlp_post_norm, following)
        norm = following if self.mlp is None else self.mlp_norm
        if self.spec.residual_scale != 1.0:
            x, y = self._scaled(x, self.mixer.out(mixed), self.attn_post_norm, norm)
        else:
            x, y = self.mixer.out.added(mixed, x, self.attn_post_norm, norm)
        return (x, y) if self.mlp is None else self._fed(x, y, self.mlp_post_norm, following)

    def _fed(self, x: Tensor, y: Normed, post: Norm | None, following: Norm | None) -> tuple[Tensor, Normed]:
        if self.spec.residual_scale != 1.0:
            return self._scaled(x, self.mlp(y.tensor()), post, following)
        return self.mlp.added(y, x, post, following)

    def _scaled(self, x: Tensor, y: Tensor, post: Norm | None, norm: Norm | None) -> tuple[Tensor, Normed]:
        return add((y if post is None else post(y)) * self.spec.residual_scale, x, None, norm)

    def _parallel(self, x: Tensor, y: Normed, mixed: Tensor, following: Norm | None) -> tuple[Tensor, Normed]:
        scale = self.spec.residual_scale
        if self.mlp_norm is not None:
            y = normed(x.to(y.values.dtype), self.mlp_norm)
        if self.attn_post_norm is not None:
            mixed = self.attn_post_norm(mixed)
        h = x + (mixed if scale == 1.0 else mixed * scale)
        return self._scaled(h, self.mlp(y.tensor()), self.mlp_post_norm, following)
