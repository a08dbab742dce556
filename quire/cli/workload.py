"""Random prompts of chosen lengths, and running them with this engine. Knows nothing of what is printed."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from quire.config import Config
from quire.errors import ConfigError, RequestFailed
from quire.models.spec import Spec
from quire.types import SamplingParams, TokensPrompt


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts as token ids, and how many tokens to generate for each, `n` times."""

    prompts: tuple[tuple[int, ...], ...]
    output_lens: tuple[int, ...]
    n: int = 1

    @property
    def input_lens(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    @property
    def num_output_tokens(self) -> int:
        return self.n * sum(self.output_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.input_lens) + self.num_output_tokens

    def cache_waste(self, block_size: int) -> float:
        """Share of allocated cache that holds nothing, over all decode steps: the ends of last blocks."""
        used = allocated = 0
        for prompt, output_len in zip(self.prompts, self.output_lens, strict=True):
            for length in range(len(prompt) + 1, len(prompt) + output_len + 1):
                used += length
                allocated += -(-length // block_size) * block_size
        return 1 - used / allocated


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Lengths to draw workloads from: each length is uniform within `range_ratio` of the given one."""

    input_len: int
    output_len: int
    num_prompts: int
    n: int = 1
    range_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prompts", "n"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"random_range_ratio is {self.range_ratio}; it must be at least 0 and below 1")

    def draw(self, chance: random.Random, vocab_size: int) -> Workload:
        """Prompts of random tokens, which have no common beginnings to cache."""
        inputs, outputs = self.lengths(chance)
        prompts = tuple(tuple(chance.choices(range(vocab_size), k=length)) for length in inputs)
        return Workload(prompts=prompts, output_lens=outputs, n=self.n)

    def lengths(self, chance: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the prompts, and of the outputs."""

        def draw(around: int) -> tuple[int, ...]:
            low, high = int(around * (1 - self.range_ratio)), int(around * (1 + self.range_ratio))
            return tuple(max(1, chance.randint(low, high)) for _ in range(self.num_prompts))

        return draw(self.input_len), draw(self.output_len)


class Backend(Protocol):
    """Something that runs workloads."""

    spec: Spec
    config: Config

    def run(self, work: Workload, *, show: bool) -> float:
        """Generate everything; returns the seconds it took."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Give back the memory."""


class Quire:
    """This engine."""

    def __init__(self, options: Mapping[str, Any]):
        from quire.llm import LLM  # loads torch, which those who only draw lengths do without

        self.llm = LLM(**options)
        self.spec, self.config = self.llm.spec, self.llm.config

    def run(self, work: Workload, *, show: bool) -> float:
        """Greedy for one output each, at temperature 1 for several, which would all be equal otherwise."""
        temperature = 0.0 if work.n == 1 else 1.0
        params = [
            SamplingParams(n=work.n, temperature=temperature, ignore_eos=True, max_tokens=k, detokenize=False)
            for k in work.output_lens
        ]
        prompts = [TokensPrompt(prompt_token_ids=list(p)) for p in work.prompts]
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=show)
        seconds = time.perf_counter() - start
        made = sum(len(o.token_ids) for output in outputs for o in output.outputs)
        if made != work.num_output_tokens:
            raise RequestFailed(
                f"{made} tokens came out and {work.num_output_tokens} were asked for; no speed is given"
            )
        return seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.llm.close()
