"""Steps in which each work is one sequence's newest token, in memory that stays where it is. Knows no scheduler.

Which slot each row is goes up when it has changed; everything else is on the device, which also counts lengths. Rows
are padded to one of few sizes with nobody's slot. So a step is the same kernels on the same memory each time, and on
CUDA one graph:

    gather | network | logits | draw | advance, which reports to the host
    gather | network | copy of its output      where the sampler must run on the host's numbers, the first half;
                       logits | draw | advance      on a CPU the second, with masks that the host made meanwhile

On a CPU each is a recording, without padding, which would take time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import Cache, Ragged
from quire.grammar.matchers import Allowed
from quire.layers.base import Network
from quire.runner.advance import Inputs, advance, gather
from quire.runner.batch import Batch
from quire.runner.ring import Ring
from quire.runner.rows import Rows
from quire.runner.staging import send
from quire.runner.state import SlotState
from quire.runner.states import StatesLost
from quire.sampling.logprobs import unpack_some
from quire.sampling.sampler import FIXED_LOGPROBS, HostSampled, Sampler
from quire.sampling.slots import Uses
from quire.scheduler.plan import Work

MOST_RECORDED = 64  # rows; with more, a step takes a hundred times as long as Python's part of it
FEW_ROWS, SHORT = 2, 4096  # attention divides so few sequences otherwise if they are short (attention/triton)


def why_not(model: Network, device: torch.device) -> str | None:
    """Why decode steps cannot be CUDA graphs, or None if they can."""
    if device.type != "cuda":
        return f"the device is {device}"
    if not model.backend.capturable:
        return f"attention backend {model.backend.name} waits for the device"
    return None


def sizes_up_to(most: int) -> list[int]:
    """Numbers of rows that steps are padded to: fine where another row costs most, `most` itself the last."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 64)]
    return [*(size for size in sizes if size < most), most]


class Repeated(Protocol):
    """Steps that are computed again by one call: graphs.py, recordings.py."""

    with_logprobs: bool  # whether steps may be whole in which rows ask for log probabilities
    with_masks: bool  # whether what follows the network may be a step of its own, with grammars' masks

    def run(self, kind: Any, compute: Callable[[Any], None], most_rows: int) -> bool:
        """Run `compute(kind)`, whose kernels and memory depend on `kind` alone; False if it was not.

        `most_rows`: of steps of such kinds.

        Raises:
            StatesLost: it failed, and a network that keeps states cannot do it again.
        """
        ...

    def close(self) -> None:
        """Let go of what is kept of them."""


class FixedKind(NamedTuple):
    """What a step's kernels depend on."""

    num_rows: int
    longest: int
    uses: Uses | None  # None: the network alone
    shares: bool  # attention reads what sequences have in common once
    moved: bool = False  # some tokens have other coordinates than their numbers


class DrawKind(NamedTuple):
    """What the kernels depend on that follow a network's alone."""

    num_rows: int
    uses: Uses


class Asked(NamedTuple):
    """What the rows of a step need of their sampling."""

    uses: Uses
    num_logprobs: list[int | None]  # by row; None for none at all


