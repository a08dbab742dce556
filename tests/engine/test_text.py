"""The text half of an engine: the same with and without the device half, and without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from quire.checkpoint.source import resolve as find_model
from quire.config import Config
from quire.engine.build import build, build_core
from quire.engine.text import build_inputs, read_text
from quire.errors import InvalidRequest, ModelError
from quire.types import SamplingParams

CODE = """
import sys
from quire.config import Config
from quire.engine import wire
from quire.engine.text import build_inputs
inputs = build_inputs(Config(model="demo"), vocab_size=4096, max_model_len=2048)
request = inputs.request("What is the capital of France?", inputs.default_params(), request_id="r")
sent = wire.Channel(None).encode(wire.Add(inputs.submission(request)))
print(len(request.prompt_token_ids), "torch" in sys.modules, len(sent) > 0)
"""


def test_it_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    count, torch, sent = done.stdout.split()
    assert int(count) > 3 and (torch, sent) == ("False", "True"), done.stderr


def test_both_halves_together_are_the_same_as_apart() -> None:
    config = Config(model="demo", max_model_len=128, override_generation_config={"temperature": 0.25})
    inputs, parts = build(config, read_text(config), offline=True)
    assert parts.max_model_len == 128 and inputs.vocab_size == parts.spec.vocab_size
    apart = build_inputs(parts.config, vocab_size=parts.spec.vocab_size, max_model_len=parts.max_model_len)
    for which in (inputs, apart):
        assert which.default_params().temperature == 0.25 and which.max_length == 128
    prompt = inputs.chat_prompt([{"role": "user", "content": "hi"}], None)
    asked = [each.request(prompt, SamplingParams(), request_id="r") for each in (inputs, apart)]
    assert inputs.submission(asked[0]) == apart.submission(asked[1])


def test_the_device_half_reads_no_tokenizer(tmp_path: Path) -> None:
    folder = find_model("demo").folder
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "tokenizer.json").write_text("no tokenizer")
    config = Config(model=str(tmp_path))
    assert build_core(config, offline=True).spec.vocab_size == 4096
    with pytest.raises(ModelError, match="tokenizer"):
        build_inputs(config, vocab_size=4096, max_model_len=2048)


def test_a_salt_that_is_no_text_is_refused() -> None:
    inputs = build_inputs(Config(model="demo"), vocab_size=4096, max_model_len=2048)
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        inputs.request({"prompt": "hi", "cache_salt": "\ud800"}, SamplingParams(), request_id="r")
