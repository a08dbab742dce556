"""What mixers that read no cache of keys remember of a sequence: a state of a fixed size, in a row of one pool.

    row: | layer 0: part, part | layer 1: part, part | ... |

Each part starts at a multiple of 64 bytes. A row is copied, and reset to zeros, as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from quire.attention.shapes import ALIGNMENT_BYTES, round_up
from quire.models.spec import (
    RGLRU,
    Both,
    DeltaNet,
    Foreign,
    Guided,
    KimiDelta,
    Lightning,
    Mamba,
    Mamba2,
    Mixer,
    ShortConv,
    Spec,
)

State = tuple[Tensor, ...]  # a layer's parts, each [num_rows, *shape]; empty for attention
EXACT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a sequence's state in one layer: float32 if `exact`, else in the network's dtype."""

    shape: tuple[int, ...]
    exact: bool = False

    def num_bytes(self, itemsize: int) -> int:
        """Bytes of a row, rounded up to the alignment."""
        return round_up(prod(self.shape) * (EXACT_BYTES if self.exact else itemsize), ALIGNMENT_BYTES)

    def view(self, states: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
        """[num_rows, *shape] of `states` [num_rows, state_bytes] uint8; its share of a row starts at `offset`."""
        dtype = torch.float32 if self.exact else dtype
        mine = states[:, offset : offset + prod(self.shape) * dtype.itemsize]
        return mine.view(dtype).unflatten(1, self.shape)


def state_parts(mixer: Mixer | None, dim: int) -> tuple[Part, ...]:
    """What a mixer of a network of `dim` dimensions keeps; nothing if it is attention, or if there is none."""
    match mixer:
        case ShortConv():
            return (Part((dim, mixer.width - 1)),)
        case DeltaNet():
            channels = 2 * mixer.num_k_heads * mixer.k_dim + mixer.num_v_heads * mixer.v_dim
            matrices = mixer.num_v_heads, mixer.k_dim, mixer.v_dim
            return Part((channels, mixer.width - 1)), Part(matrices, exact=True)
        case KimiDelta():
            channels, matrices = 3 * mixer.num_heads * mixer.head_dim, _squares(mixer)
            return Part((channels, mixer.width - 1)), Part(matrices, exact=True)
        case Lightning():
            return (Part(_squares(mixer), exact=True),)
        case Mamba():
            seen = Part((mixer.channels, mixer.width - 1))
            return seen, Part((mixer.num_heads, mixer.state_dim, mixer.head_dim), exact=True)
        case Mamba2():
            seen = Part((mixer.convolved, mixer.width - 1))
            return seen, Part((mixer.num_heads, mixer.state_dim, mixer.head_dim), exact=True)
        case Both() | Guided():
            return state_parts(mixer.states, dim)
        case RGLRU():
            return Part((mixer.channels, mixer.width - 1)), Part((mixer.channels, 1, 1), exact=True)
    return ()


def _squares(mixer: KimiDelta | Lightning) -> tuple[int, int, int]:
    return mixer.num_heads, mixer.head_dim, mixer.head_dim


def state_bytes(spec: Spec, itemsize: int) -> int:
    """Bytes of a sequence's state in all layers; `itemsize` is the bytes of a number of the network's."""
    return sum(part.num_bytes(itemsize) for parts in _parts(spec) for part in parts)


def layer_states(spec: Spec, states: Tensor | None, dtype: torch.dtype) -> Iterator[State]:
    """Each layer's view of `states` [num_rows, state_bytes] uint8, which is None where no layer keeps any."""
    offset = 0
    for parts in _parts(spec):
        found = []
        for part in parts:
            if states is None:
                raise ValueError("a layer keeps a state, and there is no memory for states")
            found.append(part.view(states, offset, dtype))
            offset += part.num_bytes(dtype.itemsize)
        yield tuple(found)


def _parts(spec: Spec) -> list[tuple[Part, ...]]:
    if isinstance(spec, Foreign):
        own = (tuple(Part(part.shape, part.exact) for part in kept) for _, kept in spec.states)
        return [*[()] * len(spec.attention), *own]
    return [state_parts(block.mixer, spec.dim) for block in spec.blocks]
