"""The half of an engine that knows text: tokenizer, template and defaults from the model's folder. Knows no device."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.checkpoint.files import read_config, read_generation_config
from quire.checkpoint.source import resolve as find_model
from quire.config import Config
from quire.engine.inputs import InputProcessor, Seen
from quire.models.hf import HF
from quire.models.registry import NATIVE, decoder_spec, road
from quire.models.spans import spans_of
from quire.models.spec import has_axes
from quire.text.chat import ChatTemplate
from quire.text.generation import default_sampling, end_tokens
from quire.text.tokenizer import Tokenizer
from quire.text.tools.dialect import Dialect
from quire.text.tools.registry import reasoning_format, tool_format


@dataclass(frozen=True, slots=True)
class Text:
    """What the folder says about text. It can be read while the weights are loaded elsewhere."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    dialect: Dialect  # how answers are read
    eos_token_ids: frozenset[int]
    defaults: Mapping[str, Any]  # of sampling
    max_logprobs: int
    seen: Seen  # how the network takes prompts

    def inputs(self, *, vocab_size: int, max_model_len: int) -> InputProcessor:
        """What turns prompts into requests, once the sizes are known that the device half has settled."""
        return InputProcessor(
            self.tokenizer,
            self.template,
            self.dialect,
            vocab_size=vocab_size,
            max_length=max_model_len,
            max_logprobs=self.max_logprobs,
            eos_token_ids=self.eos_token_ids,
            defaults=self.defaults,
            seen=self.seen,
        )


def read_text(config: Config) -> Text:
    """Read what the text half needs of the model's files; `config` may be resolved or not.

    Raises:
        ConfigError, ModelError: naming the option or the file.
    """
    folder = find_model(config.model, config.revision, weights=False, download_dir=config.download_dir).folder
    raw = model_config(config, folder)
    axes = False
    if road(raw, config.model_impl) == NATIVE:
        axes = has_axes(decoder_spec(raw)[0])  # what cannot be served is named before its tokenizer is missed
    tokenizer, ends = read_tokens(config, folder, raw)
    generation = _generation(config, folder)
    template = None if tokenizer is None else ChatTemplate.of(tokenizer, config.chat_template)
    sources = () if template is None else tuple(template.sources.values())
    tools = tool_format(config.tool_call_parser, sources)
    return Text(
        tokenizer=tokenizer,
        template=template,
        dialect=Dialect(tools, reasoning_format(config.reasoning_parser, sources), tokenizer),
        eos_token_ids=ends,
        defaults=default_sampling({**generation, **(config.override_generation_config or {})}),
        max_logprobs=config.max_logprobs,
        seen=Seen(axes, spans_of(HF(raw))),
    )


def build_inputs(config: Config, *, vocab_size: int, max_model_len: int) -> InputProcessor:
    """`read_text` and `Text.inputs` in one, for who has both sizes."""
    return read_text(config).inputs(vocab_size=vocab_size, max_model_len=max_model_len)


def read_tokens(
    config: Config, folder: Path, raw: Mapping[str, Any]
) -> tuple[Tokenizer | None, frozenset[int]]:
    """The tokenizer, if there is to be one, and the tokens that end a text.

    Raises:
        ConfigError, ModelError: naming the option or the file.
    """
    tokenizer = _tokenizer(config, folder)
    return tokenizer, end_tokens(_generation(config, folder), raw, tokenizer)


def _generation(config: Config, folder: Path) -> dict[str, Any]:
    return read_generation_config(folder) if config.generation_config == "auto" else {}


def model_config(config: Config, folder: Path) -> dict[str, Any]:
    """config.json, with the keys that the options replace."""
    return {**read_config(folder), **(config.hf_overrides or {})}


def _tokenizer(config: Config, folder: Path) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    if config.tokenizer is None:
        return Tokenizer.load(folder)
    return Tokenizer.load(
        find_model(config.tokenizer, weights=False, download_dir=config.download_dir).folder
    )
