"""Reads what lies beside a tokenizer: settings, named tokens, chat templates. Knows no tokenizer library."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quire.errors import ModelError

MAX_FILE_BYTES = 64 << 20
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_text(path: Path) -> str | None:
    """The file's text; None if there is no file.

    Raises:
        ModelError: the file is too large or is no UTF-8.
    """
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ModelError(f"{path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file.

    Raises:
        ModelError: the file holds no JSON object.
    """
    text = read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}; it must hold a JSON object")
    return value


def token_text(value: object) -> str | None:
    """A token is written as a string, or as an object with its matching rules."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, and the model's own (`image_token`, ...), in the order of transformers."""
    own = [key for key in config if key.endswith("_token") and key not in NAMED]
    found = {key: token_text(config.get(key)) for key in (*NAMED, *own)}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        found |= {str(key): token_text(value) for key, value in extra.items()}
    return {key: text for key, text in found.items() if text is not None}


def extra_tokens(config: Mapping[str, Any]) -> Iterator[str | Mapping[str, Any]]:
    """Special tokens that have no name, as text or with their matching rules."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    if isinstance(extra, list):
        yield from (value for value in extra if token_text(value) is not None)


def chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> Jinja source; "default" is the one without a name. Files come before tokenizer_config.json.

    Raises:
        ModelError: a template is not text.
    """
    named = folder / "additional_chat_templates"
    files = {path.stem: read_text(path) for path in sorted(named.glob("*.jinja"))} if named.is_dir() else {}
    files["default"] = read_text(folder / "chat_template.jinja")
    found = {name: text for name, text in files.items() if text is not None}
    if found:
        return found
    value = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if not value:
        return {}
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, Mapping)]
        value = {entry.get("name"): entry.get("template") for entry in entries}
    templates = value if isinstance(value, Mapping) else {"default": value}
    for name, text in templates.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ModelError(
                f"chat template {name!r} in {folder} is a {type(text).__name__}; it must be a string"
            )
    return dict(templates)
