"""`quantization` through the whole engine: which weights, how much memory, and the same bits in any company."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.config import Config
from quire.engine.engine import Engine
from quire.errors import ConfigError
from quire.kernels.cpu.products import PackedQuantized
from quire.layers.linear import Linear
from quire.types import TokensPrompt
from tests.attention.test_backends import needs_cpu
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf

BITS = {"int8": 8, "int4": 4}
PROMPTS = [[3 + (7 * i + j * j) % (VOCAB_SIZE - 3) for j in range(1 + 9 * i % 25)] for i in range(9)]
SCORED = SamplingParams(temperature=0.0, max_tokens=36, ignore_eos=True, logprobs=3)


Answers = list[tuple[list[int], list[dict[int, float]]]]  # tokens, and log probabilities of each


def answers(
    folder: str, batches: list[list[list[int]]], blocks: int = 0, **options: Any
) -> tuple[Answers, int]:
    """What each prompt gets, with a cache of so many blocks if that is said; and the number of preemptions."""
    found: Answers = []
    base = {"device": "cpu", "skip_tokenizer_init": True, "block_size": 16, "disable_log_stats": True}
    with LLM(folder, **base | options) as llm:
        block_bytes = llm.config.kv_cache_memory_bytes // llm.engine.core.stats().num_blocks
    if blocks:
        options["kv_cache_memory_bytes"] = blocks * block_bytes
    with LLM(folder, **base | options) as llm:
        for batch in batches:
            prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in batch]
            for output in llm.generate(prompts, SCORED, use_tqdm=False):
                one = output.outputs[0]
                scores = [{t: p.logprob for t, p in step.items()} for step in one.logprobs or ()]
                found.append((one.token_ids, scores))
        return found, llm.engine.core.stats().num_preemptions


@needs_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("name", ["Qwen3", "Qwen3Moe"])
def test_company_pieces_and_cached_prompts_change_no_bit(
    name: str, quantization: str, dtype: str, tmp_path: Path
) -> None:
    build_hf(BY_NAME[name], tmp_path)
    whole = {"use_sliding_window": False}  # behind windows, there would be room for all
    options: dict[str, Any] = {"quantization": quantization, "dtype": dtype, "hf_overrides": whole}
    folder = str(tmp_path)
    want, _ = answers(folder, [[prompt] for prompt in PROMPTS], enable_prefix_caching=False, **options)
    preemptions = 0
    for variant in ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 3}, {"blocks": 8}):
        again, times = answers(
            folder, [PROMPTS, PROMPTS], **options, **variant
        )  # the second time from the cache
        assert again == [*want, *want], variant
        preemptions += times
    assert preemptions > 0


@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Qwen3Moe", "DeepseekV3", "GPT2", "Gemma3"])
def test_networks_are_nearly_what_they_were(name: str, quantization: str, tmp_path: Path) -> None:
    """Probabilities of the next token, for networks that are random and so have little to spare."""
    build_hf(BY_NAME[name], tmp_path)
    chances = []
    for option in ("auto", quantization):
        config = Config.of(
            model=str(tmp_path), device="cpu", dtype="float32", skip_tokenizer_init=True, quantization=option
        )
        engine = Engine(config, offline=True)
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1)
        engine.inputs.max_logprobs = -1
        outputs = []
        for i, prompt in enumerate(PROMPTS):
            engine.add(engine.inputs.request(prompt, params, request_id=str(i)))
        while not engine.idle:
            outputs += [output for output in engine.step() if output.finished]
        steps = [output.outputs[0].logprobs[0] for output in sorted(outputs, key=lambda o: int(o.request_id))]
        chances.append(torch.tensor([[step[t].logprob for t in range(VOCAB_SIZE)] for step in steps]).exp())
    off = 0.5 * (chances[0] - chances[1]).abs().sum(1).mean()  # total variation
    assert 0 < off < {"int8": 0.2, "int4": 0.5}[quantization]


@needs_cpu
@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("name", ["Qwen3", "Qwen3Moe", "DeepseekV3"])
def test_all_products_but_small_ones_are_quantized(name: str, quantization: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    config = Config.of(
        model=str(tmp_path),
        device="cpu",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        quantization=quantization,
    )
    network = Engine(config, offline=True).core.runner.model
    kinds: dict[str, set[int | None]] = {}
    for path, module in network.named_modules():
        if isinstance(module, Linear) and module.weight is not None:
            bits = module.weight.bits if isinstance(module.weight, PackedQuantized) else None
            kinds.setdefault(path.rsplit(".", 1)[-1], set()).add(bits)
    assert kinds.pop("head") == {8}
    assert kinds.pop("gate", {None}) == {None}
    assert kinds and all(found == {BITS[quantization]} for found in kinds.values()), kinds
    stacks = [layer.mlp.experts.stack for layer in network.layers if hasattr(layer.mlp, "experts")]
    assert all(weight.bits == BITS[quantization] for stack in stacks for weight in (*stack.up, *stack.down))


def test_where_it_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match="float16; use dtype bfloat16"):
        Engine(Config.of(model="demo", device="cpu", dtype="float16", quantization="int8"), offline=True)
    with pytest.raises(ConfigError, match="must be one of auto, int8, int4"):
        Config.of(model="demo", quantization="int2")
