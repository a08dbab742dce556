"""Families describe the network whose checkpoint Hugging Face writes, and refuse what they cannot honour."""

import json
import logging
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.checkpoint.files import read_config
from quire.checkpoint.reader import Checkpoint
from quire.errors import ModelError, UnsupportedModel
from quire.models.catalog import VERIFIED
from quire.models.hf import HARMLESS
from quire.models.parameters import kv_bytes_per_token, num_parameters, parameter_shapes
from quire.models.registry import decoder_spec, families, family
from tests.models.case import EARLIEST, IS_EARLIEST, found, is_installed
from tests.models.cases import BY_NAME, CASES, COMPUTED, Case, build_hf, config_of
from tests.models.published import PUBLISHED
from tests.models.refusals import UNSUPPORTED
from tests.models.verified import DOCS, LACKING, as_json, as_page, lacking, written_foreign

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_case
def test_checkpoint_has_exactly_the_parameters(case: Case, tmp_path: Path) -> None:
    model = build_hf(case, tmp_path)
    spec, names = decoder_spec(read_config(tmp_path))
    shapes = dict(parameter_shapes(spec))
    checkpoint = Checkpoint(tmp_path, names)
    checkpoint.check(shapes.items())
    for name, shape in shapes.items():
        assert checkpoint.tensor(name, shape=shape).shape == shape
    checkpoint.finish()
    in_memory = {id(tensor): tensor.numel() for tensor in [*model.parameters(), *model.buffers()]}
    saved = sum(count for key, count in in_memory.items() if key in {id(t) for t in persistent(model)})
    assert sum(map(prod, shapes.values())) == num_parameters(spec).total == saved


def persistent(model: Any) -> list[Any]:
    names = model.state_dict().keys()
    return [
        t
        for n, t in [*model.named_parameters(), *model.named_buffers()]
        if n in names and not COMPUTED.search(n)
    ]


@by_case
def test_defaults_are_those_of_hugging_face(case: Case) -> None:
    """Without any one key, the spec is what Hugging Face makes of that, or an error that names the key."""
    config = config_of(case)
    num_equal = 0
    for key in config:
        if HARMLESS.fullmatch(key):
            continue
        reduced = {other: value for other, value in config.items() if other != key}
        try:
            ours = decoder_spec(reduced)
        except ModelError as error:
            assert key in str(error)
            continue
        try:
            full = found(case.config_class).from_dict(json.loads(json.dumps(reduced)))
        except ZeroDivisionError:  # Hugging Face's own bug for EXAONE 4 without layer_types
            continue
        assert ours == decoder_spec(full.to_dict() | {"architectures": [case.described]}), key
        num_equal += 1
    assert num_equal > 0


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Quire's own: threads that other tests have left may log, too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("quire")]


