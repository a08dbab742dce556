"""Calls of the library's kernels, and steps of them that are kept and made again at once.

A kernel takes the address of its arguments. So a call is a function and some bytes, and what a network does in a step
of so many rows, always in the same memory, can be kept and repeated by one call, as CUDA graphs do it on a GPU. What a
step computes must not depend on anything but the contents of that memory. So a step is refused if torch computes
anything in it itself: only kernels, views and fresh memory are known to be repeated. What it does with other numbers of
rows in the same memory is the same calls with other numbers in them (`Sized`).
"""

import ctypes
import functools
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quire.kernels.cpu.native import load

# Arguments of kernels in the order of the C++ structures of the same names: i int32, q int64, P address, f float32.
FUSED = "6P2q2f3i"  # in several
LAYOUTS = {
    "quire_rms_norm": "3i3P3q2f",
    "quire_add_norm": "3i5P4q2f",
    "quire_norm_rope": "3iP5q4Pfi",
    "quire_act": "3i2P3q2i",
    "quire_embed": "3i3P5qf",
    "quire_linear": "5i7P7q" + FUSED,
    "quire_linear_quantized": "5i5P5q" + FUSED,
    "quire_finish_norm": "3i2P2q" + FUSED,
    "quire_route": "4i4P6qf",
    "quire_experts": "6i12P7q",
    "quire_recurrence": "4i9P11q",
    "quire_causal_conv": "4i7P6q",
    "quire_selective_scan": "2i10P9q",
    "quire_write": "3PqP2q",
    "quire_attend": "3P2qP2fqP2q",
    "quire_gather": "10P6q",
    "quire_advance": "11P7q",
    "quire_elsewhere": "7P6q",
    "quire_pick": "3P4q",
    "quire_copy": "2Pq",
    "quire_draw": "P3q8Pi",
    "quire_draw_together": "2iP3qP3q8Pi3q",
    "quire_exclude": "P3qPqi",
    "quire_penalise": "P2qPqPi",
    "quire_all_reduce": "5iP3q2P3q",
    "quire_all_gather": "2iP3q2P2q",
    "quire_exchange": "2iP3q4P",
}
LOOKS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
ALIGNED = 8  # bytes
LEAST_BYTES = 256  # of memory for a result


class Kernel:
    """A function of the library, called with numbers and addresses."""

    __slots__ = ("address", "function", "pack")

    def __init__(self, library: ctypes.CDLL, name: str):
        self.function = library[name]
        self.function.argtypes, self.function.restype = (ctypes.c_char_p,), None
        self.address = ctypes.cast(self.function, ctypes.c_void_p).value
        self.pack = struct.Struct(LAYOUTS[name]).pack

    def __call__(self, *args: float) -> None:
        packed = self.pack(*args)
        if (step := _recording.step) is not None:
            step.calls.append((self.address, packed))
            if step.is_rehearsal:
                return
        self.function(packed)


