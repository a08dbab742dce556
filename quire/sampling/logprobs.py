"""Log probabilities that requests ask for: of the chosen token and the k likeliest. Knows no parameters.

They are the log-softmax of the logits as they came, before rules, penalties, temperature and filters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels.dispatch import op
from quire.parallel.vocabulary import Vocabulary
from quire.sampling import cuda
from quire.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of Q rows that ask for the same k. Column 0 is the chosen token, column i the i-th likeliest."""

    rows: tuple[int, ...]  # their indices in the batch
    token_ids: Tensor  # [Q, 1 + k] int64
    logprobs: Tensor  # [Q, 1 + k] float32
    ranks: Tensor  # [Q] int32, of the chosen: 1 + how many tokens are likelier

    def to_lists(self) -> list[TokenLogprobs]:
        """Plain values for each row, in one transfer."""
        return unpack(self.pack().cpu(), [self.shape])

    @property
    def shape(self) -> tuple[int, int]:
        """(Q, 1 + k)"""
        return (self.token_ids.shape[0], self.token_ids.shape[1])

    def pack(self) -> Tensor:
        """All values in one int32 tensor [Q * (2 * (1 + k) + 1)]; the floats keep their bits."""
        floats = self.logprobs.contiguous().view(torch.int32)
        return torch.cat((self.token_ids.flatten().int(), floats.flatten(), self.ranks))


def unpack(packed: Tensor, shapes: Sequence[tuple[int, int]]) -> list[TokenLogprobs]:
    """The rows of several `Logprobs.pack()` joined in one tensor on the host, given their `shape`."""
    found: list[TokenLogprobs] = []
    start = 0
    for shape in shapes:
        ids, floats, ranks = _parts(packed[start:], shape)
        start += shape[0] * (2 * shape[1] + 1)
        found += map(_report, ids.tolist(), floats.tolist(), ranks.tolist())
    return found


def unpack_some(
    packed: Tensor, shape: tuple[int, int], asked: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """The first rows of one `Logprobs.pack()` on the host, each with no more than `asked` likeliest tokens."""
    if all(k is None for k in asked):
        return [None] * len(asked)
    parts = [part[: len(asked)].tolist() for part in _parts(packed, shape)]
    return [
        None if k is None else _report(ids[: 1 + k], floats[: 1 + k], rank)
        for k, ids, floats, rank in zip(asked, *parts, strict=True)
    ]


def _parts(packed: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and log probabilities [Q, 1 + k] and ranks [Q] of a `Logprobs.pack()` on the host."""
    num_rows, size = shape[0], shape[0] * shape[1]
    ids, floats = packed[:size], packed[size : 2 * size].view(torch.float32)
    return ids.view(shape), floats.view(shape), packed[2 * size : 2 * size + num_rows]


def _report(ids: list[int], logprobs: list[float], rank: int) -> TokenLogprobs:
    """Drops the second mention of the chosen token, so that ids are unique."""
    others = [i for i in range(1, len(ids)) if ids[i] != ids[0]]
    return TokenLogprobs(
        [ids[0], *(ids[i] for i in others)], [logprobs[0], *(logprobs[i] for i in others)], [rank, *others]
    )


@op
def score(logits: Tensor, chosen: Tensor, k: int, vocabulary: Vocabulary) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and log probabilities [Q, 1 + k] and ranks [Q] as in `Logprobs`, for everybody's `logits` [Q, own]."""
    tokens = vocabulary.own
    greatest = vocabulary.greatest(logits.amax(-1))[:, None]
    # As log_softmax rounds: subtracting the logarithm of the sum last keeps precision when logits are large.
    log_sum = vocabulary.total((logits - greatest).exp_().sum(-1))[:, None].log_()
    at = (chosen - tokens.start)[:, None]
    own = logits.gather(1, at.clamp(0, len(tokens) - 1))
    own = vocabulary.greatest(torch.where((at >= 0) & (at < len(tokens)), own, -torch.inf)[:, 0])[:, None]
    ids, values = chosen[:, None], own
    if k:
        top = vocabulary.likeliest(logits, k)
        ids, values = torch.cat((ids, top[1]), 1), torch.cat((values, top[0]), 1)
    ranks = vocabulary.total((logits > own).sum(-1, dtype=torch.int32)) + 1
    return ids, values - greatest - log_sum, ranks


@score.on("cuda", torch.float32)
def score_triton(
    logits: Tensor, chosen: Tensor, k: int, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton kernels, where there is triton."""
    found = cuda.score(logits, chosen, k) if vocabulary.axis.size == 1 else None
    return found or score.reference(logits, chosen, k, vocabulary)


def compute(logits: Tensor, chosen: Tensor, k: int, rows: Sequence[int], vocabulary: Vocabulary) -> Logprobs:
    """Log probabilities of `chosen` [Q] and of the k likeliest tokens (-1: all) under raw `logits` [Q, own]."""
    k = vocabulary.size if k < 0 else min(k, vocabulary.size)
    return Logprobs(tuple(rows), *score(logits.float(), chosen, k, vocabulary))


def prompt_logprobs(logits: Tensor, next_token_ids: Tensor, k: int, vocabulary: Vocabulary) -> Logprobs:
    """Log probabilities of the tokens that follow in a prompt, for a chunk of N positions.

    `logits` [N, own] are the model's at those positions, `next_token_ids` [N] (int64) the prompt's tokens after
    them, `k` as in `SamplingParams.prompt_logprobs`.
    """
    return compute(logits, next_token_ids, k, range(len(next_token_ids)), vocabulary)
