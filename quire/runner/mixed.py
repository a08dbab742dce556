"""Steps of prompts and newest tokens together, in memory that stays where it is, while launching kernels costs most.

As in fixed.py, on CUDA such a step is one graph; the host sends a sheet of numbers with it (layout.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import Ragged
from quire.models.parameters import num_parameters
from quire.models.spec import Decoder as DecoderSpec
from quire.runner.fixed import FixedSteps
from quire.runner.layout import SHEET_ROWS, Layout, lay_out
from quire.runner.staging import send
from quire.sampling.sampler import HostSampled
from quire.sampling.slots import Uses
from quire.scheduler.plan import Work

LAUNCH_S, FLOPS = 6e-4, 5e14  # to launch a layer's kernels, and per second in them: measured on an H100
LEAST_TOKENS, MOST_TOKENS = 512, 8192


class MixedKind(NamedTuple):
    """What a step's kernels depend on."""

    num_tokens: int
    num_seqs: int
    mixed: bool  # as in `Ragged`
    uses: Uses


def worthwhile(spec: DecoderSpec) -> int:
    """Tokens up to which launching a step's kernels takes longer than running them; some more cost little memory."""
    weights = num_parameters(spec).active - spec.vocab_size * spec.dim * (1 if spec.tied else 2)
    even = len(spec.blocks) * LAUNCH_S * FLOPS / (2 * weights)
    return min(max(int(even), LEAST_TOKENS), MOST_TOKENS)


def token_sizes(most: int) -> list[int]:
    """Numbers of positions that steps are padded to."""
    sizes = [*range(32, 128, 32), *range(128, 512, 64), *range(512, 2048, 256), *range(2048, most, 512)]
    return [*(size for size in sizes if size < most), most]


def seq_sizes(most: int) -> list[int]:
    """Numbers of sequences that steps are padded to: few, as another one costs no more than a row of logits."""
    return [*(size for size in (1, 8, 32, 128, 256) if size < most), most]


class MixedSteps:
    """The steps of one runner that are too large for `fixed`, whose graphs and ring they share."""

    def __init__(self, fixed: FixedSteps, most_tokens: int):
        self.fixed, state = fixed, fixed.state
        most, device = state.nobody, state.tokens.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.token_sizes, self.seq_sizes = token_sizes(most_tokens), seq_sizes(most)
        self.sheet = zeros(
            SHEET_ROWS, most // 2 * 2 + 2
        )  # even, for rows that are aligned as other tensors are
        self.layout = Layout(
            token_ids=zeros(most_tokens),
            positions=zeros(most_tokens),
            slot_mapping=zeros(most_tokens),
            query_starts=zeros(most + 1, dtype=torch.int32),
            lengths=zeros(most, dtype=torch.int32),
            following=zeros(most),
            last_rows=zeros(most),
            tables=zeros(most, state.tables.shape[1], dtype=torch.int32),
        )
        self.steps: dict[MixedKind, tuple[Layout, Ragged]] = {}

    def sample(self, work: Sequence[Work]) -> tuple[tuple[Work, ...], Callable[[], HostSampled]] | None:
        """Start the work's whole step: what samples, and a call that waits for its tokens. None: not computed."""
        num_tokens = sum(w.count for w in work)
        if num_tokens > self.token_sizes[-1] or any(w.drafts for w in work):
            return None
        if any(w.slot in self.fixed.state.coordinates for w in work):
            return None
        sampling = tuple(w for w in work if w.samples)
        asked = self.fixed.asked([w.slot for w in sampling])
        if asked is None:
            return None
        counts = {w.count for w in work}
        kind = MixedKind(
            num_tokens=next(size for size in self.token_sizes if size >= num_tokens),
            num_seqs=next(size for size in self.seq_sizes if size >= len(work)),
            mixed=1 in counts and len(counts) > 1,
            uses=asked.uses,
        )
        self._send([*sampling, *(w for w in work if not w.samples)], len(sampling))
        fetch = self.fixed.start(kind, lambda: self.compute(kind), kind.num_seqs, asked.num_logprobs)
        return None if fetch is None else (sampling, fetch)

    def _send(self, work: Sequence[Work], num_sampling: int) -> None:
        """Tell the device what to compute. What samples comes first, as in the step's report."""
        count, nobody = len(work), self.fixed.state.nobody
        sheet = np.zeros(self.sheet.shape, np.int64)
        sheet[0], sheet[3] = nobody, nobody
        sheet[0, :count] = slots = [w.slot for w in work]
        sheet[1, :count] = [w.start for w in work]
        ends = np.cumsum([w.count for w in work])
        sheet[2, 1:] = ends[-1]
        sheet[2, 1 : count + 1] = ends
        sheet[3, :num_sampling] = slots[:num_sampling]
        send(sheet, self.sheet)

    def _step(self, kind: MixedKind) -> tuple[Layout, Ragged]:
        """The same objects each time: attention backends know by them that it is the same memory."""
        if kind not in self.steps:
            layout = self.layout.first(kind.num_tokens, kind.num_seqs)
            ragged = Ragged(
                positions=layout.positions,
                slot_mapping=layout.slot_mapping,
                query_starts=layout.query_starts,
                lengths=layout.lengths,
                block_tables=layout.tables,
                rows=self.sheet[0, : kind.num_seqs],
                max_query=kind.num_tokens,
                max_length=self.fixed.state.max_length,
                mixed=kind.mixed,
                beside=self.fixed.state.beside,
            )
            self.steps[kind] = layout, ragged
        return self.steps[kind]

    def compute(self, kind: MixedKind) -> None:
        """The step's launches, for whatever the device was told last."""
        fixed, state = self.fixed, self.fixed.state
        layout, ragged = self._step(kind)
        sheet = self.sheet[:, : kind.num_seqs + 1]
        lay_out(sheet, state.numbers, state.tokens, layout, fixed.block_size)
        hidden = fixed.model(layout.token_ids, ragged, fixed.caches)
        rows = self.sheet[3, : kind.num_seqs]
        fixed.finish(hidden[layout.last_rows], rows, layout.following, kind.uses)
