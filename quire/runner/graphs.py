"""CUDA graphs of steps: captured when they are needed again, and replayed. Knows no batches and no networks."""

from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch

from quire.log import logger
from quire.parallel.axis import Axes
from quire.runner.pieces import CALM_STEPS
from quire.runner.states import StatesLost

NEVER = 1 << 60

Kind = TypeVar("Kind", bound=Hashable)


class Graphs:
    """One graph for each kind of step, all in one pool of memory: they run one after another.

    A kind runs uncaptured the first time, for Triton and cuBLAS to get ready; the second time it is captured. What
    cannot be captured runs without a graph, and what has no memory for it is tried again after a while.
    """

    with_logprobs = True
    with_masks = False  # whose memory is the host's

    def __init__(self, axes: Axes | None = None, *, capture: bool = True, keeps_states: bool = False):
        """`axes`: whose ranks compute the steps, each with graphs of its own: all have one of a kind, or none has.

        `capture`: False to run every step uncaptured, as machines without CUDA do in tests. `keeps_states`: steps
        change more than their last kernel does.
        """
        self.axes, self.capture, self.keeps_states = axes or Axes(), capture, keeps_states
        self.captured: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.ready: set[Hashable] = set()
        self.num_refused = 0  # steps for which no further kind is tried
        self.has_failed = False
        self.pool: Any = None  # of memory, by torch's handle
        self.stream: torch.cuda.Stream | None = None  # nothing runs there; the default one cannot be captured

    def run(self, kind: Kind, compute: Callable[[Kind], None], most_rows: int) -> bool:
        """Run `compute(kind)`, whose kernels and memory depend on `kind` alone; False if that was not possible.

        Then it has changed nothing that another attempt would not overwrite: its last kernel is the one that counts.

        Raises:
            StatesLost: it was not possible, and has changed states.
            RuntimeError: it was not possible, perhaps on this rank alone, which cannot go on as if on all.
        """
        if (graph := self.captured.get(kind)) is not None:
            graph.replay()
            return True
        if self.num_refused:
            self.num_refused -= 1
            return False
        if kind in self.ready and self.capture:
            return self._run_captured(kind, partial(compute, kind))
        try:
            compute(kind)
        # What it is, of a driver, a compiler or a library: steps are slower without graphs, not wrong.
        except Exception as error:
            if self.axes.splits(error):
                raise
            self._refuse(_calm(error), error)
            if self.keeps_states:
                raise StatesLost from error
            return False
        self.ready.add(kind)
        return True

    def close(self) -> None:
        """Let go of all graphs."""
        self.captured, self.ready, self.pool = {}, set(), None

    def _run_captured(self, kind: Hashable, compute: Callable[[], None]) -> bool:
        graph, failure = None, None
        try:
            graph = self._capture(compute)
        except Exception as error:  # as above, but nothing has run
            failure = error
        calm = self.axes.most(0 if failure is None else _calm(failure), torch.device("cuda"))
        if graph is None or calm:
            self._refuse(calm, failure)
            return False
        self.captured[kind] = graph
        graph.replay()
        return True

    def _refuse(self, num_steps: int, error: Exception | None) -> None:
        """Compute no further kind for so many steps. No error: another rank's."""
        if not self.has_failed:
            logger.warning("decode steps go on without new CUDA graphs, and slower", exc_info=error)
        self.has_failed = True
        self.num_refused = num_steps
        if not self.captured:
            self.pool = None  # torch takes a pool back that has lost its last graph

    def _capture(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph(), which collects garbage and returns torch's free memory: 0.1 s in a running engine.
        self.stream = self.stream or torch.cuda.Stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self.stream):
                # Threads of others may allocate meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    compute()
                finally:
                    graph.capture_end()
        except Exception:
            # A capture that CUDA has ended leaves torch's allocator waiting for its end: it could not return free
            # memory any more, which it must when memory runs out.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            raise
        return graph


def _calm(error: Exception) -> int:
    """Steps after which a kind is tried again that failed so."""
    return CALM_STEPS if isinstance(error, torch.OutOfMemoryError) else NEVER