@by_case
def test_every_key_is_known(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        decoder_spec(config_of(case))
    assert warnings(caplog) == []


@pytest.mark.parametrize("name", ["Phi", "StableLm", "Glm4", "Nemotron", "Persimmon", "Qwen3Next"])
def test_a_part_that_is_rotated_may_be_written_twice(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """As Transformers 5.17 does."""
    config = config_of(BY_NAME[name])
    twice = config | {"partial_rotary_factor": config["rope_parameters"]["partial_rotary_factor"]}
    with caplog.at_level(logging.WARNING):
        assert decoder_spec(twice) == decoder_spec(config)
    assert warnings(caplog) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config, total, max_length, cached = PUBLISHED[name]
    with caplog.at_level(logging.WARNING):
        spec, _ = decoder_spec(config)
    assert num_parameters(spec).total == total
    assert spec.max_length == max_length
    assert kv_bytes_per_token(spec, value_bytes=1) == cached
    assert warnings(caplog) == []


def test_published_facts() -> None:
    specs = {name: decoder_spec(config)[0] for name, (config, *_) in PUBLISHED.items()}
    assert num_parameters(specs["Qwen3-30B-A3B"]).active == 3_353_032_704
    assert num_parameters(specs["Step-3"]).active == 38_841_328_640
    assert num_parameters(specs["Ling-mini-2.0"]).active == 1_432_973_056
    assert specs["GLM-4-9B-chat"].blocks[0].mixer.rope.theta == 5_000_000
    assert specs["Llama-1-7B"].blocks[0].mixer.rope.theta == 10_000
    assert [b.mixer.window for b in specs["gemma-3-1b"].blocks[:7]] == [512] * 5 + [None, 512]
    assert [b.mixer.rope.theta for b in specs["gemma-3-1b"].blocks[4:6]] == [10_000, 1_000_000]
    assert specs["Mistral-7B"].blocks[0].mixer.window == 4096
    assert {b.mixer.window for b in specs["Qwen2.5-7B"].blocks} == {None}
    assert specs["Phi-3-mini-128k"].blocks[0].mixer.window is None  # wider than the context
    assert specs["Phi-3-mini-128k"].blocks[0].mixer.rope.scaling["attention_factor"] == pytest.approx(
        1.1902381
    )
    assert specs["DeepSeek-V3"].blocks[0].mixer.scale == pytest.approx(0.1352337)


@pytest.mark.parametrize(("name", "changes", "word"), UNSUPPORTED)
def test_unsupported_is_refused_by_name(name: str, changes: dict[str, Any], word: str) -> None:
    config = config_of(BY_NAME[name])
    decoder_spec(config)
    with pytest.raises(UnsupportedModel, match=word):
        decoder_spec(config | changes)


WRONG = (
    ({"hidden_size": "128"}, "hidden_size is '128'"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": 2**40}, "vocab_size"),
    ({"num_attention_heads": True}, "num_attention_heads is True"),
    ({"num_key_value_heads": 3}, "multiple of 3 key-value heads"),
    ({"num_attention_heads": 3, "head_dim": None}, "multiple of 3 attention heads"),
    ({"rms_norm_eps": None}, "no rms_norm_eps"),
    ({"hidden_act": 3}, "hidden_act is 3"),
    ({"architectures": []}, "architectures"),
    ({"architectures": None}, "architectures"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0, "factor": 2.0}}, "low_freq_factor"),
    ({"rope_parameters": {"chunked_attention": {"rope_theta": 1.0}}}, "full_attention"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "need 8"),
)


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_wrong_values_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        decoder_spec(config_of(BY_NAME["Llama"]) | changes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(derandomize=True, deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_config_gives_a_spec_or_a_model_error(data: st.DataObject) -> None:
    known = [case for case in CASES if is_installed(case.config_class)]
    config = dict(config_of(data.draw(st.sampled_from(known))))
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(JSON)
    try:
        decoder_spec(config)
    except ModelError as error:
        assert str(error)


def test_unknown_keys_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        decoder_spec(config_of(BY_NAME["Llama"]) | {"attention_chunk_size": 8, "use_mup": False, "beam": 2})
    assert len(caplog.messages) == 1
    assert "LlamaForCausalLM does not know attention_chunk_size=8, beam=2" in caplog.messages[0]


def test_dynamic_scaling_is_exact_within_the_context(caplog: pytest.LogCaptureFixture) -> None:
    plain = config_of(BY_NAME["Llama"])
    scaled = plain | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}}
    with caplog.at_level(logging.WARNING):
        assert decoder_spec(scaled) == decoder_spec(plain)
    assert any("dynamic" in message for message in caplog.messages)


def test_text_config_is_unwrapped() -> None:
    plain = config_of(BY_NAME["Llama"])
    inner = {key: value for key, value in plain.items() if key != "architectures"}
    nested = {"architectures": ["LlamaForCausalLM"], "text_config": inner | {"architectures": ["Inner"]}}
    assert decoder_spec(nested) == decoder_spec(plain)


def test_unknown_architecture_names_the_closest() -> None:
    with pytest.raises(UnsupportedModel, match=r"Llama5ForCausalLM.* closest are Llama"):
        decoder_spec({"architectures": ["Llama5ForCausalLM"]})


def test_what_is_said_to_be_verified_is() -> None:
    """Else `python -m tests.models.verified` is due."""
    assert VERIFIED.read_text() == as_json(written_foreign())
    assert DOCS.read_text() == as_page()


@pytest.mark.skipif(not IS_EARLIEST, reason=f"Transformers is not {EARLIEST}")
def test_what_the_earliest_transformers_lacks_is_said() -> None:
    assert json.loads(LACKING.read_text()) == lacking()


def test_every_family_has_a_case() -> None:
    assert {case.described for case in CASES} == set(families())
    assert all(callable(family(name)) for name in families())


def test_only_the_needed_family_is_imported() -> None:
    code = (
        "import json, sys; from quire.models.registry import decoder_spec;"
        "decoder_spec(json.loads(sys.argv[1]));"
        "print(*(m for m in ('torch', 'quire.models.llama', 'quire.models.gemma') if m in sys.modules))"
    )
    config = json.dumps(config_of(BY_NAME["Llama"]))
    run = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["quire.models.llama"]
