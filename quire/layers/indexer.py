"""The indexer of sparse attention (DeepSeek-V3.2): which positions a token sees, by keys with a cache of their own."""

from torch import Tensor, float32, nn

from quire.attention.base import LayerCache, Ragged
from quire.attention.parted import choose
from quire.attention.sparse import Chosen
from quire.errors import ConfigError
from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.linear import EXACT, Linear
from quire.layers.norm import Norm, Normed
from quire.models import spec


class Indexer(nn.Module):
    """Writes a key for each token, and chooses among them once there are more than may be seen.

    DeepSeek's own network turns queries and keys by a Hadamard transform before it rounds them to 8 bits. It is
    orthogonal, so that scores are the same without, and nothing is rounded here.
    """

    def __init__(self, s: spec.Indexer, q_rank: int, build: Build):
        """
        Raises:
            ConfigError: the cache is of int8, which is too coarse to choose by.
        """
        super().__init__()
        if build.backend.quantized:
            raise ConfigError(
                "kv_cache_dtype is int8, and this network's attention chooses positions by what it caches, which 8 bits"
                " are too few for; leave it auto"
            )
        self.spec, self.build = s, build
        self.q = Linear(q_rank, {"wq_b": s.num_heads * s.head_dim}, build, least_bits=EXACT)
        self.k = Linear(build.dim, {"wk": s.head_dim}, build, least_bits=EXACT)
        self.k_norm = Norm(s.norm, (s.head_dim,), build)
        self.weights = Linear(build.dim, {"weights_proj": s.num_heads}, build, least_bits=EXACT)
        self.table = build.ropes.table(s.rope)
        self.scale = (s.num_heads * s.head_dim) ** -0.5

    def load(self, weights: Weights, name: str) -> None:
        for part in (self.q, self.k, self.weights):
            part.load(weights, name)
        self.k_norm.load(weights, f"{name}.k_norm")

    def forward(self, x: Normed, latent: Tensor, step: Ragged, cache: LayerCache) -> Chosen | None:
        """x [T, dim] and the queries' latent [T, q_rank] -> `choose`; None where each position sees all before."""
        s, backend = self.spec, self.build.backend
        keys = self._turned(self.k_norm(self.k.of(x))[:, None], step)
        backend.write(cache, keys, None, step.seen_by(cache, None))
        if step.max_length <= s.top_k:
            return None
        q = self._turned(self.q(latent).unflatten(-1, (s.num_heads, -1)), step)
        return choose(backend, q, self.weights.of(x, float32) * self.scale, cache, step, s.top_k)

    def _turned(self, heads: Tensor, step: Ragged) -> Tensor:
        return ops.norm_rope(heads, None, 0.0, *self.table, step.positions, self.spec.rope.interleaved)
