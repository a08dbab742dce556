"""Steps of prompts and newest tokens together on a CPU: the network is recorded, once for all numbers of positions.

As in fixed.py, in memory that stays where it is. What is sampled is drawn as after a network of newest tokens. Between
calls of kernels Python takes as long as ten positions; larger steps take so long that it does not matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from quire.runner.fixed import FixedSteps
from quire.runner.layout import Sheet
from quire.runner.recordings import LEAST_ROWS, Recordings
from quire.sampling.sampler import HostSampled
from quire.sampling.slots import Uses
from quire.scheduler.plan import Work

MOST_TOKENS = 512


class ChunkKind(NamedTuple):
    """What a step's kernels depend on: its positions, and of how many of them the output is wanted."""

    num_rows: int
    num_wanted: int


class ChunkSteps:
    """The steps of one runner that are too large for `fixed`, whose recordings and ring they share."""

    def __init__(self, fixed: FixedSteps, recordings: Recordings, most_tokens: int):
        self.fixed, self.recordings, build = fixed, recordings, fixed.model.build
        most_tokens, num_wanted = min(most_tokens, MOST_TOKENS), max(fixed.sizes[-1], LEAST_ROWS + 2)
        self.sheet = Sheet(fixed.state, most_tokens)
        self.most = {"num_rows": most_tokens, "num_wanted": num_wanted}
        self.wanted = torch.zeros(num_wanted, dtype=torch.int64)
        self.hidden = torch.zeros(num_wanted, build.dim, dtype=build.dtype)

    def sample(self, work: Sequence[Work]) -> tuple[tuple[Work, ...], Callable[[], HostSampled]] | None:
        """As `MixedSteps.sample`."""
        fixed, num_tokens = self.fixed, sum(w.count for w in work)
        sampling = tuple(w for w in work if w.samples)
        if num_tokens > self.most["num_rows"] or len(sampling) > fixed.sizes[-1] or fixed.is_more(work):
            return None
        asked = fixed.asked([w.slot for w in sampling])
        kind = ChunkKind(num_tokens, max(len(sampling), LEAST_ROWS))
        replay = self.recordings.sized(kind, self.compute, self.most)
        if asked is None or replay is None:
            return None
        self.sheet.send(sampling, [w for w in work if not w.samples])
        self.sheet.lay_out(num_tokens, len(work))
        some, layout = slice(len(sampling)), self.sheet.layout
        layout.lengths[len(work) :] = 0  # of the other slots, which have none of the step's positions
        layout.query_starts[len(work) + 1 :] = num_tokens
        self.wanted.zero_()
        self.wanted[some] = layout.last_rows[some]
        replay()
        if not sampling:
            return (), lambda: HostSampled([], [], [])
        fixed.rows.place(sampling)
        fixed.hidden[some] = self.hidden[some]
        fixed.inputs.following[some] = layout.following[some]
        fetch = fixed.drawn(len(sampling), asked, Uses(0))
        return None if fetch is None else (sampling, fetch)

    def compute(self, kind: ChunkKind) -> None:
        """The network's calls, for whatever was laid out last, among as many sequences as there are slots."""
        fixed = self.fixed
        layout, ragged = self.sheet.step(kind.num_rows, fixed.state.nobody, mixed=True)
        step = replace(ragged, wanted=self.wanted[: kind.num_wanted])
        self.hidden[: kind.num_wanted].copy_(fixed.model(layout.token_ids, step, fixed.caches))
