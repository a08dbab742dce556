"""Steps of a CPU, recorded when they are first needed and replayed by one call: what graphs.py is on a GPU.

What is replayed computes the same bits: it is the same kernels on the same memory, without Python between them. A kind
of step of which torch computes a part cannot be repeated so (kernels/cpu/calls.py).

Where a step is the same calls for all numbers of rows, a few of these are rehearsed, and any is replayed: no number of
rows has to come twice. Elsewhere, and of one row, which torch lays out otherwise, each number is recorded by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from quire.kernels.cpu.calls import Memory, SameMemory, Sized, Step, record, rehearse
from quire.log import logger
from quire.parallel.axis import Axes
from quire.runner.states import StatesLost

LEAST_ROWS = 2  # of steps that are rehearsed


class Recordings:
    """One recording for each kind of step. They share memory for what they compute on the way: one runs at a time."""

    with_masks = True
    with_logprobs = False  # torch computes them, and of equally likely tokens others for another k

    def __init__(self, axes: Axes, *, keeps_states: bool = False) -> None:
        """`axes`: whose ranks compute the steps. `keeps_states`: a step that fails cannot be computed again."""
        self.axes, self.keeps_states = axes, keeps_states
        self.memory = Memory()
        self.steps: dict[Any, Step] = {}
        # By kinds without their sizes, what they are, and threads; None: it is uneven.
        self.rehearsed: dict[tuple[Any, type, int], Sized | None] = {}
        self.refused: dict[Any, str] = {}  # kinds, and what torch computes in them, or an exception

    def close(self) -> None:
        """Let go of all recordings."""
        self.steps, self.rehearsed = {}, {}

    def run(self, kind: Any, compute: Callable[[Any], None], most_rows: int) -> bool:
        """Run `compute(kind)`, whose kernels and memory depend on `kind` alone; False if it is better done otherwise.

        Raises:
            StatesLost: it failed, and has changed states.
            PeerLost: another rank died. Any error may have been met by this rank alone, if there are several.
        """
        if (replay := self.sized(kind, compute, {"num_rows": most_rows})) is not None:
            replay()
            return True
        of = kind, torch.get_num_threads()
        if of in self.steps:
            self.steps[of].replay()
            self.axes.check()
            return True
        if of in self.refused:
            return False
        try:
            with record(self.memory) as step:
                compute(kind)
        except Exception as error:  # of one row perhaps: the ordinary path finds out which
            if self.axes.splits(error):
                raise
            logger.warning("steps of kind %s are not recorded", kind, exc_info=True)
            self.refused[of] = type(error).__name__
            if self.keeps_states:
                raise StatesLost from error
            return False
        if step.refused is None:
            self.steps[of] = step
        else:
            logger.debug("steps of kind %s are not recorded: torch computes %s", kind, step.refused)
            self.refused[of] = step.refused
        return True

    def sized(
        self, kind: Any, compute: Callable[[Any], None], most: Mapping[str, int]
    ) -> Callable[[], None] | None:
        """What does the same as `compute(kind)`, if such steps are the same calls for any sizes up to `most`."""
        sizes = tuple(kind._asdict()[name] for name in most)
        if min(sizes) < LEAST_ROWS or min(most.values()) < LEAST_ROWS + 2:
            return None

        def of(sizes: Sequence[int]) -> Any:
            return kind._replace(**dict(zip(most, sizes, strict=True)))

        # Named tuples of different kinds are equal if what is in them is.
        alike = of([0] * len(most)), type(kind), torch.get_num_threads()
        if alike not in self.rehearsed:
            self.rehearsed[alike] = None
            bounds = (LEAST_ROWS,) * len(most), tuple(most.values())
            try:
                self.rehearsed[alike] = rehearse(
                    *bounds, lambda sizes: compute(of(sizes)), SameMemory(self.memory)
                )
            except Exception as error:  # nothing has been computed: what is wrong comes to light where it is
                logger.debug("steps of kind %s are recorded one by one: %s", alike[0], error)
        found = self.rehearsed[alike]
        return None if found is None else partial(self._replay, found, sizes)

    def _replay(self, step: Sized, sizes: Sequence[int]) -> None:
        step.replay(sizes)
        self.axes.check()
