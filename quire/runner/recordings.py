"""Steps of a CPU, recorded when they are first needed and replayed by one call: what graphs.py is on a GPU.

What is replayed computes the same bits: it is the same kernels on the same memory, without Python between them. A kind
of step of which torch computes a part cannot be repeated so (kernels/cpu/calls.py).
"""

from collections.abc import Callable, Hashable

import torch

from quire.kernels.cpu.calls import Memory, Step, record
from quire.log import logger
from quire.parallel.axis import Axes
from quire.runner.states import StatesLost


class Recordings:
    """One recording for each kind of step. They share memory for what they compute on the way: one runs at a time."""

    with_masks = True
    with_logprobs = False  # torch computes them, and of equally likely tokens others for another k

    def __init__(self, axes: Axes, *, keeps_states: bool = False) -> None:
        """`axes`: whose ranks compute the steps. `keeps_states`: a step that fails cannot be computed again."""
        self.axes, self.keeps_states = axes, keeps_states
        self.memory = Memory()
        self.steps: dict[Hashable, Step] = {}
        self.refused: dict[Hashable, str] = {}  # kinds, and what torch computes in them, or an exception

    def close(self) -> None:
        """Let go of all recordings."""
        self.steps = {}

    def run(self, kind: Hashable, compute: Callable[[], None]) -> bool:
        """Run `compute`, whose kernels and memory depend on `kind` alone; False if it is better done otherwise.

        Raises:
            StatesLost: it failed, and has changed states.
            PeerLost: another rank died. Any error may have been met by this rank alone, if there are several.
        """
        kind = kind, torch.get_num_threads()
        if kind in self.steps:
            self.steps[kind].replay()
            self.axes.check()
            return True
        if kind in self.refused:
            return False
        try:
            with record(self.memory) as step:
                compute()
        except Exception as error:  # of one row perhaps: the ordinary path finds out which
            if self.axes.splits(error):
                raise
            logger.warning("steps of kind %s are not recorded", kind[0], exc_info=True)
            self.refused[kind] = type(error).__name__
            if self.keeps_states:
                raise StatesLost from error
            return False
        if step.refused is None:
            self.steps[kind] = step
        else:
            logger.debug("steps of kind %s are not recorded: torch computes %s", kind[0], step.refused)
            self.refused[kind] = step.refused
        return True
