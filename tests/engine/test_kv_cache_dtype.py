"""`kv_cache_dtype` through the whole engine: how much memory, the same bits in any company, and who refuses it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire.attention.cpu import Cpu
from quire.attention.groups import cache_layout
from quire.attention.triton.backend import Triton
from quire.config import Config
from quire.engine.engine import Engine
from quire.engine.metrics import Metrics
from quire.errors import ConfigError
from tests.attention.test_backends import needs_cpu
from tests.engine.test_quantization import PROMPTS, Answers, answers
from tests.models.cases import BY_NAME, build_hf

INT8 = {"kv_cache_dtype": "int8"}
NETWORKS = ("Qwen3", "Gemma3", "DeepseekV3")  # grouped heads, windows, values in keys


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name in NETWORKS:
        path: Path = tmp_path_factory.mktemp(name)
        build_hf(BY_NAME[name], path)
        found[name] = str(path)
    return found


def make_engine(folder: str, **options: Any) -> Engine:
    base = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "disable_log_stats": True}
    return Engine(Config.of(model=folder, **base | options), offline=True)


@needs_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_company_pieces_and_cached_prompts_change_no_bit(
    folders: dict[str, str], name: str, dtype: str
) -> None:
    """Positions of a piece see each other's keys and values as the cache keeps them, as later ones do."""
    options = INT8 | {"dtype": dtype, "attention_backend": "cpu"}
    want, _ = answers(folders[name], [[prompt] for prompt in PROMPTS], enable_prefix_caching=False, **options)
    preemptions = 0
    for variant in ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 3}, {"blocks": 8}):
        again, times = answers(folders[name], [PROMPTS, PROMPTS], **options, **variant)
        assert again == [*want, *want], variant
        preemptions += times
    assert preemptions > 0


def first_scores(found: Answers) -> torch.Tensor:
    return torch.tensor([max(scores[0].values()) for _, scores in found])


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_are_nearly_those_of_a_cache_in_the_models_dtype(folders: dict[str, str], name: str) -> None:
    def found(backend: str, kept: str) -> torch.Tensor:
        options = {"attention_backend": backend, "kv_cache_dtype": kept, "dtype": "float32"}
        return first_scores(answers(folders[name], [PROMPTS], **options)[0])

    plain, small = (found("reference", kept) for kept in ("auto", "int8"))
    assert 0 < (plain - small).abs().max() < 0.1
    if Cpu().why_not(torch.float32, torch.device("cpu")) is None:
        torch.testing.assert_close(found("cpu", "int8"), small, rtol=0, atol=2e-3)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu), "reference"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_planned_is_what_is_allocated(folders: dict[str, str], name: str, backend: str) -> None:
    engine = make_engine(folders[name], attention_backend=backend, block_size=32, **INT8)
    runner, num_blocks = engine.core.runner, engine.core.stats().num_blocks
    num_bytes = engine.config.kv_cache_memory_bytes
    num_allocated = runner.caches[0].k.untyped_storage().nbytes()
    small, plain = (
        cache_layout(runner.model.spec, 32, 4, kept, engine.config.max_model_len) for kept in (True, False)
    )
    of_a_block, num_groups = small.block_bytes, 1 + max(small.groups)
    assert num_allocated == num_bytes == num_blocks * of_a_block
    assert of_a_block < 0.4 * plain.block_bytes
    if backend == "cpu":  # whose views hold scales and padding too: nothing is between them but alignment
        views = [view for cache in runner.caches for view in {id(v): v for v in (cache.k, cache.v)}.values()]
        held = sum(view[0].numel() for view in views)
        assert num_groups * of_a_block - 64 * len(views) < held <= num_groups * of_a_block


@needs_cpu
def test_twice_the_tokens_fit(folders: dict[str, str]) -> None:
    tokens = {}
    for kept in ("auto", "int8"):
        engine = make_engine(
            folders["Qwen3"], dtype="bfloat16", kv_cache_dtype=kept, kv_cache_memory_bytes=2**20
        )
        tokens[kept] = engine.core.stats().num_blocks * (engine.config.block_size or 0)
    (width,) = {block.mixer.head_dim for block in engine.core.runner.model.spec.blocks}
    assert tokens["int8"] == pytest.approx(tokens["auto"] * 2 * width / (width + 4), rel=0.02)


def test_metrics_say_what_the_cache_holds() -> None:
    for options, label in (({"dtype": "bfloat16"}, "bfloat16"), ({"dtype": "bfloat16"} | INT8, "int8")):
        metrics = Metrics("m", log_stats=False)
        metrics.configured(Config.of(model="m", **options), 7)
        (info,) = (m for m in metrics.snapshot() if m.name == "vllm:cache_config_info")
        assert info.labels["cache_dtype"] == label


def test_who_cannot_have_it(folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be one of auto, int8"):
        Config.of(model="m", kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match="'triton' cannot run here"):
        make_engine(folders["Qwen3"], attention_backend="triton", **INT8)
    reason = Triton(quantized=True).why_not(torch.bfloat16, torch.device("cuda"))
    assert reason is not None and "kv_cache_dtype auto" in reason
