"""Host tensors into device memory at the speed of the page cache. Knows no names, files or layers.

Reading a mapped file into pinned memory takes several threads; copying from there to a CUDA device takes none:

    source --threads--> ring of pinned buffers --the device's current stream--> destination

Everything is on the device's current stream, so what is launched after a copy sees it, and nobody waits on the host
but for a free buffer. Pinning costs most of a second per GiB, so the ring is small and lives while a model loads.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

BUFFER_BYTES = 4 * 2**20  # a transfer of 80 us: long beside its launch, short beside a tensor
NUM_BUFFERS = 16
MAX_THREADS = 8


@dataclass(slots=True)
class Buffer:
    """Some pinned bytes, and when the device has read what was last put there."""

    memory: Tensor
    taken: torch.cuda.Event | None = None

    def view(self, like: Tensor) -> Tensor:
        """The first bytes as a contiguous tensor of this one's shape and dtype, once they are free."""
        if self.taken is not None:
            self.taken.synchronize()
        return self.memory[: like.numel() * like.itemsize].view(like.dtype).view(like.shape)


class Ring:
    """Buffers, used in turn, and the threads that fill them."""

    def __init__(self, device: torch.device, num_buffers: int, buffer_bytes: int):
        self.device, self.buffer_bytes, self.turn = device, buffer_bytes, 0
        memory = torch.empty(num_buffers, buffer_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.buffers = [Buffer(part) for part in memory]
        self.most_reads = max(1, num_buffers // 2)  # the others are on their way to the device
        num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)), self.most_reads)
        self.threads = ThreadPoolExecutor(num_threads, "quire-weights")

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Returns when the source has been read; what reading it raises is raised here."""
        reads: deque[tuple[Future[Tensor], Buffer, Tensor]] = deque()
        try:
            for target, piece in pieces(destination, source, self.buffer_bytes):
                if len(reads) == self.most_reads:
                    self._send(*reads.popleft())
                buffer = self.buffers[self.turn]
                self.turn = (self.turn + 1) % len(self.buffers)
                reads.append((self.threads.submit(buffer.view(piece).copy_, piece), buffer, target))
            while reads:
                self._send(*reads.popleft())
        finally:  # after an error, nothing may go on writing to buffers that the next copy takes
            wait([read for read, *_ in reads])

    def _send(self, read: Future[Tensor], buffer: Buffer, target: Tensor) -> None:
        staged = read.result()
        if staged.dtype != target.dtype:  # torch would convert on the host, into unpinned memory
            staged = staged.to(self.device, non_blocking=True)
        target.copy_(staged, non_blocking=True)
        if self.device.type == "cuda":
            buffer.taken = torch.cuda.Event()
            buffer.taken.record(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        """The memory may go once the device has read it, which torch's allocator of pinned memory sees to."""
        self.threads.shutdown()


class Upload:
    """Copies into one device's memory. On the CPU a copy is torch's; a `with` bounds the life of the ring."""

    def __init__(
        self,
        device: torch.device,
        *,
        staged: bool | None = None,
        num_buffers: int = NUM_BUFFERS,
        buffer_bytes: int = BUFFER_BYTES,
    ):
        """`staged`: whether to go through the ring; None for where it is faster, which is on CUDA."""
        self.device = device
        self.staged = device.type == "cuda" if staged is None else staged
        self.num_buffers, self.buffer_bytes = num_buffers, buffer_bytes
        self.ring: Ring | None = None

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.ring is not None:
            self.ring.close()
        self.ring = None

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Any strides and dtypes, one shape. The source may change or go when this returns."""
        if destination.shape != source.shape:
            raise ValueError(f"{tuple(source.shape)} does not fit into {tuple(destination.shape)}")
        if not self.staged or source.device.type != "cpu":
            destination.copy_(source)
            return
        if self.ring is None:
            self.ring = Ring(self.device, self.num_buffers, self.buffer_bytes)
        self.ring.copy(destination, source)


def pieces(destination: Tensor, source: Tensor, most_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in the same parts, none of more than `most_bytes` of the source, in order."""
    if source.numel() == 0:
        return
    if source.numel() * source.itemsize <= most_bytes:
        yield destination, source
        return
    if source.is_contiguous() and destination.is_contiguous():  # not by rows, which need not divide a buffer
        destination, source = destination.view(-1), source.view(-1)
    row_bytes = source[0].numel() * source.itemsize
    if row_bytes > most_bytes:
        for target, row in zip(destination, source, strict=True):
            yield from pieces(target, row, most_bytes)
        return
    at_once = most_bytes // row_bytes
    yield from zip(destination.split(at_once), source.split(at_once), strict=True)
