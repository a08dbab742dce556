"""Rows do not influence one another, state follows the sequence, and each rule does what it says."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from quire.errors import InvalidRequest
from quire.sampling.sampler import Sampler
from quire.types import SamplingParams
from tests.sampling.remembering import Remembering

VOCAB = 60
PROMPT = (1, 2, 3, 3, 900)  # 900: a placeholder outside the vocabulary

MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.05, "logprobs": 3},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"temperature": 0, "repetition_penalty": 1.2},
    {"logit_bias": {5: 4.0, 6: -100.0}, "logprobs": 0},
    {"allowed_token_ids": list(range(0, 60, 2)), "top_k": 5},
    {"min_tokens": 4},
    {"temperature": 0, "logprobs": -1},
]
BAD_WORDS = ((7,), (10, 11), (12, 12, 13))


def admit(
    sampler: Sampler, slot: int, given: dict[str, Any], seed: int = 1, outputs: Sequence[int] = ()
) -> None:
    bad_words = given.get("bad_token_ids", ())
    params = SamplingParams(**{name: value for name, value in given.items() if name != "bad_token_ids"})
    sampler.admit(
        slot, params, seed=seed, prompt=PROMPT, outputs=outputs, stop_token_ids=(0, 59), bad_words=bad_words
    )


def logits_of(seed: int, position: int) -> torch.Tensor:
    """A row that depends on its sequence and position alone, as a model's would."""
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(1000 * seed + position)) * 2


def sample_one(sampler: Sampler, slot: int, row: torch.Tensor, position: int) -> int:
    sampled = sampler.sample(row[None].clone(), [slot], [position]).to_host()
    assert sampled.bad == [False]
    return sampled.token_ids[0]


def alone(given: dict[str, Any], seed: int, steps: int) -> list[int]:
    sampler = Remembering(VOCAB, 1)
    admit(sampler, 0, given, seed)
    start = len(PROMPT)
    return [sample_one(sampler, 0, logits_of(seed, p), p) for p in range(start, start + steps)]


def test_a_row_is_the_same_in_any_batch_order_and_slot() -> None:
    steps, start = 8, len(PROMPT)
    given = [*MIXED, {"bad_token_ids": BAD_WORDS}, {"temperature": 0, "bad_token_ids": BAD_WORDS}]
    expected = [alone(params, seed, steps) for seed, params in enumerate(given)]
    for shuffle in (1, 2):
        rng = random.Random(shuffle)
        slots = rng.sample(range(20), len(given))
        sampler = Remembering(VOCAB, 20)
        for seed, params in enumerate(given):
            admit(sampler, slots[seed], params, seed)
        found: list[list[int]] = [[] for _ in given]
        while any(len(tokens) < steps for tokens in found):
            open_ = [seed for seed in range(len(given)) if len(found[seed]) < steps]
            batch = rng.sample(open_, rng.randint(1, len(open_)))  # sequences advance at different speeds
            positions = [start + len(found[seed]) for seed in batch]
            logits = torch.stack([logits_of(s, p) for s, p in zip(batch, positions, strict=True)])
            sampled = sampler.sample(logits, [slots[seed] for seed in batch], positions).to_host()
            for seed, token in zip(batch, sampled.token_ids, strict=True):
                found[seed].append(token)
        assert found == expected


@pytest.mark.parametrize("given", [*MIXED, {"bad_token_ids": BAD_WORDS}], ids=str)
def test_a_preempted_sequence_goes_on_as_if_nothing_happened(given: dict[str, Any]) -> None:
    expected = alone(given, 4, 12)
    for cut in (1, 3, 6):
        sampler = Remembering(VOCAB, 3)
        admit(sampler, 2, MIXED[4], 9)  # what the slot held before must not matter
        sampler.release(2)
        admit(sampler, 2, given, 4, expected[:cut])
        start = len(PROMPT) + cut
        found = [sample_one(sampler, 2, logits_of(4, p), p) for p in range(start, start + 12 - cut)]
        assert expected[:cut] + found == expected


