"""Text of networks that also see or hear equals Hugging Face's: logits of each class, and of some all of an engine."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.checkpoint.files import read_config
from quire.checkpoint.reader import Checkpoint
from quire.errors import ModelError, UnsupportedModel
from quire.models.composite import COMPOSITES
from quire.models.hf import HARMLESS
from quire.models.parameters import parameter_shapes
from quire.models.registry import decoder_spec
from tests.engine.test_oracle import ENGINE, NUM_OUTPUTS, reference
from tests.models.cases import prompt
from tests.models.composites import CASES, Composite, build, config_of
from tests.models.published_composites import DEEPSEEK_OCR
from tests.models.test_controls import SAME, far, logits
from tests.models.values import without

QUICK = ("Gemma3", "Qwen2_5_VL-flat")
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
by_case_slowly = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=() if case.id in QUICK else pytest.mark.slow)
        for case in CASES
        if case.name != "PaliGemma"  # whose prompts see themselves whole: see test_spans.py
    ],
)


def test_every_composite_has_a_case() -> None:
    assert {case.described for case in CASES} == set(COMPOSITES)


@by_case
@torch.inference_mode()
def test_text_equals_hugging_face(case: Composite, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, model = prompt(40), build(case, tmp_path)
    theirs = model(input_ids=torch.tensor([tokens])).logits[0]
    with caplog.at_level(logging.WARNING):
        spec, names = decoder_spec(read_config(tmp_path))
    assert [r.message for r in caplog.records if r.name.startswith("quire")] == []
    Checkpoint(tmp_path, names).check(parameter_shapes(spec))
    ours = logits(spec, names, tmp_path, tokens)
    assert far(ours, theirs) < SAME * max(1.0, theirs.abs().max().item() / 4)


@by_case
def test_defaults_are_those_of_hugging_face(case: Composite) -> None:
    """Without any one key of the text, the spec is what Hugging Face makes of that, or an error that names the key."""
    config = json.loads(json.dumps(config_of(case).to_dict())) | {"architectures": [case.architecture]}
    for key in config["text_config"].keys() - {"model_type"}:
        if HARMLESS.fullmatch(key):
            continue
        reduced = config | {"text_config": without(config["text_config"], key)}
        try:
            ours = decoder_spec(reduced)
        except ModelError as error:
            # Too many for so few heads, or sections that are no heads'.
            assert key in str(error) or "key-value heads" in str(error) or "mrope_section" in str(error)
            continue
        full = type(config_of(case)).from_dict(json.loads(json.dumps(reduced)))
        assert ours == decoder_spec(full.to_dict() | {"architectures": [case.architecture]}), key


@by_case_slowly
def test_an_engine_serves_the_text(case: Composite, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In chunks, beside each other, and once more with what is kept of the first time."""
    model = build(case, tmp_path)
    prompts = [prompt(n, seed=n) for n in (1, 9, 40)]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    with caplog.at_level(logging.INFO), LLM(str(tmp_path), **ENGINE, max_num_batched_tokens=17) as llm:
        outputs, again = (llm.generate(prompts, greedy, use_tqdm=False) for _ in range(2))
    want = [reference(model, p)[0] for p in prompts]
    assert [[o.outputs[0].token_ids for o in some] for some in (outputs, again)] == [want, want]
    assert again[-1].num_cached_tokens > 0
    assert sum("only its text is served" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("change", [{"use_mla": True}, {"use_mla": None}])
def test_latent_attention_is_not_what_reads_pages(change: dict[str, bool | None]) -> None:
    config = {key: value for key, value in (DEEPSEEK_OCR | change).items() if value is not None}
    with pytest.raises(UnsupportedModel, match="use_mla=True"):
        decoder_spec(config)


def test_a_text_that_no_family_describes() -> None:
    config = config_of(CASES[0]).to_dict() | {"architectures": [CASES[0].architecture]}
    with pytest.raises(UnsupportedModel, match="model_type is 'rwkv'"):
        decoder_spec(config | {"text_config": config["text_config"] | {"model_type": "rwkv"}})


@pytest.mark.parametrize("name", ["AyaVision", "Cohere2Vision"])
@torch.inference_mode()
def test_logits_are_scaled_as_by_the_class_of_the_text_alone(name: str, tmp_path: Path) -> None:
    """Transformers' classes of the whole leave the scale out, which greedy tokens do not show, but others do."""
    case = next(case for case in CASES if case.id == name)
    scaled = replace(case, text={**case.text, "logit_scale": 0.25})
    tokens, model = prompt(40), build(scaled, tmp_path)
    spec, names = decoder_spec(read_config(tmp_path))
    theirs = model(input_ids=torch.tensor([tokens])).logits[0] * 0.25
    assert far(logits(spec, names, tmp_path, tokens), theirs) < SAME
