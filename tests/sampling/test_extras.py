"""Rules and penalties: kernels equal their references, and a fixed step samples what any other does."""

import importlib.util
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.sampling import penalties, rules
from quire.sampling.sampler import FIXED_LOGPROBS, Sampled
from quire.sampling.slots import SlotParams, Uses
from quire.types import SamplingParams
from tests.sampling.remembering import CPU, Remembering

VOCAB, NUM_SLOTS, NUM_PROMPT = 9001, 12, 6  # more than two chunks of any kernel
EVERYWHERE = [0, 1, 31, 32, 2047, 2048, 4095, 4096, 8191, 8192, VOCAB - 1]

RULED: list[dict[str, Any]] = [
    {"logit_bias": {token: 1.5 + i for i, token in enumerate(EVERYWHERE)}},
    {"logit_bias": {7 * i: (i % 9) - 4.0 for i in range(300)}, "min_tokens": 12},
    {"allowed_token_ids": EVERYWHERE, "min_tokens": 2, "repetition_penalty": 1.3},
    {"allowed_token_ids": list(range(0, VOCAB, 3)), "logit_bias": {3: 9.0, 4: 9.0}},
    {"min_tokens": 4, "frequency_penalty": 0.6, "presence_penalty": -0.3},
    {},
    {"repetition_penalty": 0.7},
]
WORDS: list[list[int]] = [[5], [4096], [20, 21], [22, 4097], [21, 22, 8192], [21, 22, 23, 8192], [0, 0, 0, 9]]
WORDS += [[3000 + i, 21, 40 + i] for i in range(300)]


def admitted(sampler: Remembering, given: Sequence[dict[str, Any]], outputs: Sequence[int] = ()) -> None:
    for slot, options in enumerate(given):
        sampler.admit(
            slot,
            SamplingParams(**options),
            seed=slot,
            prompt=[20, 21, 22, 23, 0, 0][:NUM_PROMPT],
            outputs=outputs,
            stop_token_ids=(0, 5000, VOCAB + 2),
            bad_words=WORDS if slot % 3 != 2 else [],
        )


def logits_of(num_rows: int, seed: int = 0) -> Tensor:
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    logits[:, 17] = -math.inf  # as a grammar's mask leaves it
    return logits


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_equal_references() -> None:
    from quire.sampling.triton import penalties as penalty_kernels
    from quire.sampling.triton import rules as rule_kernels
    from tests.interpreter import INTERPRETED

    device = CPU if INTERPRETED else torch.device("cuda")
    for outputs in ([], [0], [21, 22], [3005, 21], [21, 22, 23], [9, 0, 0, 0]):
        sampler = Remembering(VOCAB, NUM_SLOTS, device)
        admitted(sampler, RULED, outputs)
        params: SlotParams = sampler._params
        params.flush()
        kept, nobody = params.kept, NUM_SLOTS
        slots = torch.tensor([6, 0, 5, 1, 4, 2, nobody, 3, nobody, 0], device=device)
        positions = torch.full_like(slots, NUM_PROMPT + len(outputs))
        logits = logits_of(len(slots)).to(device)
        for row in (1, 5, 7):
            logits[row, 50 + row] = math.nan if row == 5 else math.inf
        want, got = logits.clone(), logits.clone()
        rules.restrict.reference(want, slots, positions, sampler.tokens, kept.rules)
        rule_kernels.restrict(got, slots, positions, sampler.tokens, kept.rules.addresses)
        assert torch.equal(got.nan_to_num(9e9), want.nan_to_num(9e9))
        assert not got[[1, 5, 7]].amax(-1).isfinite().any()
        assert torch.equal(got[[2, 6, 8]], logits[[2, 6, 8]])  # no rules, and nobody's
        assert not torch.equal(got[3], logits[3])
        penalties.penalise.reference(want, slots, kept.penalties)
        penalty_kernels.penalise(got, slots, kept.penalties.addresses)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)
        token_ids = torch.arange(len(slots), device=device) * 900
        before = [None if record is None else record.clone() for record in kept.penalties.of]
        penalty_kernels.count(slots, token_ids, kept.penalties.addresses, range(VOCAB))
        for slot, (old, new) in enumerate(zip(before, kept.penalties.of, strict=True)):
            assert (old is None) == (new is None) == (slot not in (2, 4, 6))
            if old is not None and new is not None:
                row = slots.tolist().index(slot)
                old[penalties.HEADER + 900 * row] += 2
                assert torch.equal(old, new)