def test_admitting_over_a_slot_replaces_everything() -> None:
    sampler = Remembering(VOCAB, 2)
    for given in [*MIXED, *[MIXED[4]] * 9]:  # nine: rows of counts are not lost
        admit(sampler, 0, given, 8)
    admit(sampler, 0, {}, 8)
    start = len(PROMPT)
    assert [sample_one(sampler, 0, logits_of(8, p), p) for p in range(start, start + 5)] == alone({}, 8, 5)


def test_greedy_rows_are_the_argmax_in_any_company() -> None:
    logits = torch.stack([logits_of(0, p) for p in range(len(MIXED))])
    greedy = [
        i for i, given in enumerate(MIXED) if given == {"temperature": 0} or given.get("logprobs") == -1
    ]
    for rows in (greedy, range(len(MIXED))):
        sampler = Remembering(VOCAB, len(MIXED))
        for slot, given in enumerate(MIXED):
            admit(sampler, slot, given)
        sampled = sampler.sample(logits[list(rows)].clone(), list(rows), [5] * len(rows)).to_host()
        tokens = dict(zip(rows, sampled.token_ids, strict=True))
        assert all(tokens[row] == int(logits[row].argmax()) for row in greedy)


def test_bad_rows_fail_alone() -> None:
    given = MIXED[4]
    expected = [alone(given, seed, 3) for seed in range(4)]
    sampler = Remembering(VOCAB, 4)
    for slot in range(4):
        admit(sampler, slot, given, slot)
    for step in range(3):
        position = len(PROMPT) + step
        logits = torch.stack([logits_of(slot, position) for slot in range(4)])
        logits[1, 17] = math.nan
        logits[2] = -math.inf
        sampled = sampler.sample(logits, [0, 1, 2, 3], [position] * 4).to_host()
        assert sampled.bad == [False, True, True, False]
        assert sampled.token_ids == [expected[0][step], 0, 0, expected[3][step]]


def test_nan_is_noticed_where_only_other_tokens_are_allowed() -> None:
    sampler = Remembering(VOCAB, 1)
    admit(sampler, 0, {"allowed_token_ids": [4]})
    row = logits_of(0, 0)
    row[9] = math.nan
    assert sampler.sample(row[None], [0], [5]).to_host().bad == [True]


def test_nothing_left_to_sample_is_bad() -> None:
    sampler = Remembering(VOCAB, 1)
    admit(sampler, 0, {"allowed_token_ids": [7], "bad_token_ids": BAD_WORDS})
    assert sampler.sample(logits_of(0, 0)[None], [0], [5]).to_host().bad == [True]


@pytest.mark.parametrize("temperature", [0, 1])
def test_stop_tokens_wait_for_min_tokens(temperature: float) -> None:
    sampler = Remembering(VOCAB, 1)
    admit(sampler, 0, {"min_tokens": 3, "temperature": temperature})
    row = logits_of(0, 0)
    row[[0, 59]] = torch.tensor([50.0, 20.0])
    found = [sample_one(sampler, 0, row, len(PROMPT) + i) for i in range(5)]
    assert all(token not in (0, 59) for token in found[:3])
    assert found[3:] == [0, 0]


def test_min_tokens_counts_outputs_from_before_a_preemption() -> None:
    sampler = Remembering(VOCAB, 1)
    admit(sampler, 0, {"min_tokens": 3, "temperature": 0}, outputs=[8, 9])
    row = logits_of(0, 0)
    row[0] = 50.0
    found = [sample_one(sampler, 0, row, len(PROMPT) + i) for i in (2, 3)]
    assert found[0] != 0 and found[1] == 0


def test_bad_words_ban_the_last_token_after_the_others() -> None:
    sampler = Remembering(VOCAB, 1)
    admit(sampler, 0, {"temperature": 0, "bad_token_ids": BAD_WORDS})

    def prefer(*tokens: int) -> torch.Tensor:
        row = torch.zeros(VOCAB)
        row[list(tokens)] = torch.arange(len(tokens), 0, -1).float() + 1
        return row

    wishes_and_results = [
        ((7, 8), 8),  # single tokens are never sampled
        ((11, 8), 11),  # no 10 before it
        ((10, 8), 10),
        ((11, 8), 8),  # 10 11 is banned
        ((11, 8), 11),
        ((12, 8), 12),
        ((13, 8), 13),  # one 12 is not enough
        ((12, 8), 12),
        ((12, 8), 12),
        ((13, 8), 8),  # 12 12 13 is banned
        ((13, 8), 13),
    ]
    for step, (wishes, result) in enumerate(wishes_and_results):
        assert sample_one(sampler, 0, prefer(*wishes), len(PROMPT) + step) == result, step


