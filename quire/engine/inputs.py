"""From what users send to requests of token ids: tokenize, fill in defaults, refuse what cannot work."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from quire.engine.events import Submission
from quire.engine.grammars import GrammarChecks
from quire.errors import InvalidRequest, PromptTooLong
from quire.log import logger
from quire.models.spans import Spans, find_spans
from quire.text.chat import ChatTemplate
from quire.text.tokenizer import Tokenizer, bad_word_ids
from quire.text.tools.dialect import Dialect
from quire.types import CallRules, Coordinates, Grammar, Prompt, Request, SamplingParams, ThinkingBudget, Turn

MAX_SALT_CHARS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """How a network sees a prompt's tokens: whether they may have positions in time, height and width, and which see
    later ones.
    """

    has_axes: bool = False
    spans: Spans | None = None


IN_ORDER = Seen()  # one after another, each sees those before it


class InputProcessor:
    """Turns prompts into requests. One per model; holds no state of any request."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        dialect: Dialect,
        *,
        vocab_size: int,
        max_length: int,
        max_logprobs: int,
        eos_token_ids: frozenset[int],
        defaults: Mapping[str, Any],
        seen: Seen = IN_ORDER,
    ):
        self.tokenizer, self.template, self.dialect = tokenizer, template, dialect
        self.vocab_size, self.max_length, self.max_logprobs = vocab_size, max_length, max_logprobs
        self.eos_token_ids, self.defaults = eos_token_ids, dict(defaults)
        self.seen = seen
        self.grammars = None if tokenizer is None else GrammarChecks(tokenizer, vocab_size, eos_token_ids)

    @property
    def chat(self) -> str | None:
        """What is read of answers to conversations, for whoever starts a server; None without a chat template."""
        return None if self.template is None else str(self.dialect)

    def default_params(self) -> SamplingParams:
        """What a request without sampling parameters gets: the model's own defaults."""
        return SamplingParams(**self.defaults)

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        tenant: str = "",
        arrival_s: float = 0.0,
        add_special_tokens: bool = True,
        marks: Mapping[int, str] | None = None,
        turn: Turn | None = None,
    ) -> Request:
        """Check one prompt and its parameters. `turn`: the prompt is a conversation.

        Raises:
            InvalidRequest: empty, too long, or a token id or parameter that this model cannot take.
            Overloaded: too many grammars are being checked.
        """
        text, tokens, salt = self._read(prompt, add_special_tokens)
        self._check_prompt(tokens)
        self._check_params(params)
        return Request(
            id=request_id,
            prompt_token_ids=tuple(tokens),
            params=params,
            prompt=text,
            priority=priority,
            tenant=tenant,
            cache_salt=salt,
            arrival_s=arrival_s,
            marks=marks,
            coordinates=self._coordinates(prompt, len(tokens)),
            grammar=self._grammar(params, text, tokens, turn),
            spans=find_spans(self.seen.spans, tokens),
        )

    def submission(self, request: Request) -> Submission:
        """The request as the engine core takes it."""
        params, at = request.params, request.coordinates
        room = self.max_length - len(request.prompt_token_ids) - (0 if at is None else max(at.offset, 0))
        words = bad_word_ids(self._tokenizer("bad_words"), params.bad_words) if params.bad_words else []
        return Submission(
            request_id=request.id,
            prompt_token_ids=request.prompt_token_ids,
            params=dataclasses.replace(params, structured_outputs=None) if request.grammar else params,
            max_tokens=min(room, params.max_tokens or room),
            eos_token_ids=frozenset() if params.ignore_eos else self.eos_token_ids,
            bad_words=tuple(tuple(w) for w in words),
            priority=request.priority,
            tenant=request.tenant,
            cache_salt=request.cache_salt,
            outputs=tuple(None if i in request.ended else t for i, t in enumerate(request.outputs)),
            coordinates=at,
            grammar=request.grammar,
            spans=request.spans,
        )

    def resumed(
        self, request: Request, outputs: tuple[tuple[int, ...], ...], ended: frozenset[int]
    ) -> Request:
        """A request that goes on where another engine left it, with the tokens of each of its sequences.

        Raises:
            InvalidRequest: they are not this model's, or leave no room for another one.
        """
        room = self.submission(request).max_tokens
        for index, tokens in enumerate(outputs):
            self._check_tokens(tokens)
            if index not in ended and len(tokens) >= room:
                raise InvalidRequest(
                    f"output {index} has {len(tokens)} tokens already, and may have at most {room}",
                    param="resume",
                )
        return dataclasses.replace(request, outputs=outputs, ended=ended)

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], template: ChatTemplate | None, **options: Any
    ) -> str:
        """Render a conversation; `template` replaces the model's."""
        chosen = template or self.template
        if chosen is None:
            raise InvalidRequest(
                "this model has no chat template; pass chat_template, or use generate() with a plain prompt",
                param="messages",
            )
        return chosen.render(messages, **options)

    def turn(
        self, messages: Sequence[Mapping[str, Any]], template: ChatTemplate | None, **options: Any
    ) -> tuple[str, Turn]:
        """Render a conversation for the assistant's turn, in which calls of its `tools`, if any come, fit them."""
        prompt, tools = self.chat_prompt(messages, template, **options), options.get("tools")
        last = messages[-1].get("content") if options.get("continue_final_message") else ""
        return prompt, Turn(last if isinstance(last, str) else "", CallRules(tools=tools) if tools else None)

    def tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            InvalidRequest: there is no tokenizer, or the text is too long for any prompt.
        """
        tokenizer = self._tokenizer("prompt")
        most = tokenizer.max_chars(self.max_length)
        if len(text) > most:
            raise self._too_long("at least ", -(-len(text) * self.max_length // most))
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            InvalidRequest: there is no tokenizer, or an id is not this model's.
        """
        wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise InvalidRequest(
                f"tokens holds id {wrong}; this model's ids are 0 to {self.vocab_size - 1}", param="tokens"
            )
        return self._tokenizer("tokens").decode(tokens, skip_special_tokens=False)

    def _tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(
                f"{param} needs a tokenizer, and the engine was started with skip_tokenizer_init; use token ids",
                param=param,
            )
        return self.tokenizer

    def _read(self, prompt: Prompt, add_special_tokens: bool) -> tuple[str | None, Sequence[int], str]:
        if isinstance(prompt, str):
            return prompt, self.tokens(prompt, add_special_tokens=add_special_tokens), ""
        if isinstance(prompt, Mapping):
            known = {"prompt", "prompt_token_ids", "cache_salt", "positions"}
            if unknown := sorted(set(prompt) - known):
                raise InvalidRequest(
                    f"prompt has unknown keys {unknown}; known are {sorted(known)}", param="prompt"
                )
            text, tokens, salt = (
                prompt.get("prompt"),
                prompt.get("prompt_token_ids"),
                prompt.get("cache_salt", ""),
            )
            if not isinstance(salt, str) or len(salt) > MAX_SALT_CHARS:
                raise InvalidRequest(f"cache_salt must be a string of at most {MAX_SALT_CHARS} characters")
            if any("\ud800" <= char <= "\udfff" for char in salt):
                raise InvalidRequest("cache_salt holds a lone surrogate; send whole characters")
            if isinstance(tokens, list | tuple):
                return text, tokens, salt
            if tokens is not None or not isinstance(text, str):
                raise InvalidRequest(
                    "a prompt needs the key 'prompt' (text) or 'prompt_token_ids' (a list)", param="prompt"
                )
            return text, self.tokens(text, add_special_tokens=add_special_tokens), salt
        if isinstance(prompt, list | tuple):
            return None, prompt, ""
        raise InvalidRequest(
            f"prompt is a {type(prompt).__name__}; it must be text, a list of token ids, or a dict with 'prompt' or"
            " 'prompt_token_ids'",
            param="prompt",
        )

    def _coordinates(self, prompt: Prompt, num_tokens: int) -> Coordinates | None:
        rows: Any = prompt.get("positions") if isinstance(prompt, Mapping) else None
        if rows is None:
            return None
        if not self.seen.has_axes:
            raise InvalidRequest(
                "the prompt has positions, and this network has no rotary embedding by sections (time, height, width),"
                " or it runs through Transformers' modules; leave them out",
                param="positions",
            )
        are_rows = isinstance(rows, list | tuple) and all(isinstance(row, list | tuple) for row in rows)
        if not are_rows or [{*map(type, row)} == {int} and len(row) for row in rows] != [num_tokens] * 3:
            raise InvalidRequest(
                f"positions must be three rows (time, height, width) of {num_tokens} integers, one for each token",
                param="positions",
            )
        low, high = min(map(min, rows)), max(map(max, rows))
        if low < 0 or high > self.max_length - 2:
            raise InvalidRequest(
                f"positions go from {low} to {high}; they must be from 0 to {self.max_length - 2}, because the context"
                f" of {self.max_length} (max_model_len) must hold a token of output beyond them",
                param="positions",
            )
        return Coordinates.of(rows)

    def _grammar(
        self, params: SamplingParams, text: str | None, tokens: Sequence[int], turn: Turn | None
    ) -> Grammar | None:
        asked, budget, continued = params.structured_outputs, None, "" if turn is None else turn.continued
        if asked is None or turn is not None:
            budget = self._budget(params.thinking_token_budget, text, tokens, continued)
        found = Grammar(None, budget=budget)
        if turn is not None:
            found = dataclasses.replace(found, thoughts=self.dialect.thoughts(text or "", continued))
        if turn is not None and turn.calls is not None and self.dialect.tools is not None:
            found = self._with_calls(found, params, turn.calls, self.dialect.start(text or "", continued))
        elif asked is not None and self.grammars is None:
            self._tokenizer("structured_outputs")
        elif asked is not None and self.grammars is not None:
            found = dataclasses.replace(found, text=self.grammars.check(asked))
        return found if found.text is not None or budget is not None else None

    def _with_calls(self, found: Grammar, params: SamplingParams, calls: CallRules, start: str) -> Grammar:
        """The grammar of a turn that begins in a state of the format of calls, as far as it can be constrained."""
        form, asked = self.dialect.tools, params.structured_outputs
        if form is None or self.grammars is None:
            return found
        if params.ignore_eos or (form.reasons and found.budget is not None):
            if not calls.required:
                return found
            name = "ignore_eos" if params.ignore_eos else "thinking_token_budget"
            raise InvalidRequest(
                f"{name} is set, and would keep this model from a call; leave it out", param=name
            )
        if form.reasons:  # its grammar has the reasoning too
            found = dataclasses.replace(found, thoughts=None)
        elif start == "reasoning":
            start = "start"
        try:
            text, loose = self.grammars.check_calls(calls, form.names[0], start, asked)
        except InvalidRequest as error:
            if calls.required or asked is not None:
                raise
            logger.warning("calls of tools are not constrained: %s", error)
            return found
        return dataclasses.replace(found, text=text, loose=loose)

    def _budget(
        self, asked: int | None, text: str | None, tokens: Sequence[int], continued: str
    ) -> ThinkingBudget | None:
        if asked is None:
            return None
        tokenizer = self._tokenizer("thinking_token_budget")
        if self.dialect.reasoning is None:
            raise InvalidRequest(
                f"thinking_token_budget is {asked}, and how this model writes reasoning is not known: its chat"
                " template shows no known format, or reasoning_parser is none; start with --reasoning-parser, or"
                " leave the budget out",
                param="thinking_token_budget",
            )
        found = self.dialect.bounds(self.text(tokens) if text is None else text, continued)
        if found is None:
            return None
        thoughts, closing = found
        return ThinkingBudget(asked, thoughts, tuple(tokenizer.encode(closing, add_special_tokens=False)))

    def _check_prompt(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise InvalidRequest("the prompt is empty; it needs at least one token", param="prompt")
        if {*map(type, tokens)} != {int} or min(tokens) < 0 or max(tokens) >= self.vocab_size:
            self._check_tokens(tokens)
        if len(tokens) >= self.max_length:
            raise self._too_long("", len(tokens))

    def _too_long(self, at_least: str, num_tokens: int) -> PromptTooLong:
        """The beginning of its message is what agents know a full context by, which they shorten then."""
        return PromptTooLong(
            f"the prompt is too long: {at_least}{num_tokens} tokens > {self.max_length - 1}, because the context of"
            f" {self.max_length} must hold a token of output too; shorten the prompt or raise max_model_len",
            num_tokens=num_tokens,
            limit=self.max_length,
        )

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """One by one, to name the one that is wrong."""
        for token in tokens:
            if not isinstance(token, int) or isinstance(token, bool):
                raise InvalidRequest(f"the prompt holds {token!r}, which is not a token id", param="prompt")
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(
                    f"the prompt holds token id {token}; this model's ids are 0 to {self.vocab_size - 1}",
                    param="prompt",
                )

    def _check_params(self, params: SamplingParams) -> None:
        if self.tokenizer is None and (params.stop or params.bad_words):
            self._tokenizer("stop" if params.stop else "bad_words")
        for name in ("logprobs", "prompt_logprobs"):
            asked = self.vocab_size if getattr(params, name) == -1 else getattr(params, name)
            if asked is not None and self.max_logprobs != -1 and asked > self.max_logprobs:
                raise InvalidRequest(
                    f"{name} asks for {asked} log probabilities a token; the engine's max_logprobs is"
                    f" {self.max_logprobs}",
                    param=name,
                )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(params, name) or ():
                if token >= self.vocab_size:
                    raise InvalidRequest(
                        f"{name} holds token id {token}; this model's ids are 0 to {self.vocab_size - 1}",
                        param=name,
                    )
