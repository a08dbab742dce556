"""Every slot's sampling numbers, on the device: rows of a batch select them by index. Knows no logits."""

import math
from collections.abc import Sequence
from enum import IntFlag
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quire.kernels.ops import pick
from quire.sampling.draw import Controls
from quire.sampling.filters import Filters
from quire.sampling.records import Records
from quire.types import SamplingParams

NO_LOGPROBS = -2  # -1 asks for the whole vocabulary
GREEDY = (0.0, -math.inf, 1.0)  # 1 / temperature, log(min_p), top_p
NEVER = 1 << 62  # a position that no sequence has


class Uses(IntFlag):
    """What a slot needs besides an argmax. A batch pays for the union over its rows."""

    RANDOM = 1
    FILTERS = 2
    PENALTIES = 4
    RULES = 8
    LOGPROBS = 16
    MASKS = 32  # of a step's rows rather than a slot's


class Kept(NamedTuple):
    """What slots have records of."""

    stops: Records  # token ids that end a sequence
    rules: Records
    penalties: Records


class Stops(NamedTuple):
    """Which tokens end a sequence, by slot, and nobody's."""

    records: Records  # token ids
    start: Tensor  # [num_slots + 1] int64 on the device: positions from which they do


Values = Sequence[float] | Sequence[Sequence[int]] | Tensor


def upload(values: Values, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the device; the host does not wait for the copy."""
    if isinstance(values, Tensor):
        return values.to(device, dtype, non_blocking=True)
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class SlotParams:
    """The numbers of `num_slots` slots: written on the host, sent to the device together when they change.

    On the device there is a greedy row more, which is nobody's, for the padding of batches.
    """

    def __init__(self, vocab_size: int, num_slots: int, device: torch.device):
        self._vocab_size = vocab_size
        self._device = device
        self.uses = np.zeros(num_slots, np.uint8)
        self.num_logprobs = np.full(num_slots, NO_LOGPROBS, np.int64)
        # Rows: 1 / temperature, log(min_p), top_p; seed, top_k, the first position of stop tokens, and addresses of
        # records. What is gathered for a batch is then contiguous.
        self._host_floats = torch.tensor(GREEDY)[:, None].repeat(1, num_slots + 1)
        ints = (0, vocab_size, NEVER, *[0] * len(Kept._fields))
        self._host_ints = torch.tensor(ints)[:, None].repeat(1, num_slots + 1)
        self._floats = self._host_floats.to(device)  # on a CPU these share the host's memory
        self._ints = self._host_ints.to(device)
        self._greedy = self._floats.clone(), self._ints[:2].clone()
        self._changed: set[int] = set()
        self.kept = Kept(*map(Records, self._host_ints[3:], self._ints[3:]))
        self.stops = Stops(self.kept.stops, self._ints[2])

    def write(
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        *,
        stops: tuple[np.ndarray | None, int],
        rules: np.ndarray | None,
        penalties: np.ndarray | None,
    ) -> None:
        """Set a slot's numbers and records. `stops`: token ids int32, and the position from which they end it."""
        uses = Uses.RULES if rules is not None else Uses(0)
        if penalties is not None:
            uses |= Uses.PENALTIES
        row = GREEDY
        top_k = self._vocab_size
        if not params.is_greedy:
            uses |= Uses.RANDOM
            if 0 < params.top_k < self._vocab_size:
                top_k = params.top_k
            log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
            row = (1 / params.temperature, log_min_p, params.top_p)
            if params.min_p > 0 or params.top_p < 1 or top_k < self._vocab_size:
                uses |= Uses.FILTERS
        if params.logprobs is not None:
            uses |= Uses.LOGPROBS
        self.num_logprobs[slot] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        self.uses[slot] = uses
        self._put(slot, row, (seed, top_k, stops[1]))
        self.kept.stops.put(slot, stops[0], share=True)
        self.kept.rules.put(slot, rules)
        self.kept.penalties.put(slot, penalties)

    def clear(self, slot: int) -> None:
        """Make the slot greedy and without records: with more than its `uses` name it would be drawn wrongly."""
        if self.uses[slot] & Uses.RANDOM or any(records.of[slot] is not None for records in self.kept):
            self._put(slot, GREEDY, (0, self._vocab_size, NEVER))
            for records in self.kept:
                records.put(slot, None)
        self.uses[slot] = 0
        self.num_logprobs[slot] = NO_LOGPROBS

    def _put(self, slot: int, floats: tuple[float, float, float], ints: tuple[int, int, int]) -> None:
        self._host_floats[:, slot] = torch.tensor(floats)
        self._host_ints[:3, slot] = torch.tensor(ints)
        self._changed.add(slot)

    def flush(self) -> None:
        """Send what has changed; the host does not wait."""
        if self._changed and self._device.type != "cpu":
            changed = sorted(self._changed)
            rows = upload(changed, torch.int64, self._device)
            floats, ints = self._host_floats[:, changed], self._host_ints[:, changed]
            self._floats[:, rows] = upload(floats.pin_memory(), torch.float32, self._device)
            self._ints[:, rows] = upload(ints.pin_memory(), torch.int64, self._device)
        self._changed.clear()

    def controls(self, slots: Tensor, positions: Tensor, union: Uses) -> Controls:
        """How to draw for slots [R] at positions [R], gathered on the device; `union` of what they use."""
        if union & Uses.RANDOM:
            floats, ints = pick(self._floats, slots), pick(self._ints[:2], slots)
        else:
            floats, ints = self._greedy[0][:, : len(slots)], self._greedy[1][:, : len(slots)]
        (scale, log_min_p, top_p), (seeds, top_k) = floats.unbind(0), ints.unbind(0)
        filters = Filters(log_min_p, top_k, top_p)
        all_greedy, any_filter = not union & Uses.RANDOM, bool(union & Uses.FILTERS)
        return Controls(scale, filters, seeds, positions, all_greedy, any_filter)
