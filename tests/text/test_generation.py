"""Settings of a checkpoint become sampling values and end tokens."""

from typing import Any

import pytest

from quire.errors import ModelError
from quire.text.generation import default_sampling, end_tokens
from quire.types import SamplingParams


class End:
    """A tokenizer, as far as it matters here."""

    def __init__(self, eos_token_id: int | None):
        self.eos_token_id = eos_token_id


def test_default_sampling() -> None:
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 1,
        "top_k": 20,
        "min_p": None,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "bos_token_id": 1,
    }
    found = default_sampling(generation)
    assert found == {
        "temperature": 0.6,
        "top_p": 1.0,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_tokens": 2048,
    }
    assert SamplingParams(**found).top_k == 20
    assert default_sampling({}) == {}


@pytest.mark.parametrize("value", ["0.6", True, [1]])
def test_default_sampling_refuses_what_is_no_number(value: Any) -> None:
    with pytest.raises(ModelError, match="temperature in generation_config.json is"):
        default_sampling({"temperature": value})


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ({}, {}, None, set()),
        ({"eos_token_id": 2}, {"eos_token_id": 9}, None, {2}),
        ({"eos_token_id": [2, 3]}, {}, End(5), {2, 3, 5}),
        ({}, {"eos_token_id": [4]}, End(None), {4}),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": 6}}, End(6), {6}),
        ({"eos_token_id": []}, {"eos_token_id": 0}, None, {0}),
        ({"eos_token_id": -1}, {}, None, set()),
    ],
)
def test_end_tokens(generation: Any, config: Any, tokenizer: Any, expected: set[int]) -> None:
    assert end_tokens(generation, config, tokenizer) == expected


def test_end_tokens_refuses_what_is_no_id() -> None:
    for value in ("2", 2.0, [True]):
        with pytest.raises(ModelError, match="eos_token_id is"):
            end_tokens({"eos_token_id": value}, {})
