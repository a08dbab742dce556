"""`LLM`: offline generation in the caller's process."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quire.config import Config
from quire.engine.beam import beam_search
from quire.engine.engine import Engine
from quire.engine.metrics import Counter, Gauge, Histogram
from quire.errors import InvalidRequest
from quire.models.spec import Spec
from quire.text.chat import ChatTemplate
from quire.text.detokenize import Detokenizer
from quire.text.tokenizer import Tokenizer
from quire.text.tools.events import Answer, answer
from quire.types import (
    BeamSearchOutput,
    BeamSearchParams,
    OutputKind,
    Prompt,
    Request,
    RequestOutput,
    SamplingParams,
    Turn,
)

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model in this process. Use it as a context manager, or call `close` when done.

    Args:
        model: folder of a Hugging Face checkpoint, or a Hugging Face id, or "demo".
        options: any field of `quire.config.Config`.

    Raises:
        ConfigError: an option is unknown or cannot work.
        ModelError: the model is unknown, or its files are missing or damaged.
        CapacityError: the machine has too little memory.
    """

    def __init__(self, model: str, **options: Any):
        self.engine = Engine(Config.of(model=model, **options), offline=True)
        self.numbers = itertools.count()

    @property
    def config(self) -> Config:
        """Every option, derived ones filled in."""
        return self.engine.config

    @property
    def spec(self) -> Spec:
        """What the network is."""
        return self.engine.spec

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, many at once; outputs are in the order of the prompts.

        Args:
            prompts: text, token ids, or a dict with either; or a list of these.
            sampling_params: one for all or one for each; None takes the model's defaults.
            use_tqdm: show progress and tokens per second on standard error.
            priority: one for each prompt; lower runs first.

        Raises:
            InvalidRequest: a prompt or its parameters cannot work; nothing has been computed then.
        """
        many = _as_list(prompts)
        return self._run([(prompt, None) for prompt in many], sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them; `answers` reads reasoning and calls of tools.

        Calls of `tools` fit their schemas, as far as the model's format of calls is known.

        Raises:
            InvalidRequest: as `generate`, or messages that the template refuses.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        template = None if chat_template is None else ChatTemplate.of(self.get_tokenizer(), chat_template)
        turns = [
            self.engine.inputs.turn(
                conversation,  # type: ignore[arg-type]
                template,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self._run(turns, sampling_params, use_tqdm, priority)

    def answers(self, output: RequestOutput, tools: Sequence[Mapping[str, Any]] = ()) -> list[Answer]:
        """What each sequence of an output of `chat` says: reasoning, text, and calls of the `tools` it was given."""
        dialect, found = self.engine.inputs.dialect, []
        for sequence in output.outputs:
            stop = sequence.stop_reason
            text = Detokenizer(
                self.get_tokenizer(),
                output.prompt_token_ids,
                stop=(stop,) if isinstance(stop, str) else (),
                marks=dialect.marks,
            )
            by_token = sequence.finish_reason == "stop" and not isinstance(stop, str)
            shown = text.push(sequence.token_ids, ended_by_token=by_token) + text.finish()
            seed = f"{output.request_id} {sequence.index}"
            parser = dialect.parser(prompt=output.prompt or "", tools=tools, seed=seed)
            found.append(answer([*parser.feed(shown), *parser.finish()]))
        return found

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> Iterator[RequestOutput]:
        """Complete one prompt piece by piece; what a piece holds is `sampling_params.output_kind`.

        Leaving the iterator early aborts the request.
        """
        params = sampling_params or self.get_default_sampling_params()
        request = self._request(prompt, params, 0, add_special_tokens)
        self.engine.add(request)
        try:
            while not self.engine.idle:
                yield from (o for o in self.engine.step() if o.request_id == request.id)
        finally:
            self.engine.abort(request.id)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The `beam_width` most likely continuations of each prompt, best first."""
        return beam_search(self.engine, _as_list(prompts), params)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        if self.engine.tokenizer is None:
            raise InvalidRequest("this LLM was started with skip_tokenizer_init; it has no tokenizer")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none: the model's generation_config.json."""
        return self.engine.inputs.default_params()

    def get_metrics(self) -> list[Counter | Gauge | Histogram]:
        """Every metric's current value, under vLLM's names."""
        return self.engine.metrics.snapshot()

    def reset_prefix_cache(self) -> bool:
        """Let later requests find nothing of what was computed before. Always done, hence True, as vLLM says it."""
        self.engine.core.reset_prefix_cache()
        return True

    def close(self) -> None:
        """Give back the memory; the LLM cannot be used afterwards."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int,
        add_special_tokens: bool,
        turn: Turn | None = None,
    ) -> Request:
        return self.engine.inputs.request(
            prompt,
            params,
            request_id=str(next(self.numbers)),
            priority=priority,
            arrival_s=self.engine.clock(),
            add_special_tokens=add_special_tokens,
            turn=turn,
        )

    def _run(
        self,
        prompts: Sequence[tuple[Prompt, Turn | None]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        show: bool,
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        count = len(prompts)
        params = _for_each("sampling_params", sampling_params or self.get_default_sampling_params(), count)
        priorities = _for_each("priority", priority or 0, count)
        requests = [
            self._request(prompt, _final_only(p), order, turn is None, turn)
            for (prompt, turn), p, order in zip(prompts, params, priorities, strict=True)
        ]
        try:
            for request in requests:
                self.engine.add(request)
            done = self._finish(count, show)
        finally:
            for request in requests:  # an error or an interrupt leaves nothing behind
                self.engine.abort(request.id)
        return [done[request.id] for request in requests]

    def _finish(self, count: int, show: bool) -> dict[str, RequestOutput]:
        done: dict[str, RequestOutput] = {}
        with progress_bar() if show else nullcontext() as bar:
            task = bar.add_task("Processed prompts", total=count, speed="") if bar else None
            begin, num_input, num_output = self.engine.clock(), 0, 0
            while not self.engine.idle:
                for output in self.engine.step():
                    done[output.request_id] = output
                    num_input += len(output.prompt_token_ids)
                    num_output += sum(len(o.token_ids) for o in output.outputs)
                    if bar and task is not None:
                        elapsed = max(self.engine.clock() - begin, 1e-9)
                        speed = (
                            f"input {num_input / elapsed:.1f} tok/s, output {num_output / elapsed:.1f} tok/s"
                        )
                        bar.update(task, advance=1, speed=speed)
        return done


def progress_bar() -> Progress:
    """Progress on standard error, so that piped output stays clean."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
        console=Console(stderr=True),
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, Iterable):
        many: list[Any] = list(prompts)
        return [many] if many and all(isinstance(p, int) for p in many) else many
    raise InvalidRequest(f"prompts is a {type(prompts).__name__}; it must be a prompt or a list of prompts")


def _for_each(name: str, values: Any, count: int) -> list[Any]:
    if not isinstance(values, Sequence):
        return [values] * count
    if len(values) != count:
        raise InvalidRequest(
            f"{name} has {len(values)} entries for {count} prompts; give one, or one for each"
        )
    return list(values)


def _final_only(params: SamplingParams) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"sampling_params is a {type(params).__name__}; it must be SamplingParams")
    return dataclasses.replace(params, output_kind=OutputKind.FINAL_ONLY)
