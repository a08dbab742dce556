"""What a checkpoint's settings say about sampling and ending. Functions of dictionaries; knows no files."""

from collections.abc import Mapping
from typing import Any, Protocol

from quire.errors import ModelError

NAMES: Mapping[str, str] = {  # generation_config.json -> SamplingParams
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


class HasEnd(Protocol):
    """A tokenizer, or nothing, as far as ends go."""

    @property
    def eos_token_id(self) -> int | None: ...


def default_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """SamplingParams' fields that generation_config.json sets, as vLLM reads it: `do_sample` does not matter.

    Raises:
        ModelError: a value is no number.
    """
    found: dict[str, Any] = {}
    for theirs, ours in NAMES.items():
        value = generation.get(theirs)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{theirs} in generation_config.json is {value!r}; it must be a number")
        found[ours] = int(value) if ours in ("top_k", "max_tokens") else float(value)
    return found


def end_tokens(
    generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: HasEnd | None = None
) -> frozenset[int]:
    """Tokens that end a sequence: the tokenizer's, and generation_config.json's or else config.json's.

    Raises:
        ModelError: an id is no whole number.
    """
    text = config.get("text_config")  # of models that see or hear
    sources = (generation, config, text if isinstance(text, Mapping) else {})
    found = next((ids for source in sources if (ids := _ids(source))), frozenset())
    own = tokenizer.eos_token_id if tokenizer is not None else None
    return found if own is None else found | {own}


def _ids(source: Mapping[str, Any]) -> frozenset[int]:
    value = source.get("eos_token_id")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for token in listed:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ModelError(f"eos_token_id is {value!r}; it must be a token id or a list of them")
    return frozenset(token for token in listed if token >= 0)
