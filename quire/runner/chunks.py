"""Steps of prompts and newest tokens together on a CPU: the network is recorded, once for all numbers of positions.

As in fixed.py, in memory that stays where it is. What is sampled is drawn as after a network of newest tokens. Between
calls of kernels Python takes as long as ten positions; larger steps take so long that it does not matter.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from quire.runner.fixed import FixedSteps
from quire.runner.layout import Sheet
from quire.runner.recordings import Recordings
from quire.sampling.sampler import HostSampled
from quire.sampling.slots import Uses
from quire.scheduler.plan import Work

MOST_TOKENS = 512


class ChunkKind(NamedTuple):
    """What a step's kernels depend on: its positions."""

    num_rows: int


class ChunkSteps:
    """The steps of one runner that are too large for `fixed`, whose recordings and ring they share."""

    def __init__(self, fixed: FixedSteps, recordings: Recordings, most_tokens: int):
        build, self.most_tokens = fixed.model.build, min(most_tokens, MOST_TOKENS)
        self.fixed, self.recordings, self.sheet = fixed, recordings, Sheet(fixed.state, self.most_tokens)
        self.hidden = torch.zeros(self.most_tokens, build.dim, dtype=build.dtype)

    def sample(self, work: Sequence[Work]) -> tuple[tuple[Work, ...], Callable[[], HostSampled]] | None:
        """As `MixedSteps.sample`."""
        fixed, kind = self.fixed, ChunkKind(sum(w.count for w in work))
        sampling = tuple(w for w in work if w.samples)
        if kind.num_rows > self.most_tokens or len(sampling) > fixed.sizes[-1] or fixed.is_more(work):
            return None
        asked = fixed.asked([w.slot for w in sampling])
        replay = self.recordings.sized(kind, self.compute, self.most_tokens)
        if asked is None or replay is None:
            return None
        self.sheet.send(sampling, [w for w in work if not w.samples])
        self.sheet.lay_out(kind.num_rows, fixed.state.nobody)
        replay()
        if not sampling:
            return (), lambda: HostSampled([], [], [])
        some, layout = slice(len(sampling)), self.sheet.layout
        fixed.rows.place(sampling)
        fixed.hidden[some] = self.hidden[layout.last_rows[some]]
        fixed.inputs.following[some] = layout.following[some]
        fetch = fixed.drawn(len(sampling), asked, Uses(0))
        return None if fetch is None else (sampling, fetch)

    def compute(self, kind: ChunkKind) -> None:
        """The network's calls, for whatever was laid out last, among as many sequences as there are slots."""
        fixed = self.fixed
        layout, ragged = self.sheet.step(kind.num_rows, fixed.state.nobody, mixed=True)
        self.hidden[: kind.num_rows].copy_(fixed.model(layout.token_ids, ragged, fixed.caches))
