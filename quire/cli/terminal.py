"""Streams a completion to standard output and says how fast it was. Shared by `run` and `chat`."""

import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.llm import LLM
from quire.types import OutputKind


@dataclass(frozen=True, slots=True)
class Stats:
    """How one completion went; times are seconds from the call."""

    num_input_tokens: int
    num_output_tokens: int
    first_token_s: float
    total_s: float

    def __str__(self) -> str:
        decode_s = self.total_s - self.first_token_s
        speed = f"{(self.num_output_tokens - 1) / decode_s:.1f} tok/s, " if self.num_output_tokens > 1 else ""
        tokens = f"{self.num_input_tokens} tokens in, {self.num_output_tokens} out"
        return f"{tokens}, {speed}first token after {self.first_token_s * 1e3:.0f} ms"


def write_stream(
    llm: LLM, prompt: str, sampling: Mapping[str, Any], *, chat: bool = False
) -> tuple[str, Stats]:
    """Complete `prompt`; `sampling` replaces the model's own defaults. A chat prompt has its special tokens.

    Raises:
        InvalidRequest: the prompt or a value cannot work.
    """
    defaults = llm.get_default_sampling_params()
    params = dataclasses.replace(defaults, **sampling, output_kind=OutputKind.DELTA)
    text, num_input, num_output, first_s = "", 0, 0, 0.0
    start = time.perf_counter()
    for output in llm.stream(prompt, params, add_special_tokens=not chat):
        now = time.perf_counter()
        if output.outputs[0].token_ids and not num_output:
            num_input, first_s = len(output.prompt_token_ids), now - start
        num_output += len(output.outputs[0].token_ids)
        text += output.outputs[0].text
        sys.stdout.write(output.outputs[0].text)
        sys.stdout.flush()
    return text, Stats(num_input, num_output, first_s, time.perf_counter() - start)
