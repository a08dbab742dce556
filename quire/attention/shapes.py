"""How many bytes the KV cache takes, from a spec alone. Knows no tensors and no device.

A block holds `block_size` tokens of every layer, contiguously; a layer's share starts at a multiple of 64:

    block: | layer 0: K, V | layer 1: K, V | ... |

A number takes `itemsize` bytes or, of a quantized cache, one; then each head has a scale for each token's key, and one
for its value. A key that holds its value has two: what is rotated need not be as large as the rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from quire.models.spec import ALIBI_DIMS, MLA, Attention, Foreign, Mixer, Spec, attention_of

ALIGNMENT_BYTES = 64
DIM_STEP = 16  # stored head dimensions are multiples of this, so that kernels need no tails
SCALE_BYTES = 4  # a float32
CHOICE_BYTES = (
    2**28
)  # in about so much memory each, positions take turns to choose whom they see, and to see them


def round_up(value: int, step: int) -> int:
    """The least multiple of `step` that is not below."""
    return -(-value // step) * step


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one layer stores per token: a key of `k_dim` and a value of `v_dim` for each of its heads."""

    num_kv_heads: int
    k_dim: int
    v_dim: int
    v_in_k: bool = False  # the value is the key's first v_dim elements (latent attention) and takes no room
    index: "CacheShape | None" = None  # of keys that positions are chosen by; they follow the others

    @property
    def k_stored(self) -> int:
        return round_up(self.k_dim, DIM_STEP)

    @property
    def v_stored(self) -> int:
        return 0 if self.v_in_k else round_up(self.v_dim, DIM_STEP)

    @property
    def k_parts(self) -> tuple[int, ...]:
        """Dimensions of a key that share a scale; pairs stay together."""
        first = min(round_up(self.v_dim, 2), self.k_dim)
        return (first, self.k_dim - first) if self.v_in_k else (self.k_dim,)

    def k_head_bytes(self, itemsize: int, quantized: bool) -> int:
        """Bytes of a head's key for one token, scales included."""
        return self.k_stored + len(self.k_parts) * SCALE_BYTES if quantized else self.k_stored * itemsize

    def v_head_bytes(self, itemsize: int, quantized: bool) -> int:
        """The same of its value."""
        if self.v_in_k:
            return 0
        return self.v_stored + SCALE_BYTES if quantized else self.v_stored * itemsize

    def k_bytes(self, block_size: int, itemsize: int, quantized: bool = False) -> int:
        """Bytes of a block's keys in this layer, rounded up to the alignment; its values follow them."""
        token_bytes = self.num_kv_heads * self.k_head_bytes(itemsize, quantized)
        return round_up(block_size * token_bytes, ALIGNMENT_BYTES)

    def num_bytes(self, block_size: int, itemsize: int, quantized: bool = False) -> int:
        """Bytes of this layer's share of a block."""
        v_bytes = self.num_kv_heads * block_size * self.v_head_bytes(itemsize, quantized)
        index_bytes = self.index.num_bytes(block_size, itemsize, quantized) if self.index else 0
        return (
            self.k_bytes(block_size, itemsize, quantized) + round_up(v_bytes, ALIGNMENT_BYTES) + index_bytes
        )


NOTHING = CacheShape(0, 0, 0)


def cache_shape(mixer: Mixer | None) -> CacheShape:
    """What a mixer caches per token."""
    mixer = attention_of(mixer)
    if isinstance(mixer, MLA):
        own = mixer.indexer if mixer.indexer and mixer.indexer.own else None
        index = CacheShape(1, own.head_dim, own.head_dim, v_in_k=True) if own else None
        return CacheShape(1, mixer.kv_rank + mixer.rope_dim, mixer.kv_rank, v_in_k=True, index=index)
    if mixer is None or mixer.shares is not None:
        return NOTHING
    more = ALIBI_DIMS if mixer.slopes else 0
    return CacheShape(mixer.num_kv_heads, mixer.head_dim + more, mixer.value_dim)


def cache_shapes(spec: Spec) -> tuple[CacheShape, ...]:
    """What each layer caches per token."""
    if isinstance(spec, Foreign):
        calls = (CacheShape(c.num_kv_heads, c.k_dim, c.v_dim, v_in_k=c.v_in_k) for c in spec.attention)
        return (*calls, *[NOTHING] * len(spec.states))
    return tuple(cache_shape(block.mixer) for block in spec.blocks)


def layers_read(spec: Spec) -> tuple[int, ...]:
    """For each layer the one whose cache it reads: itself, unless it shares another's."""
    if isinstance(spec, Foreign):
        return tuple(range(len(spec.attention) + len(spec.states)))
    shared = [b.mixer.shares if isinstance(b.mixer, Attention) else None for b in spec.blocks]
    return tuple(i if other is None else other for i, other in enumerate(shared))


def _ends(spec: Spec, block_size: int, itemsize: int, quantized: bool) -> Iterator[int]:
    return accumulate((s.num_bytes(block_size, itemsize, quantized) for s in cache_shapes(spec)), initial=0)


def layer_offsets(spec: Spec, block_size: int, itemsize: int, quantized: bool = False) -> tuple[int, ...]:
    """Where each layer's share of a block starts, in bytes."""
    return tuple(_ends(spec, block_size, itemsize, quantized))[:-1]


def block_bytes(spec: Spec, block_size: int, itemsize: int, quantized: bool = False) -> int:
    """Bytes of one block of all layers; `itemsize` is the bytes of a number of the network's."""
    return tuple(_ends(spec, block_size, itemsize, quantized))[-1]