class FixedSteps:
    """The steps of one runner. A method that returns None has not computed its step, which is then done otherwise."""

    def __init__(
        self,
        model: Network,
        caches: Sequence[Cache],
        state: SlotState,
        sampler: Sampler,
        *,
        block_size: int,
        graphs: Repeated,
        sizes: Sequence[int] = (),
    ):
        """`sizes`: numbers of rows that steps are padded to, ascending; those of a GPU by default."""
        self.model, self.caches, self.state, self.sampler = model, caches, state, sampler
        self.block_size, self.graphs = block_size, graphs
        most, device, build = state.nobody, state.tokens.device, model.build

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.sizes = [size for size in sizes or sizes_up_to(most) if size <= most]
        self.rows = Rows(state, block_size, share=model.backend.shares)
        self.inputs = Inputs(
            token_ids=zeros(most),
            positions=zeros(most),
            following=zeros(most),
            slot_mapping=zeros(most),
            query_starts=zeros(most + 1, dtype=torch.int32),
            lengths=zeros(most, dtype=torch.int32),
            tables=zeros(most, state.tables.shape[1], dtype=torch.int32),
        )
        self.coordinates = zeros(most)
        self.hidden = zeros(most, build.dim, dtype=build.dtype)
        self.score_width = 1 + min(FIXED_LOGPROBS, model.spec.vocab_size)
        self.ring = Ring(most * (2 + 2 * self.score_width + 1), device)
        self.steps: dict[FixedKind, tuple[Inputs, Ragged]] = {}
        self.begun: Batch | None = None  # of the latest step of a network alone

    def sample(self, work: Sequence[Work]) -> Callable[[], HostSampled] | None:
        """Start the work's whole step; the returned call waits for its tokens."""
        if not self._fits(work):
            return None
        slots = [w.slot for w in work]
        asked = self.asked(slots)
        if asked is None:
            return None
        kind = self._place(work, asked.uses)
        return self.start(kind, self.compute, kind.num_rows, asked.num_logprobs)

    def asked(self, slots: Sequence[int]) -> Asked | None:
        """What sampling these slots takes, or None where a whole step cannot do it."""
        uses = self.sampler.fixed_uses(slots)
        if uses is None or (uses & Uses.LOGPROBS and not self.graphs.with_logprobs):
            return None
        return Asked(uses, self.sampler.num_logprobs(slots) if uses & Uses.LOGPROBS else [None] * len(slots))

    def start(
        self, kind: Any, compute: Callable[[Any], None], num_rows: int, num_logprobs: Sequence[int | None]
    ) -> Callable[[], HostSampled] | None:
        """Start a step that ends with `finish` for `num_rows` rows; the returned call waits for the first ones."""
        self.ring.make_room()
        if not self.graphs.run(kind, compute, self.sizes[-1]):
            return None
        # Without `self`, whose ring keeps it: a closed engine's memory is free at once, not when cycles are collected.
        return self.ring.started(partial(_read, shape=(num_rows, self.score_width), asked=num_logprobs))

    def finish(self, hidden: Tensor, rows: Tensor, following: Tensor, uses: Uses) -> None:
        """Sample what follows hidden [R, dim] at positions `following` [R] of slots `rows` [R], and report it."""
        state, logits = self.state, self.model.logits(hidden)
        sampled = self.sampler.sample_fixed(logits, rows, following, uses)
        scores = sampled.logprobs[0].pack() if sampled.logprobs else None
        advance(
            *(rows, state.numbers, state.tokens, self.sampler.stops, following),
            *(sampled.token_ids, sampled.bad, scores, self.ring),
        )

    def forward(self, work: Sequence[Work]) -> tuple[Batch, Tensor] | None:
        """Start the network only: the batch and the network's output [rows, dim], both valid until the next step.

        Of a stage before the last the output means nothing.
        """
        if not self._fits(work):
            return None
        kind = self._place(work, None)
        if not self.graphs.run(kind, self.compute, self.sizes[-1]):
            return None
        inputs, ragged = self._step(kind)
        count = len(work)
        batch = Batch(
            work=tuple(work),
            token_ids=inputs.token_ids,
            ragged=ragged,
            starts=np.arange(count + 1),
            sampling=tuple(work),
            last_rows=torch.arange(count, device=self.hidden.device),
            slots=self.rows.slots[:count],
            sample_positions=inputs.following[:count],
        )
        self.begun = batch
        return batch, self.hidden[:count]

    def draw(self, batch: Batch, allowed: Callable[[], Allowed | None]) -> Callable[[], HostSampled] | None:
        """Sample what follows the batch that `forward` has begun; the returned call waits for its tokens.

        `allowed`: waits for what grammars let its rows have.
        """
        if batch is not self.begun or not self.graphs.with_masks:
            return None
        asked = self.asked([w.slot for w in batch.work])
        if asked is None:
            return None
        try:
            return self.drawn(len(batch.work), asked, self.sampler.mask(allowed()))
        except StatesLost:  # none has changed since the network
            return None

    def drawn(self, num_rows: int, asked: Asked, masks: Uses) -> Callable[[], HostSampled] | None:
        """Sample what follows the first rows of `hidden`, whose slots and positions are placed, likewise."""
        kind = DrawKind(num_rows, asked.uses | masks)
        return self.start(kind, self.draw_rows, num_rows, asked.num_logprobs)

    def draw_rows(self, kind: DrawKind) -> None:
        """The launches after a network's."""
        num_rows = kind.num_rows
        rows, following = self.rows.slots[:num_rows], self.inputs.following[:num_rows]
        self.finish(self.hidden[:num_rows], rows, following, kind.uses)

    def is_more(self, work: Sequence[Work]) -> bool:
        """Whether it is more than a network's work on positions one after another, with tokens that are certain."""
        return any(w.drafts or w.slot in self.state.coordinates for w in work)

    def _fits(self, work: Sequence[Work]) -> bool:
        own, prompt_len = self.state.coordinates, self.state.prompt_len
        if own and any(w.slot in own and w.start < prompt_len[w.slot] for w in work):
            return False  # of a prompt with coordinates of its own, which may differ from row to row
        return len(work) <= self.sizes[-1] and all(w.count == 1 and w.samples and not w.drafts for w in work)

    def _place(self, work: Sequence[Work], uses: Uses | None) -> FixedKind:
        """Tell the device whose rows follow."""
        self.rows.place(work)
        own = self.state.coordinates
        offsets = [own[w.slot].offset if w.slot in own else 0 for w in work] if own else []
        if moved := any(offsets):
            at = [w.start + offset for w, offset in zip(work, offsets, strict=True)]
            send(np.array(at), self.coordinates[: len(at)])
        num_rows = next(size for size in self.sizes if size >= len(work))
        longest = self.state.max_length
        if num_rows <= FEW_ROWS and max(w.start for w in work) < SHORT:
            longest = min(longest, SHORT)
        return FixedKind(num_rows, longest, uses, self.rows.shares, moved)

    def _step(self, kind: FixedKind) -> tuple[Inputs, Ragged]:
        """The same objects each time: attention backends know by them that it is the same memory."""
        if kind not in self.steps:
            inputs = self.inputs.first(kind.num_rows)
            ragged = Ragged(
                positions=inputs.positions,
                slot_mapping=inputs.slot_mapping,
                query_starts=inputs.query_starts,
                lengths=inputs.lengths,
                block_tables=inputs.tables,
                rows=self.rows.slots[: kind.num_rows],
                max_query=1,
                max_length=kind.longest,
                shared=self.rows.first(kind.num_rows) if kind.shares else None,
                beside=self.state.beside,
                coordinates=self.coordinates[: kind.num_rows] if kind.moved else None,
            )
            self.steps[kind] = inputs, ragged
        return self.steps[kind]

    def compute(self, kind: FixedKind) -> None:
        """The step's launches, for whatever the device was told last."""
        state, rows, (inputs, ragged) = self.state, self.rows.slots[: kind.num_rows], self._step(kind)
        gather(rows, state.numbers, state.tokens, inputs, self.block_size)
        hidden = self.model(inputs.token_ids, ragged, self.caches)
        if kind.uses is not None:
            self.finish(hidden, rows, inputs.following, kind.uses)
        elif self.model.axes.is_last_stage:
            self.hidden[: kind.num_rows].copy_(hidden)


def _read(words: Tensor, *, shape: tuple[int, int], asked: Sequence[int | None]) -> HostSampled:
    """A report of `advance` for `shape[0]` rows, of which the first belong to somebody."""
    num_rows, count = shape[0], len(asked)
    bad = [flag != 0 for flag in words[num_rows : num_rows + count].tolist()]
    return HostSampled(words[:count].tolist(), bad, unpack_some(words[2 * num_rows :], shape, asked))