def test_bad_words_look_at_outputs_not_at_the_prompt() -> None:
    row = torch.zeros(VOCAB)
    row[11] = 5.0
    for outputs, banned in (((), False), ((10,), True), ((10, 9), False), ((8, 9, 10), True)):
        sampler = Remembering(VOCAB, 1)
        params = SamplingParams(temperature=0)
        sampler.admit(
            0, params, seed=0, prompt=[10, 10], outputs=outputs, stop_token_ids=[], bad_words=BAD_WORDS
        )
        assert (sample_one(sampler, 0, row, 2 + len(outputs)) == 11) is not banned


def test_only_allowed_tokens_are_sampled() -> None:
    allowed = [3, 30, 31]
    sampler = Remembering(VOCAB, 1)
    admit(sampler, 0, {"allowed_token_ids": [*allowed, 30], "temperature": 2.0})
    found = {sample_one(sampler, 0, logits_of(p, p) * 0.1, p) for p in range(5, 60)}
    assert found == set(allowed)


def test_penalties_count_what_was_sampled() -> None:
    """Greedy with a large presence penalty visits the tokens in order of their logits, each once."""
    sampler = Remembering(VOCAB, 1)
    admit(sampler, 0, {"temperature": 0, "presence_penalty": 2.0})
    row = -torch.arange(VOCAB) * 0.01
    found = [sample_one(sampler, 0, row, len(PROMPT) + step) for step in range(VOCAB)]
    assert found == list(range(VOCAB))


def test_positions_may_be_a_tensor() -> None:
    sampler = Remembering(VOCAB, 2)
    admit(sampler, 0, {"min_tokens": 1})
    admit(sampler, 1, {})
    logits = torch.stack([logits_of(0, 5), logits_of(1, 6)])
    listed = sampler.sample(logits.clone(), [0, 1], [5, 6]).token_ids
    assert torch.equal(sampler.sample(logits.clone(), [0, 1], torch.tensor([5, 6])).token_ids, listed)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"allowed_token_ids": [3, VOCAB]}, "allowed_token_ids"),
        ({"logit_bias": {VOCAB + 3: 1.0}}, "logit_bias"),
        ({"bad_token_ids": [[VOCAB]]}, "bad_words"),
        ({"bad_token_ids": [[1, VOCAB]]}, "bad_words"),
    ],
    ids=str,
)
def test_ids_outside_the_vocabulary_are_refused_and_hurt_nobody(given: dict[str, Any], param: str) -> None:
    sampler = Remembering(VOCAB, 2)
    admit(sampler, 0, {"logprobs": 1}, 8)
    admit(sampler, 1, {"logprobs": 1, "presence_penalty": 1.0, "min_tokens": 5})
    with pytest.raises(InvalidRequest, match=f"{param} has token id .*ends at {VOCAB - 1}") as caught:
        admit(sampler, 1, given)
    assert caught.value.param == param
    # The empty slot may be in the batch that was planned with it.
    logits = torch.stack([logits_of(8, 5), logits_of(1, 5)])
    sampled = sampler.sample(logits, [0, 1], [5, 5]).to_host()
    assert sampled.token_ids[0] == alone({}, 8, 1)[0]
    assert sampled.logprobs[1] is None


def test_many_slots_have_counts_of_their_own() -> None:
    sampler = Remembering(VOCAB, 40)
    for slot in range(40):
        admit(sampler, slot, MIXED[4], slot)
    logits = torch.stack([logits_of(slot, 5) for slot in range(40)])
    tokens = sampler.sample(logits, range(40), [5] * 40).to_host().token_ids
    assert tokens == [alone(MIXED[4], slot, 1)[0] for slot in range(40)]
