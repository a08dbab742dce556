"""Options that change what an LLM is: each does something."""

import json
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.errors import ConfigError, InvalidRequest
from tests.engine.conftest import OPTIONS
from tests.tiny_tokenizer import make_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tokens(llm: LLM, prompt: object = "hello") -> list[int]:
    return llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def test_dummy_weights_are_the_same_for_the_same_seed(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    found = []
    for seed in (1, 1, 2):
        options = {"load_format": "dummy", "skip_tokenizer_init": True, "seed": seed}
        with LLM(str(tmp_path), **OPTIONS | options) as llm:
            found.append(llm.generate([[5, 6, 7]], params_of_noise(), use_tqdm=False)[0].outputs[0].logprobs)
    assert found[0] == found[1] != found[2]


def params_of_noise() -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5)


def test_default_sampling_comes_from_the_model_and_can_be_replaced(model_folder: Path) -> None:
    path = model_folder / "generation_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": [2, 7]}))
        with LLM(str(model_folder), **OPTIONS) as llm:
            params = llm.get_default_sampling_params()
            assert (params.temperature, params.top_k) == (0.6, 20)
            assert llm.engine.inputs.eos_token_ids == {2, 7}
        with LLM(str(model_folder), **OPTIONS, override_generation_config={"top_k": 3}) as llm:
            assert (
                llm.get_default_sampling_params().temperature,
                llm.get_default_sampling_params().top_k,
            ) == (0.6, 3)
        with LLM(str(model_folder), **OPTIONS, generation_config="none") as llm:
            assert llm.get_default_sampling_params() == SamplingParams()
    finally:
        path.write_text(before)


def test_keys_of_the_config_can_be_replaced(llm: LLM, model_folder: Path) -> None:
    with LLM(str(model_folder), **OPTIONS, hf_overrides={"rms_norm_eps": 0.5}) as other:
        assert other.spec.norm.eps == 0.5
        assert llm.spec.norm.eps != 0.5


def test_a_tokenizer_from_another_folder(model_folder: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 40)  # fewer characters than the model's own
    (tmp_path / "config.json").write_text("{}")
    with LLM(str(model_folder), **OPTIONS, tokenizer=str(tmp_path)) as llm:
        assert llm.get_tokenizer().vocab_size == 40


def test_without_a_tokenizer_there_are_only_ids(model_folder: Path) -> None:
    with LLM(str(model_folder), **OPTIONS, skip_tokenizer_init=True) as llm:
        assert len(tokens(llm, [[5, 6]])) == 8
        assert llm.generate([[5, 6]], GREEDY, use_tqdm=False)[0].outputs[0].text == ""
        for call in (lambda: tokens(llm, "text"), llm.get_tokenizer):
            with pytest.raises(InvalidRequest, match="skip_tokenizer_init"):
                call()


def test_a_chat_template_by_text_or_file(model_folder: Path, tmp_path: Path) -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    path = tmp_path / "template.jinja"
    path.write_text(source)
    for given in (source, str(path)):
        with LLM(str(model_folder), **OPTIONS, chat_template=given) as llm:
            [output] = llm.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False)
        assert output.prompt == "[hi]"
    with pytest.raises(ConfigError, match="chat_template"):
        LLM(str(model_folder), **OPTIONS, chat_template="nowhere.jinja")


def test_threads_are_what_was_asked_for(model_folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        with LLM(str(model_folder), **OPTIONS, num_threads=1):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_types_change_the_numbers_and_hardly_the_scores(model_folder: Path, llm: LLM) -> None:
    exact = llm.generate("hello", params_of_noise(), use_tqdm=False)[0].outputs[0].logprobs[0]
    with LLM(str(model_folder), **OPTIONS | {"dtype": "bfloat16", "block_size": 16}) as rough:
        near = rough.generate("hello", params_of_noise(), use_tqdm=False)[0].outputs[0].logprobs[0]
    both = exact.keys() & near.keys()
    assert len(both) >= 3
    assert any(exact[t].logprob != near[t].logprob for t in both)
    assert all(abs(exact[t].logprob - near[t].logprob) < 0.5 for t in both)


def test_a_forced_backend_that_cannot_run_says_why(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="multiples of 16"):
        LLM(str(model_folder), **OPTIONS, attention_backend="cpu")  # blocks of 4


def test_the_gap_reaches_the_scheduler(model_folder: Path) -> None:
    with LLM(str(model_folder), **OPTIONS, max_token_gap_ms=30) as llm:
        limits = llm.engine.core.scheduler.limits
        assert limits.max_gap_s == pytest.approx(0.03) and limits.min_prefill_time == 0
        assert len(tokens(llm)) == 8
