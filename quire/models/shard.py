"""A network's part that one of several ranks computes: some of its heads, hidden numbers and rows of vocabulary.

What cannot be cut is computed by every rank: mixers whose norm or recurrence sees all of their channels, and sparse
gates. Parameters of a part are those of the whole, each cut along one dimension (`layers/shards.py` reads them).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from quire.errors import ConfigError
from quire.models.spec import (
    MLA,
    MLP,
    Attention,
    Block,
    Both,
    Decoder,
    DeltaNet,
    Guided,
    KimiDelta,
    Mamba2,
    Mixer,
    MoE,
    attention_of,
)

TOKENS = 4  # that draw their noise together (sampling/philox.py)


@dataclass(frozen=True, slots=True)
class WholeExperts:
    """Experts are not cut, but spread over so many ranks.

    Attributes:
        spare: slots of a rank for experts that it would not need to hold.
        way: how tokens get to them, or auto; see layers/dispatch.py.
        interval: steps after which they are placed anew, by the tokens that chose each; None: they stay.
    """

    num_ranks: int
    spare: int = 0
    way: str = "auto"
    interval: int | None = None

    def num_slots(self, s: MoE) -> int:
        """Of each rank.

        Raises:
            ConfigError: some rank would have no expert.
        """
        if s.num_experts < self.num_ranks:
            raise ConfigError(
                f"enable_expert_parallel spreads experts over {self.num_ranks} ranks, and this network has layers of"
                f" {s.num_experts}; take fewer ranks, or leave it out"
            )
        return -(-s.num_experts // self.num_ranks) + self.spare


def shard(spec: Decoder, size: int, rank: int, experts: WholeExperts | None = None) -> Decoder:
    """The part that `rank` of `size` computes. Its vocabulary is rounded up, so that all parts have as many rows.

    Raises:
        ConfigError: heads or hidden numbers cannot be shared out evenly.
    """
    if size == 1 and experts is None:
        return spec
    blocks = tuple(
        replace(b, mixer=_mixer(b.mixer, size, rank), mlp=_feed_forward(b.mlp, size, experts))
        for b in spec.blocks
    )
    return replace(spec, blocks=blocks, vocab_size=vocabulary_share(spec.vocab_size, size))


def vocabulary_share(size: int, ranks: int) -> int:
    """How many of `size` tokens each rank has, the last one fewer: whole groups, unless some rank would have none."""
    even = -(-size // (ranks * TOKENS)) * TOKENS
    return even if even * (ranks - 1) < size else -(-size // ranks)


def pieces(spec: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters of several parts one after the other, by name, with the rows of each: every part is cut by itself."""
    for i, block in enumerate(spec.blocks):
        if isinstance(s := block.mixer, Mamba2):
            written = s.groups * s.state_dim
            for kind in ("weight", "bias"):
                convolved = (s.inner, written, written)
                yield f"layers.{i}.mixer.in_proj.{kind}", (s.inner, *convolved, s.num_heads)
                yield f"layers.{i}.mixer.conv1d.{kind}", convolved


def _mixer(s: Mixer | None, size: int, rank: int) -> Mixer | None:
    match s:
        case Attention():
            return _attention(s, size, rank)
        case MLA():
            return replace(s, num_heads=_share("attention heads", s.num_heads, size))
        case DeltaNet() if not s.num_k_heads % size:
            return replace(s, num_k_heads=s.num_k_heads // size, num_v_heads=s.num_v_heads // size)
        case KimiDelta() if not s.num_heads % size:
            return replace(s, num_heads=s.num_heads // size)
        case Mamba2() if not s.groups % size:
            return replace(s, num_heads=s.num_heads // size, groups=s.groups // size)
    return s


def _attention(s: Attention, size: int, rank: int) -> Attention:
    """Where there are fewer heads of keys than ranks, several ranks have the same one."""
    heads = _share("attention heads", s.num_heads, size)
    if s.num_kv_heads % size and size % s.num_kv_heads:
        raise ConfigError(
            f"tensor_parallel_size is {size}, and this network has layers of {s.num_kv_heads} heads of keys and"
            " values, of which neither is a multiple of the other; take a size that is"
        )
    slopes = s.slopes and s.slopes[rank * heads : (rank + 1) * heads]
    return replace(s, num_heads=heads, num_kv_heads=max(s.num_kv_heads // size, 1), slopes=slopes)


def _feed_forward(s: MLP | MoE | None, size: int, experts: WholeExperts | None) -> MLP | MoE | None:
    if isinstance(s, MoE):
        shared = s.shared and _mlp(s.shared, size)
        if experts is not None:
            return replace(s, held=experts.num_slots(s), shared=shared)
        return replace(s, expert=_mlp(s.expert, size), shared=shared)
    return None if s is None else _mlp(s, size)


def _mlp(s: MLP, size: int) -> MLP:
    return s if s.sparsity else replace(s, hidden=_share("hidden numbers", s.hidden, size))


def _share(what: str, count: int, size: int) -> int:
    if count % size:
        raise ConfigError(
            f"tensor_parallel_size is {size}, and this network has layers of {count} {what}, which cannot be shared"
            " out evenly; take a divisor of that"
        )
    return count // size


def check_parts(spec: Decoder, size: int, parts: int, block_size: int, length: int) -> None:
    """Whether ranks of `size` that hold the same keys can share them out, `parts` ranks a block's positions.

    `length` is of the longest sequence.

    Raises:
        ConfigError: there are fewer of them, or layers do not see positions so.
    """
    begin = f"decode_context_parallel_size is {parts}, and this network"
    if not any(attention_of(block.mixer) for block in spec.blocks):
        raise ConfigError(f"{begin} keeps no keys that ranks could share out; leave it out")
    for block in spec.blocks:
        if isinstance(block.mixer, Both | Guided):
            raise ConfigError(f"{begin} has layers whose attention every rank computes whole; leave it out")
        if isinstance(block.mixer, Attention):
            _check_attention(block.mixer, size, parts, block_size, length, begin)


def _check_attention(s: Attention, size: int, parts: int, block_size: int, length: int, begin: str) -> None:
    if s.spans is not None:
        raise ConfigError(f"{begin} has positions of prompts that see later ones; leave it out")
    same = max(size // s.num_kv_heads, 1)  # ranks that have the same head
    if same % parts:
        raise ConfigError(
            f"{begin} has layers of {s.num_kv_heads} heads of keys, each of which is held by {same} of"
            f" tensor_parallel_size {size} ranks, so that the most is {same}; take a divisor of that, or a"
            f" tensor_parallel_size that is a multiple of {s.num_kv_heads * parts}"
        )
    if s.window is not None and s.window < length and s.window % parts:
        raise ConfigError(
            f"{begin} has layers that see a window of {s.window} positions, of which {parts} ranks cannot have as many"
            f" each; take a divisor of {s.window}"
        )
    if s.chunk is not None and s.chunk < length and s.chunk % block_size:
        raise ConfigError(
            f"{begin} has layers that see a chunk of {s.chunk} positions, which the {block_size} of all ranks' blocks"
            " do not divide; lower it, or block_size"
        )


def is_cut(whole: Block, part: Block) -> tuple[bool, bool]:
    """Whether what a block's mixer, and what its feed-forward part, makes has to be added up over the ranks."""
    return whole.mixer != part.mixer, whole.mlp != part.mlp
