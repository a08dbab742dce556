"""A tiny random model with a tokenizer, and an LLM over it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from quire import LLM
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf
from tests.tiny_tokenizer import make_tokenizer

OPTIONS = {"dtype": "float32", "device": "cpu", "block_size": 4, "disable_log_stats": True}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_hf(BY_NAME["Qwen3"], folder)
    make_tokenizer(folder, VOCAB_SIZE)
    return folder


@pytest.fixture(scope="module")
def llm(model_folder: Path) -> Iterator[LLM]:
    with LLM(str(model_folder), **OPTIONS) as llm:
        yield llm
