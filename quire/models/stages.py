"""A network's layers as stages of a pipeline: which are whose, and the parameters of each. Pure; knows no ranks.

A stage is a run of layers, so that it needs nothing of an earlier one but what layers hand on: the residual, and what
was made of the tokens' embeddings. Layers that read what an earlier one keeps of the sequence, or has chosen, are in
the stage of that one. The first stage embeds tokens, the last one has the final norm and the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, prod

from quire.errors import ConfigError
from quire.models.parameters import Named, block_shapes, parameter_shapes
from quire.models.spec import MLA, Attention, Block, Decoder, Guided

LAST = (
    "norm.",
    "lm_head.",
    "altup_unembed_projections.",
)  # the beginnings of names of the last stage's parameters


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `first` .. `end` - 1 of a network of `total` layers."""

    first: int
    end: int
    total: int

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.total

    @property
    def layers(self) -> slice:
        return slice(self.first, self.end)


def stages(spec: Decoder, size: int) -> tuple[Stage, ...]:
    """Divide the layers so that stages have nearly as many parameters, the head among the last one's.

    The embedding does not count, as few of its rows are read in a step.

    Raises:
        ConfigError: there are not so many places at which the network can be cut.
    """
    total = len(spec.blocks)
    cuts = [cut for cut in range(1, total) if not _binds(spec.blocks, cut)]
    if len(cuts) < size - 1:
        raise ConfigError(
            f"pipeline_parallel_size is {size}, and this network of {total} layers can be cut into {len(cuts) + 1}"
            " stages at most, as some layers read what others keep; take fewer"
        )
    weights = [sum(prod(shape) for _, shape in block_shapes(block, spec.dim)) for block in spec.blocks]
    weights[-1] += spec.vocab_size * spec.dim
    ends = [*_balanced(weights, cuts, size), total]
    return tuple(Stage(first, end, total) for first, end in zip([0, *ends], ends, strict=False))


def _binds(blocks: Sequence[Block], cut: int) -> bool:
    """Whether a layer from `cut` on reads what one before it keeps or has chosen."""
    mixers = [block.mixer for block in blocks[cut:]]
    if any(isinstance(m, Attention) and m.shares is not None and m.shares < cut for m in mixers):
        return True
    choosing = (m.indexer for m in mixers if isinstance(m, MLA) and m.indexer)
    return not next((indexer.own for indexer in choosing), True)


def _balanced(weights: Sequence[int], cuts: Sequence[int], size: int) -> list[int]:
    """The cuts, one fewer than `size`, with the least sum of squares of the parts' weights."""
    before = [0]
    for weight in weights:
        before.append(before[-1] + weight)
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # by the latest cut: cost so far, and all cuts
    for _ in range(size - 1):
        following: dict[int, tuple[float, list[int]]] = {}
        for cut in cuts:
            found = (
                (cost + (before[cut] - before[at]) ** 2, made)
                for at, (cost, made) in best.items()
                if at < cut
            )
            cost, made = min(found, default=(inf, []))
            if cost < inf:
                following[cut] = cost, [*made, cut]
        best = following
    return min((cost + (before[-1] - before[at]) ** 2, made) for at, (cost, made) in best.items())[1]


def layers_of(spec: Decoder, stage: Stage) -> Decoder:
    """The network with the stage's layers only. What they read of each other counts from the first of them."""
    return replace(spec, blocks=tuple(_moved(block, stage.first) for block in spec.blocks[stage.layers]))


def _moved(block: Block, by: int) -> Block:
    if by and isinstance(block.mixer, Attention) and block.mixer.shares is not None:
        return replace(block, mixer=replace(block.mixer, shares=block.mixer.shares - by))
    return block


def stage_shapes(spec: Decoder, stage: Stage) -> Named:
    """The stage's parameters, by the names and of the shapes that they have in the whole network."""
    blocks = spec.blocks[stage.layers]
    own = {f"layers.{i}." for i in range(stage.first, stage.end)}
    own |= {f"shared.{b.mixer.shared}." for b in blocks if isinstance(b.mixer, Guided)}
    for name, shape in parameter_shapes(spec):
        if name.startswith(("layers.", "shared.")):
            if name.startswith(tuple(own)):
                yield name, shape
        elif name.startswith(LAST):
            if stage.is_last:
                yield name, shape
        elif stage.is_first or (stage.is_last and spec.tied and name == "embed_tokens.weight"):
            yield name, shape
