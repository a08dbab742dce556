"""Results of the newest steps, in memory of the host that the device writes to. Knows no steps and no tokens."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

NUM_ENTRIES = 4  # more than there are steps in flight, or a step waits until its entry was read

Read = TypeVar("Read")


class Ring:
    """Entries that steps fill in turn. The device counts its steps itself, so that one graph fills every entry."""

    def __init__(self, width: int, device: torch.device):
        """`width`: int32 numbers of an entry."""
        on_gpu = device.type == "cuda"
        self.entries = torch.zeros(NUM_ENTRIES, width, dtype=torch.int32, pin_memory=on_gpu)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.events = [torch.cuda.Event() for _ in range(NUM_ENTRIES)] if on_gpu else []
        self.readers: list[Callable[[], object]] = [lambda: None] * NUM_ENTRIES
        self.num_steps = 0

    def make_room(self) -> None:
        """Before a step starts: read the entry that it will fill, if nobody has."""
        self.readers[self.num_steps % NUM_ENTRIES]()

    def started(self, read: Callable[[Tensor], Read]) -> Callable[[], Read]:
        """After a step started: the returned call waits for its entry and reads it, once."""
        index = self.num_steps % NUM_ENTRIES
        self.num_steps += 1
        if self.events:
            self.events[index].record()

        @cache
        def fetch() -> Read:
            if self.events:
                self.events[index].synchronize()
            return read(self.entries[index])

        self.readers[index] = fetch
        return fetch
