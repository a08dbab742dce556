"""Per-slot rules on single tokens: allowed ids, bad words, min_tokens, logit_bias. Knows no probabilities.

Only slots that have any have a record, of int32:

    | header | bit of each of the rank's tokens: it is allowed
             | added: tokens, then what to add before and from `late_from`
             | phrases: their last tokens, then the ones before, right-aligned, ANY before their first

What a row has generated, which decides about phrases, is on the device already.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quire.errors import InvalidRequest
from quire.kernels.dispatch import op
from quire.parallel.vocabulary import Vocabulary
from quire.sampling import cuda
from quire.sampling.records import Records
from quire.types import SamplingParams

ANY = -1  # matches every token


class Header(NamedTuple):
    """How a record begins. `late_from` and `first_output` are positions."""

    late_from: int  # stop tokens may be chosen for positions from here on
    first_output: int  # phrases match outputs only
    num_mask_words: int  # 0: every token is allowed
    num_added: int  # tokens, none twice
    num_phrases: int
    width: int  # most tokens before a phrase's last one


class Parts(NamedTuple):
    """What follows the header."""

    allowed: Tensor  # [num_mask_words] int32, token i's bit is bit i % 32 of word i // 32
    added: Tensor  # [A] int32; these and `lasts` count from the rank's first token
    early: Tensor  # [A] float32
    late: Tensor  # [A] float32
    lasts: Tensor  # [P] int32
    prefixes: Tensor  # [P, W] int32


def record_of(
    params: SamplingParams,
    vocabulary: Vocabulary,
    num_prompt: int,
    num_outputs: int,
    stop_token_ids: Collection[int],
    bad_words: Sequence[Sequence[int]],
) -> np.ndarray | None:
    """A slot's record of this rank's tokens, or None without rules.

    `stop_token_ids` may not be chosen before `params.min_tokens`.

    Raises:
        InvalidRequest: a token id is not in the vocabulary.
    """
    own = vocabulary.own
    _check("allowed_token_ids", params.allowed_token_ids or (), vocabulary.size)
    _check("logit_bias", params.logit_bias or (), vocabulary.size)
    _check("bad_words", [word[-1] for word in bad_words if word], vocabulary.size)
    bans = dict.fromkeys((word[0] for word in bad_words if len(word) == 1), -np.inf)
    always = dict(params.logit_bias or {}) | bans
    early = always | (dict.fromkeys(stop_token_ids, -np.inf) if num_outputs < params.min_tokens else {})
    phrases = [word for word in bad_words if len(word) > 1]
    if not early and not phrases and params.allowed_token_ids is None:
        return None
    early = {token: value for token, value in early.items() if token in own}
    phrases = [word for word in phrases if word[-1] in own]
    mask = _mask(params.allowed_token_ids, own)
    width = max(map(len, phrases), default=1) - 1
    prefixes = [[ANY] * (width + 1 - len(phrase)) + list(phrase[:-1]) for phrase in phrases]
    header = Header(
        late_from=num_prompt + params.min_tokens,
        first_output=num_prompt,
        num_mask_words=len(mask),
        num_added=len(early),
        num_phrases=len(phrases),
        width=width,
    )
    places = [token - own.start for token in early]
    ints = (places, [phrase[-1] - own.start for phrase in phrases], np.array(prefixes).flatten())
    added, lasts, others = (np.array(values, np.int32) for values in ints)
    values = [list(early.values()), [always.get(token, 0.0) for token in early]]
    floats = np.array(values, np.float32).flatten().view(np.int32)
    return np.concatenate((np.array(header, np.int32), mask, added, floats, lasts, others))


@op
def restrict(logits: Tensor, slots: Tensor, positions: Tensor, tokens: Tensor, records: Records) -> None:
    """Apply the rules of `slots` [R] int64 to `logits` [R, own] float32 in place.

    `positions` [R] int64 are the chosen tokens', `tokens` [slots, length] int32 what comes before them. A NaN or
    infinity stays also where it is not allowed: the row's forward pass was wrong, and somebody must say so.
    """
    for row, slot, at in zip(logits, slots.tolist(), positions.tolist(), strict=True):
        if (record := records.of[slot]) is None:
            continue
        header, parts = read(record)
        if header.num_mask_words:
            allowed = _bits(parts.allowed, len(row))
            row.masked_fill_(~allowed & (row < torch.inf), -torch.inf)
        row[parts.added] += parts.early if at < header.late_from else parts.late
        if header.num_phrases:
            newest = torch.full((header.width,), ANY - 1, dtype=torch.int32, device=row.device)
            num = max(min(header.width, at - header.first_output), 0)
            newest[header.width - num :] = tokens[slot, at - num : at]
            hit = ((parts.prefixes == newest) | (parts.prefixes == ANY)).all(-1)
            row[parts.lasts[hit]] += -torch.inf


@restrict.on("cuda", torch.float32)
def restrict_triton(
    logits: Tensor, slots: Tensor, positions: Tensor, tokens: Tensor, records: Records
) -> None:
    """The Triton kernel, where there is triton."""
    if not cuda.restrict(logits, slots, positions, tokens, records.addresses):
        restrict.reference(logits, slots, positions, tokens, records)


def read(record: Tensor) -> tuple[Header, Parts]:
    """A record's parts, slices of it."""
    header = Header(*record[: len(Header._fields)].tolist())
    num_added, num_phrases, width = header.num_added, header.num_phrases, header.width
    sizes = [header.num_mask_words, *[num_added] * 3, num_phrases, num_phrases * width]
    allowed, added, early, late, lasts, prefixes = record[len(header) :].split(sizes)
    floats = early.view(torch.float32), late.view(torch.float32)
    return header, Parts(allowed, added, *floats, lasts, prefixes.view(num_phrases, width))


def _check(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{name} has token id {token}; the vocabulary ends at {vocab_size - 1}", param=name
            )


def _mask(allowed: Sequence[int] | None, own: range) -> np.ndarray:
    if allowed is None:
        return np.zeros(0, np.int32)
    bits = np.zeros(-(-len(own) // 32) * 32, np.uint8)
    bits[[token - own.start for token in allowed if token in own]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _bits(words: Tensor, count: int) -> Tensor:
    """The first bits of `words` as booleans [count]."""
    bits = np.unpackbits(words.cpu().numpy().view(np.uint8), count=count, bitorder="little")
    return torch.from_numpy(bits).to(words.device, torch.bool)
