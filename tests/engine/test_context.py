"""Ranks that share out a sequence's tokens: the tokens of one process, from a cache of as many times as many."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from quire.errors import ConfigError
from tests.engine.test_ranks import check_tokens, llm, make_engine, outputs
from tests.engine.test_ticks import check_losses, config
from tests.models.cases import BY_NAME, build_hf

TWO = {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
ONE_HEAD = {"num_key_value_heads": 1}
CASES = {
    "dense": replace(BY_NAME["Qwen3"], values=BY_NAME["Qwen3"].values | ONE_HEAD),
    "two heads": BY_NAME["Qwen3"],
    "experts": replace(
        BY_NAME["Qwen2Moe"], values=BY_NAME["Qwen2Moe"].values | ONE_HEAD | {"sliding_window": 8}
    ),
    "latent": BY_NAME["DeepseekV3"],
    "chosen": BY_NAME["DeepseekV32"],
    "sinks": replace(BY_NAME["GptOss"], values=BY_NAME["GptOss"].values | ONE_HEAD | {"sliding_window": 4}),
    "chunks": replace(BY_NAME["Llama4"], values=BY_NAME["Llama4"].values | ONE_HEAD),
    "states": replace(BY_NAME["Qwen3Next"], values=BY_NAME["Qwen3Next"].values | ONE_HEAD),
    "beside states": BY_NAME["FalconH1"],
    "odd window": BY_NAME["Qwen2Moe"],
    "no keys": BY_NAME["Mamba"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in CASES}
    for name, folder in found.items():
        build_hf(CASES[name], folder)
    return found


@pytest.mark.parametrize(
    ("name", "size", "parts"),
    [
        ("dense", 2, 2),
        ("experts", 2, 2),
        ("latent", 2, 2),
        ("chosen", 2, 2),
        pytest.param("sinks", 2, 2, marks=pytest.mark.slow),
        pytest.param("chunks", 2, 2, marks=pytest.mark.slow),
        pytest.param("experts", 4, 4, marks=pytest.mark.slow),
        pytest.param("chosen", 4, 4, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_one_process(folders: dict[str, Path], name: str, size: int, parts: int) -> None:
    check_tokens(folders[name], size, 4, parts)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_each_rank_may_be_lost_under_load(folders: dict[str, Path], number: int) -> None:
    check_losses(config(folders["latent"], **TWO), number)


@pytest.mark.parametrize(
    "options", [{"kv_cache_dtype": "int8"}, {"block_size": 6, "max_num_batched_tokens": 9}]
)
@pytest.mark.parametrize("name", ["states", pytest.param("latent", marks=pytest.mark.slow)])
def test_other_options_and_mixers(folders: dict[str, Path], name: str, options: dict[str, object]) -> None:
    common = {
        "block_size": 4,
        "attention_backend": "reference",
        "max_model_len": 48,
        "max_num_seqs": 8,
    } | options
    alone = make_engine(folders[name], **common)
    engine = make_engine(folders[name], **common, **TWO)
    try:
        want, got = outputs(alone), outputs(engine)
        assert got[0] == want[0]
        assert got[2] == want[2] > 0, "hits"
    finally:
        engine.close()


@pytest.mark.parametrize(("name", "parts"), [("latent", 2), pytest.param("dense", 2, marks=pytest.mark.slow)])
def test_a_cache_holds_as_many_times_as_many_tokens(folders: dict[str, Path], name: str, parts: int) -> None:
    """Of ranks that would each have held the same keys, in the same memory."""
    memory = {"kv_cache_memory_bytes": 200_000, "tensor_parallel_size": 2, "enable_prefix_caching": False}
    held = []
    for size in (1, parts):
        with llm(folders[name], decode_context_parallel_size=size, **memory) as found:
            held.append(found.engine.core.stats().num_blocks * (found.config.block_size or 0))
    assert 0.9 * parts < held[1] / held[0] < 1.1 * parts


@pytest.mark.slow
def test_whole_experts_are_spread_over_these_ranks_too(folders: dict[str, Path]) -> None:
    alone = make_engine(folders["experts"], block_size=4)
    engine = make_engine(folders["experts"], block_size=4, **TWO, enable_expert_parallel=True)
    try:
        assert outputs(engine)[0] == outputs(alone)[0]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dense", {"decode_context_parallel_size": 0}, "is 0; it must be at least 1"),
        ("dense", {"decode_context_parallel_size": 3}, "is 3; it must divide tensor_parallel_size, 2"),
        ("two heads", {}, "2 heads of keys.*held by 1 of tensor_parallel_size 2.*multiple of 4"),
        ("odd window", {}, "held by 1"),
        ("odd window", {"tensor_parallel_size": 4}, "window of 5 positions, of which 2 ranks.*divisor of 5"),
        ("chunks", {"block_size": 12}, "chunk of 16 positions, which the 12"),
        ("beside states", {}, "every rank computes whole"),
        ("no keys", {}, "keeps no keys"),
        (
            "dense",
            {"block_size": 5},
            "block_size is 5; it must be a multiple of decode_context_parallel_size, 2",
        ),
        ("dense", {"attention_backend": "cpu"}, "does not say how much a part"),
        ("dense", {"deterministic": True}, "reference: with deterministic"),
        ("dense", {"model_impl": "transformers"}, "modules are not run"),
    ],
)
def test_what_cannot_be_is_refused(
    folders: dict[str, Path], name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message), llm(folders[name], **TWO | options):
        pass
