"""What few slots have, each as much of it as it needs: a tensor by slot, found by its address. Knows no contents."""

from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor


class Records:
    """One tensor of int32 for each slot that has one.

    Kernels find it through `addresses`, which stay where they are: a graph serves slots whose records were made after
    it was captured. A step in flight may still read a record that is dropped here, as its memory is given away in the
    order of the stream.

    Attributes:
        of: the record of each slot, and of the one that is nobody's; None for none.
        addresses: [num_slots + 1] int64 on the device, where the records are; 0 for none.
    """

    def __init__(self, host: Tensor, addresses: Tensor):
        """`host`: where the addresses are written; its owner sends them to `addresses`."""
        self.of: list[Tensor | None] = [None] * len(host)
        self.addresses = addresses
        self._host = host
        self._equal: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()

    def put(self, slot: int, words: np.ndarray | None, *, share: bool = False) -> None:
        """Give the slot a record of `words` [any] int32, or none. `share`: one tensor for all that are equal."""
        record = self._equal.get(words.tobytes()) if share and words is not None else None
        if record is None and words is not None:
            record = _send(words, self.addresses.device)
            if share:
                self._equal[words.tobytes()] = record
        self.of[slot] = record
        self._host[slot] = 0 if record is None else record.data_ptr()


def _send(words: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(words)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
