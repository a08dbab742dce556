"""ALiBi (Press et al. 2022): scores fall with the distance, each head's by a slope of its own. Knows no attention.

slope * (key's position - query's) and slope * key's position are the same to a softmax. So a query carries the slope
and a key its position in a few dimensions more, and attention need not know of it. Positions are written with digits
of base 64, which every dtype holds exactly; slopes as sums of two numbers, since one of 16 bits is not precise enough.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.models.spec import ALIBI_DIMS

BASE = 64
DIGITS = ALIBI_DIMS // 2  # of positions up to 64 ** 3, and beyond as long as the first one is a small integer


class Slopes:
    """What makes one layer's scores fall; `scale` is what they are multiplied by after the slopes."""

    def __init__(self, slopes: Sequence[float], scale: float, dtype: torch.dtype, device: torch.device):
        places = torch.tensor([BASE**i for i in reversed(range(DIGITS))], dtype=torch.float64)
        exact = torch.tensor(slopes, dtype=torch.float64)[:, None] / scale * places
        high = exact.to(dtype)
        self.weights = torch.cat((high, (exact - high.double()).to(dtype)), -1).to(device)  # [H, ALIBI_DIMS]

    def queries(self, q: Tensor) -> Tensor:
        """q [T, H, D] -> [T, H, D + ALIBI_DIMS]."""
        return torch.cat((q, self.weights.expand(len(q), -1, -1)), -1)

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """k [T, Hkv, D], positions [T] -> [T, Hkv, D + ALIBI_DIMS]."""
        digits = [positions // BASE**i % BASE for i in reversed(range(DIGITS - 1))]
        first = positions // BASE ** (DIGITS - 1)
        written = torch.stack((first, *digits), -1).repeat(1, 2)[:, None].to(k.dtype)
        return torch.cat((k, written.expand(-1, k.shape[1], -1)), -1)