def test_bad_rows_are_seen_where_their_tokens_are_not_allowed() -> None:
    for value in (math.nan, math.inf):
        sampler = Remembering(VOCAB, 1)
        admitted(sampler, [{"allowed_token_ids": [3, 4]}])
        logits = logits_of(1)
        assert sampler.sample(logits.clone(), [0], [NUM_PROMPT]).bad.tolist() == [False]
        logits[0, 99] = value
        assert sampler.sample(logits, [0], [NUM_PROMPT]).bad.tolist() == [True]


def test_equal_stop_tokens_are_held_once_and_dropped_with_their_last_slot() -> None:
    sampler = Remembering(VOCAB, 3)
    admitted(sampler, [{}, {"min_tokens": 3}, {"ignore_eos": True}])
    stops = sampler.stops
    first, second = stops.records.of[0], stops.records.of[1]
    assert first is not None and first is second and first.tolist() == [2, 0, 5000]
    assert stops.start[:3].tolist() == [NUM_PROMPT, NUM_PROMPT + 2, NUM_PROMPT]
    sampler.release(0)
    sampler.release(1)
    assert stops.records.of[0] is None and stops.records.addresses[:2].tolist() == [0, 0]
    sampler.admit(0, SamplingParams(), seed=0, prompt=[1], outputs=[], stop_token_ids=[], bad_words=[])
    assert stops.records.of[0] is None


FIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"top_p": 0.8},
    {"temperature": 0.0, "logprobs": 2, "logit_bias": {5: 8.0, 6: -100.0}},
    {"logprobs": FIXED_LOGPROBS, "repetition_penalty": 1.3, "min_tokens": 5},
    {"frequency_penalty": 1.0, "allowed_token_ids": [0, 3, 8, 9, 5000]},
    {"temperature": 0.0, "presence_penalty": 2.0},
    {"min_tokens": 3, "temperature": 0.0, "allowed_token_ids": [0, 9]},
]


@pytest.mark.parametrize("kinds", [[0], [0, 1], [0, 2], [3], [4, 1], [5, 6, 0], [2, 3, 6], range(len(FIXED))])
def test_a_fixed_step_samples_what_others_do(kinds: Sequence[int]) -> None:
    """For each mix of what slots use, over steps, with padding and in changing order."""
    given = [FIXED[kind] for kind in kinds]
    plain, fixed = Remembering(VOCAB, len(given)), Remembering(VOCAB, len(given))
    admitted(plain, given)
    admitted(fixed, given)
    chance = random.Random(len(given))
    for step in range(9):
        slots = chance.sample(range(len(given)), len(given))
        position = NUM_PROMPT + step
        logits = logits_of(len(slots), seed=step % 2)  # repeats, so that penalties and phrases matter
        want = plain.sample(logits.clone(), slots, [position] * len(slots))
        uses = fixed.fixed_uses(slots)
        assert uses is not None
        asked = Uses.PENALTIES | Uses.RULES
        assert uses & asked in (Uses(0), asked)
        got = step_of(fixed, logits, slots, position, uses)
        assert got.token_ids[: len(slots)].tolist() == want.token_ids.tolist()
        assert not got.bad.any() and not want.bad.any()
        for group in want.logprobs:
            rows = list(group.rows)
            width = group.logprobs.shape[1]
            assert torch.equal(got.logprobs[0].token_ids[rows, :width], group.token_ids)
            assert torch.equal(got.logprobs[0].logprobs[rows, :width], group.logprobs)
            assert torch.equal(got.logprobs[0].ranks[rows], group.ranks)


def step_of(sampler: Remembering, logits: Tensor, slots: list[int], position: int, uses: Uses) -> Sampled:
    nobody = len(sampler.tokens) - 1
    rows = torch.tensor([*slots, nobody, nobody])
    padding = torch.zeros(2, VOCAB)
    at = torch.where(rows < nobody, position, 1)
    sampled = sampler.sample_fixed(torch.cat((logits, padding)), rows, at, uses)
    sampler.tokens[slots, position] = sampled.token_ids[: len(slots)].int()
    return sampled
