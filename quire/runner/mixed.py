"""Steps of prompts and newest tokens together, in memory that stays where it is, while launching kernels costs most.

As in fixed.py, on CUDA such a step is one graph; the host sends a sheet of numbers with it (layout.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from quire.models.parameters import num_parameters
from quire.models.spec import Decoder as DecoderSpec
from quire.runner.fixed import FixedSteps
from quire.runner.layout import Sheet
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
        self.fixed, self.sheet = fixed, Sheet(fixed.state, most_tokens)
        self.token_sizes, self.seq_sizes = token_sizes(most_tokens), seq_sizes(fixed.state.nobody)

    def sample(self, work: Sequence[Work]) -> tuple[tuple[Work, ...], Callable[[], HostSampled]] | None:
        """Start the work's whole step: what samples, and a call that waits for its tokens. None: not computed."""
        num_tokens = sum(w.count for w in work)
        if num_tokens > self.token_sizes[-1] or self.fixed.is_more(work):
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
        self.sheet.send(sampling, [w for w in work if not w.samples])
        fetch = self.fixed.start(kind, self.compute, kind.num_seqs, asked.num_logprobs)
        return None if fetch is None else (sampling, fetch)

    def compute(self, kind: MixedKind) -> None:
        """The step's launches, for whatever the device was told last."""
        fixed, sheet = self.fixed, self.sheet
        layout, ragged = sheet.step(kind.num_tokens, kind.num_seqs, mixed=kind.mixed)
        sheet.lay_out(kind.num_tokens, kind.num_seqs)
        hidden = fixed.model(layout.token_ids, ragged, fixed.caches)
        rows = sheet.rows[3, : kind.num_seqs]
        fixed.finish(hidden, rows, layout.following, kind.uses)
