"""Sampling parameters are checked once, where they are made."""

import pytest

from quire.config import Config
from quire.errors import ConfigError, InvalidRequest
from quire.types import MAX_N, MAX_STOP_STRINGS, BeamSearchParams, SamplingParams

WRONG = {
    "n": [0, MAX_N + 1, 1.5, True],
    "temperature": [-0.1, 2.1, float("nan"), float("inf"), "hot"],
    "top_p": [0, 1.01, -1],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, float("inf")],
    "seed": [2**63, 1.5],
    "max_tokens": [0, -1, 1.5],
    "min_tokens": [-1, 17],
    "logprobs": [-2, 1.5],
    "prompt_logprobs": [-2],
    "stop": [[""], ["x"] * (MAX_STOP_STRINGS + 1), [5], ["x" * 2000]],
    "stop_token_ids": [[-1], ["a"]],
    "allowed_token_ids": [[], [-3]],
    "logit_bias": [{-1: 1.0}, {1: 101.0}, {1: float("nan")}, {"a": 1.0}],
    "bad_words": [[""], ["x"] * 129],
    "output_kind": ["delta"],
}


@pytest.mark.parametrize("name,value", [(n, v) for n, values in WRONG.items() for v in values])
def test_impossible_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_values_are_normalised() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], seed=-1, logprobs=True, temperature=0.001)
    assert (params.stop, params.stop_token_ids, params.seed, params.logprobs) == (("end",), (1, 2), None, 1)
    assert params.temperature == 0.01
    assert SamplingParams(prompt_logprobs=0).skip_reading_prefix_cache is True
    assert SamplingParams().skip_reading_prefix_cache is False


def test_many_greedy_outputs_would_be_equal() -> None:
    with pytest.raises(InvalidRequest, match="temperature is 0"):
        SamplingParams(n=2, temperature=0)


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequest, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize("wrong", [{"beam_width": 0}, {"max_tokens": 0}, {"length_penalty": float("nan")}])
def test_beam_search_parameters_are_checked(wrong: dict) -> None:
    with pytest.raises(InvalidRequest):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3} | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int3"},
        {"gpu_memory_utilization": 0},
        {"gpu_memory_utilization": 1.5},
        {"max_num_seqs": 0},
        {"max_model_len": -5},
        {"block_size": 0},
        {"max_logprobs": -2},
        {"max_token_gap_ms": -1},
        {"num_threads": True},
    ],
)
def test_options_are_checked_by_name(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Config(model="m", **wrong)


def test_an_option_without_a_model_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match="folder of a checkpoint"):
        Config.of(model="")
