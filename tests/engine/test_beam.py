"""Beam search against Hugging Face's `generate`."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from quire import LLM
from quire.types import BeamSearchParams
from tests.engine.conftest import OPTIONS
from tests.models.cases import BY_NAME, build_hf, prompt

WIDTH, NUM_TOKENS = 4, 6


def cut(row: list[int], prompt_len: int, ends: tuple[int, ...]) -> list[int]:
    """Without what follows an end; Hugging Face fills up all rows to one length."""
    for i in range(prompt_len, len(row)):
        if row[i] in ends:
            return row[: i + 1]
    return row


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("ends", [None, (5, 17, 40, 63, 80, 99)], ids=["endless", "ending"])
def test_beams_equal_hugging_face(
    tmp_path: Path, length_penalty: float, ends: tuple[int, ...] | None
) -> None:
    model = build_hf(BY_NAME["Qwen3"], tmp_path)
    prompts = [prompt(n, seed=n) for n in (3, 9, 14)]
    params = BeamSearchParams(
        beam_width=WIDTH, max_tokens=NUM_TOKENS, length_penalty=length_penalty, ignore_eos=ends is None
    )
    with LLM(str(tmp_path), **OPTIONS, skip_tokenizer_init=True) as llm:
        llm.engine.inputs.eos_token_ids = frozenset(ends or ())
        outputs = llm.beam_search(prompts, params)
    model.generation_config = GenerationConfig(
        num_beams=WIDTH,
        num_return_sequences=WIDTH,
        max_new_tokens=NUM_TOKENS,
        length_penalty=length_penalty,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(ends) if ends else None,
    )
    for tokens, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            found = model.generate(
                torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long)
            )
        want = [cut(row, len(tokens), ends or ()) for row in found.tolist()]
        assert [beam.tokens for beam in output.sequences] == want
