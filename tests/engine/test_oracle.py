"""Every architecture through the whole engine, against Hugging Face: equal log probabilities, equal greedy tokens."""

import random
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.config import Config
from quire.engine.engine import Engine
from quire.errors import ConfigError
from tests.models.case import comparable
from tests.models.cases import BY_NAME, CASES, VOCAB_SIZE, Case, build_hf
from tests.models.values import MAX_LENGTH

NUM_OUTPUTS = 6
TOLERANCE = 2e-4
LARGE = (
    16.0  # logits beyond this have proportionally larger float32 rounding (Gemma's, by its scaled embedding)
)
ENGINE = {"dtype": "float32", "device": "cpu", "skip_tokenizer_init": True, "disable_log_stats": True}
SETTINGS = (  # tokens of a step, so the largest chunk; attention; its block size; prefix caching
    (1, "reference", 4, True),
    (7, "cpu", 16, True),
    (2048, "cpu", 16, True),
    (2048, "reference", 4, False),
)


def make_prompts(vocab_size: int = VOCAB_SIZE, longer_than: int = 0) -> list[list[int]]:
    """Prompts of mixed lengths, sixteen unless short ones are left out; half of them begin alike."""
    rng = random.Random(1)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(18)]
    lengths = [1, 2, 5, 8, 13, 17, 21, 35] * 2
    own = [[rng.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in lengths]
    return [p for p in own[:8] + [shared + tail for tail in own[8:]] if len(p) > longer_than]


def prompts_of(case: Case) -> list[list[int]]:
    """All but those that Hugging Face computes otherwise.

    Longrope rotates by other angles past the original length, and Hugging Face decides anew for each sequence. Its
    RecurrentGemma goes on from what it saw last if a sequence is one token.
    """
    if case.name == "RecurrentGemma":
        return make_prompts(longer_than=1)
    rope = case.values.get("rope_parameters", {})
    original = rope["original_max_position_embeddings"] if "long_factor" in rope else MAX_LENGTH
    return make_prompts(longer_than=original if original < MAX_LENGTH else 0)


@torch.inference_mode()
def reference(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and logits [positions, vocab] of all but the last, by one uncached forward per token."""
    tokens = list(prompt)
    for _ in range(NUM_OUTPUTS):
        logits = model(torch.tensor([tokens])).logits[0]
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], logits


def scores(entries: list[dict], vocab_size: int) -> torch.Tensor:
    return torch.tensor([[entry[token].logprob for token in range(VOCAB_SIZE)] for entry in entries])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_engine_equals_hugging_face(case: Case, tmp_path: Path) -> None:
    model = build_hf(comparable(case), tmp_path)
    prompts = prompts_of(case)
    want = [reference(model, p) for p in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    for chunk, backend, block_size, caching in SETTINGS:
        options = {
            "max_num_batched_tokens": chunk,
            "attention_backend": backend,
            "block_size": block_size,
            "enable_prefix_caching": caching,
        }
        with LLM(str(tmp_path), **ENGINE, **options) as llm:
            for i in (0, len(prompts) // 3, -1):
                alone = llm.generate(prompts[i], greedy, use_tqdm=False)
                assert alone[0].outputs[0].token_ids == want[i][0], f"alone, {options}"
            batch = llm.generate(prompts, greedy, use_tqdm=False)
            again = llm.generate(prompts, greedy, use_tqdm=False)
        for outputs, name in ((batch, "batch"), (again, "again")):
            got = [o.outputs[0].token_ids for o in outputs]
            assert got == [tokens for tokens, _ in want], f"{name}, {options}"
        full_blocks = [
            (len(p) - 1) // block_size * block_size for p in prompts
        ]  # one token is left to compute
        assert [o.num_cached_tokens for o in again] == (full_blocks if caching else [0] * len(prompts))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_log_probabilities_equal_hugging_face(case: Case, tmp_path: Path) -> None:
    model = build_hf(comparable(case), tmp_path)
    prompts = prompts_of(case)
    params = SamplingParams(
        temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True, logprobs=-1, prompt_logprobs=-1
    )
    with LLM(str(tmp_path), **ENGINE, max_logprobs=-1, max_num_batched_tokens=37) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        hits = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, logprobs=-1), use_tqdm=False)
    for prompt, output, hit in zip(prompts, outputs, hits, strict=True):
        tokens, logits = reference(model, prompt)
        logprobs = logits.log_softmax(-1)
        close = TOLERANCE * max(1.0, logits.abs().max().item() / LARGE)
        assert output.outputs[0].token_ids == tokens
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        got = output.prompt_logprobs[1:] + output.outputs[0].logprobs
        torch.testing.assert_close(scores(got, VOCAB_SIZE), logprobs, rtol=TOLERANCE, atol=close)
        first = scores(hit.outputs[0].logprobs[:1], VOCAB_SIZE)
        torch.testing.assert_close(first[0], logprobs[len(prompt) - 1], rtol=TOLERANCE, atol=close)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_who_makes_way_ends_as_if_alone(case: Case, tmp_path: Path) -> None:
    check_who_makes_way(case, tmp_path)


def check_who_makes_way(case: Case, folder: Path, **options: object) -> None:
    """For a more urgent request, in the middle of a prompt and behind it; blocks are found again, or computed again."""
    model = build_hf(comparable(case), folder)
    first, second = [p for p in prompts_of(case) if len(p) > 16][:2]
    want = {"first": reference(model, first)[0], "second": reference(model, second)[0]}
    greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    options = ENGINE | {"max_num_seqs": 1, "max_num_batched_tokens": 8, "block_size": 4} | options
    for num_steps, caching in ((2, False), (6, True)):
        config = Config.of(model=str(folder), **options, enable_prefix_caching=caching)
        engine, got = Engine(config, offline=True), {}
        engine.add(engine.inputs.request(first, greedy, request_id="first", priority=1))
        for _ in range(num_steps):
            engine.step()
        engine.add(engine.inputs.request(second, greedy, request_id="second"))
        while not engine.idle:
            got.update({output.request_id: output for output in engine.step()})
        assert {name: output.outputs[0].token_ids for name, output in got.items()} == want
        assert [got[name].metrics.num_preemptions for name in want] == [1, 0]


def test_longrope_within_the_original_length_takes_the_short_factors(tmp_path: Path) -> None:
    case = BY_NAME["Phi3-long"]
    model = build_hf(case, tmp_path)
    original = case.values["rope_parameters"]["original_max_position_embeddings"]
    prompts = [p for p in make_prompts() if len(p) + NUM_OUTPUTS <= original]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    with LLM(str(tmp_path), **ENGINE, max_model_len=original) as llm:
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [reference(model, p)[0] for p in prompts]


def test_sequences_of_one_chunk_need_no_blocks_of_its_size(tmp_path: Path) -> None:
    model = build_hf(BY_NAME["Llama4-plain"], tmp_path)
    chunked = {"attention_chunk_size": 24}
    prompts = [p for p in make_prompts() if len(p) + NUM_OUTPUTS <= 24]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    with LLM(str(tmp_path), **ENGINE, hf_overrides=chunked, max_model_len=24) as llm:
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [reference(model, p)[0] for p in prompts]
    with pytest.raises(ConfigError, match="block_size is 16; it must divide 24"):
        LLM(str(tmp_path), **ENGINE, hf_overrides=chunked, block_size=16)