@functools.cache
def kernel(name: str) -> Kernel:
    """One of LAYOUTS.

    Raises:
        RuntimeError: there is no library.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(reason)
    return Kernel(library, name)


class Step:
    """Calls in their order. Whoever replays it keeps alive whatever memory it had before."""

    def __init__(self, structures: dict[bytes, ctypes.Structure], *, is_rehearsal: bool = False) -> None:
        self.calls: list[tuple[int | None, bytes]] = []
        self.kept: list[object] = []
        self.refused: str | None = None  # an operation of torch's
        self.structures, self.is_rehearsal = structures, is_rehearsal
        self._replay: Callable[[], None] | None = None

    def refuse(self, operation: str) -> None:
        """Of an operation that torch is about to compute, which a rehearsal must not: it may change what is kept."""
        if self.is_rehearsal:
            raise Uneven(f"torch computes {operation}")
        self.refused = self.refused or operation

    def replay(self) -> None:
        if self._replay is None:
            self._replay = self.joined(self.args())
        self._replay()

    def args(self) -> np.ndarray:
        """Those of all calls, one after another [any] uint64."""
        return np.frombuffer(b"".join(map(_padded, self.calls)), np.uint64).copy()

    def joined(self, args: np.ndarray) -> Callable[[], None]:
        """One call that makes all of them, with such arguments as it finds in `args`."""
        library, _ = load()
        if library is None:
            raise RuntimeError("a step was recorded without a library")
        sizes = (len(_padded(call)) for call in self.calls)
        offsets = np.array([0, *accumulate(sizes)][:-1], np.int64)
        functions = np.array([address for address, _ in self.calls], np.uint64)
        self.kept += (args, offsets, functions)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (functions, args, offsets)]
        return functools.partial(library.quire_replay, *pointers, ctypes.c_int64(len(self.calls)))


def _padded(call: tuple[int | None, bytes]) -> bytes:
    return call[1].ljust(-(-len(call[1]) // ALIGNED) * ALIGNED, b"\0")


class Sized:
    """A step for any sizes, numbers of rows, between those that it was rehearsed with."""

    def __init__(self, step: Step, sizes: Sequence[int], slopes: Sequence[np.ndarray]):
        """`step`: with these sizes. `slopes`: what one more of each adds to its arguments [any] int32."""
        self._step, args = step, step.args()
        self._words, self._replay = args.view(np.int32), step.joined(args)
        self._at = np.flatnonzero(np.any(slopes, axis=0))
        self._slopes = np.stack([slope[self._at] for slope in slopes])
        self._origins = self._words[self._at] - np.array(sizes) @ self._slopes

    def replay(self, sizes: Sequence[int]) -> None:
        self.args_of(sizes)
        self._replay()

    def args_of(self, sizes: Sequence[int]) -> np.ndarray:
        """What is replayed from now on: all arguments [any] int32."""
        self._words[self._at] = self._origins + np.array(sizes) @ self._slopes
        return self._words


class Uneven(Exception):
    """A step is not the same calls for all numbers of rows."""


class _Recording(threading.local):
    step: Step | None = None


_recording = _Recording()


def kept_at(structure: ctypes.Structure) -> int:
    """Its address. Steps that are recorded point to one and the same of those alike, which does not change."""
    if (step := _recording.step) is not None:
        structure = step.structures.setdefault(bytes(structure), structure)
    return ctypes.addressof(structure)


def keep(found: object) -> None:
    """Have the step that is being recorded, if any, keep something alive that its calls point to."""
    if _recording.step is not None:
        _recording.step.kept.append(found)


class Memory:
    """What results of recorded steps are written to, and given to others of them afterwards: one runs at a time."""

    def __init__(self) -> None:
        self.free: dict[int, list[np.ndarray]] = {}
        self.structures: dict[bytes, ctypes.Structure] = {}  # that calls point to, by what is in them

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Like torch.empty; a tensor's memory is free again when nothing views it any more."""
        num_bytes = prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        block, free = self._take(max(LEAST_BYTES, 1 << (num_bytes - 1).bit_length()))
        view = block[:num_bytes]
        weakref.finalize(view, free.append, block)
        return torch.frombuffer(view, dtype=dtype).view(shape)

    def _take(self, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """A block of so many bytes, and where it goes when it is free."""
        blocks = self.free.setdefault(size, [])
        return blocks.pop() if blocks else torch.empty(size, dtype=torch.uint8).numpy(), blocks


class SameMemory(Memory):
    """Gives what a step asked for to the same step with fewer rows, which asks in the same order."""

    def __init__(self, memory: Memory) -> None:
        self.free, self.structures = memory.free, memory.structures
        self.given: list[np.ndarray] = []
        self.turn: Iterator[np.ndarray] | None = None

    def again(self) -> None:
        """Whatever asks next gets what the first one got."""
        self.turn = iter(self.given)

    def _take(self, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
        if self.turn is None:
            block, free = super()._take(size)
            self.given.append(block)
            return block, free
        block = next(self.turn, np.empty(0))
        if block.nbytes < size:
            raise Uneven("it asks for other memory")
        return block, []


class _Recorder(TorchDispatchMode):
    def __init__(self, step: Step, memory: Memory):
        super().__init__()
        self.step, self.memory = step, memory

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, which takes a second, to leave __torch_dispatch__ alone."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            return self.memory.empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if func is torch.ops.aten.copy_.default and _are_alike(*args[:2]):
            kernel("quire_copy")(args[0].data_ptr(), args[1].data_ptr(), args[1].nbytes)
            return args[0]
        if not func.is_view:
            self.step.refuse(func.name())
        result = func(*args, **kwargs)
        if func.is_view and not _is_within(result, args[0]):
            self.step.refuse(func.name())
        return result


class _Watch(TorchFunctionMode):
    """Refuses what looks at numbers and is no operation to torch."""

    def __init__(self, step: Step):
        super().__init__()
        self.step = step

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in LOOKS:
            self.step.refuse(func.__name__)
        return func(*args, **(kwargs or {}))


def _are_alike(to: Tensor, x: Tensor) -> bool:
    """Whether a copy is one of bytes."""
    return (to.shape, to.dtype) == (x.shape, x.dtype) and to.is_contiguous() and x.is_contiguous()


def _is_within(result: Any, x: Tensor) -> bool:
    """Whether all results are parts of x, rather than copies of it."""
    results = result if isinstance(result, list | tuple) else (result,)
    memory = x.untyped_storage().data_ptr()
    return all(one.untyped_storage().data_ptr() == memory for one in results)


@contextmanager
def record(memory: Memory, *, is_rehearsal: bool = False) -> Iterator[Step]:
    """Keep the calls that this thread makes meanwhile, which are made, too; `refused`: if they are not all there is.

    In a rehearsal nothing is computed, and what torch would compute raises Uneven.
    """
    step = _recording.step = Step(memory.structures, is_rehearsal=is_rehearsal)
    try:
        with _Recorder(step, memory), _Watch(step):
            yield step
    finally:
        _recording.step = None


def rehearse(
    least: tuple[int, ...],
    most: tuple[int, ...],
    compute: Callable[[tuple[int, ...]], None],
    same: SameMemory,
) -> Sized:
    """What `compute` does with any sizes between these.

    Raises:
        Uneven: it is not the same calls for all of them, or torch computes a part of it.
    """

    def rehearsed(sizes: tuple[int, ...]) -> Step:
        with record(same, is_rehearsal=True) as step:
            compute(sizes)
        same.again()
        return step

    whole = rehearsed(most)
    functions, highest = [address for address, _ in whole.calls], whole.args().view(np.int32).astype(np.int64)

    def words(sizes: tuple[int, ...]) -> np.ndarray:
        step = rehearsed(sizes)
        if [address for address, _ in step.calls] != functions:
            raise Uneven("other kernels compute more rows")
        return step.args().view(np.int32)

    slopes = []
    for i, (low, high) in enumerate(zip(least, most, strict=True)):
        slope, rest = np.divmod(highest - words((*most[:i], low, *most[i + 1 :])), high - low)
        slopes.append(slope)
        if rest.any():
            raise Uneven("numbers in its calls do not grow evenly with its rows")
    found, middle = (
        Sized(whole, most, slopes),
        tuple((low + high) // 2 for low, high in zip(least, most, strict=True)),
    )
    for sizes in (middle, least):
        if not np.array_equal(words(sizes), found.args_of(sizes)):
            raise Uneven("numbers in its calls do not grow evenly with its rows")
    return found
