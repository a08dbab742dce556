"""Flags made from the fields of `Config`, and from sampling parameters. Knows no command and no engine."""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quire.config import Config
from quire.types import SamplingParams

UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": 1024**2, "G": 1024**3}
SAMPLING = {
    "max_tokens": "Most tokens to generate (%(default)s).",
    "min_tokens": "Tokens to generate before the text may end.",
    "temperature": "0 takes the likeliest token; higher is more varied.",
    "top_p": "Choose among the likeliest tokens that have this probability together.",
    "top_k": "Choose among this many tokens; 0 for all.",
    "min_p": "Choose among tokens at least this likely, relative to the likeliest.",
    "presence_penalty": "Lowers tokens that were generated before.",
    "frequency_penalty": "Lowers tokens by how often they were generated before.",
    "repetition_penalty": "Divides the scores of tokens seen before; 1 for none.",
}
NOT_A_DEFAULT = "the model's generation_config.json gives the default"


def whole(text: str) -> int:
    """4096, 4k (4000), 4K (4096), 1.5k (1500): as vLLM reads them."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", text)
    value = float(match[1]) * UNITS[match[2]] if match else 0.5
    if not value.is_integer():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number; write 4096, 4k (4000) or 4K (4096)"
        )
    return int(value)


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON object, such as '{{\"key\": 1}}'")
    return value


PARSERS: dict[Any, Callable[[str], object]] = {
    str: str,
    int: whole,
    float: float,
    Mapping[str, Any]: json_object,
    tuple[str, ...]: str,
}
VALUES = {str: "X", Mapping[str, Any]: "JSON", tuple[str, ...]: "X"}  # as help shows them; N: a number


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def plain_type(annotation: Any) -> Any:
    """`int` of `int | None`."""
    for kind in (bool, *PARSERS):
        if annotation in (kind, kind | None):
            return kind
    raise TypeError(f"no flag can be made for an option of type {annotation}")


def same_dashes(words: Sequence[str]) -> list[str]:
    """`--max_tokens=a_b` as `--max-tokens=a_b`; what follows a lone `--` is not touched."""
    end = words.index("--") if "--" in words else len(words)
    head = [re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), word) for word in words[:end]]
    return head + list(words[end:])


def add_config_options(parser: argparse.ArgumentParser, *, model: str | None = None) -> None:
    """The model as first argument unless the command has one, a flag for every other option.

    The namespace has only what was given.
    """
    if model is None:
        parser.add_argument("model", metavar="MODEL", help=_help(Config.__dataclass_fields__["model"]))
    else:
        parser.set_defaults(model=model)
    group = parser.add_argument_group("engine options")
    for field in dataclasses.fields(Config):
        if field.name != "model":
            _add_flag(group, field)


def add_flags(parser: argparse.ArgumentParser, kind: type, title: str) -> None:
    """A flag for every field of a dataclass of options; the namespace has only what was given."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(kind):
        _add_flag(group, field)


def _add_flag(group: argparse._ArgumentGroup, field: "dataclasses.Field[Any]") -> None:
    name, kind, choices = flag(field.name), plain_type(field.type), field.metadata["choices"]
    shared: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
    if kind is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, **shared)
        return
    if kind == tuple[str, ...]:
        shared |= {"nargs": "+", "action": "extend"}
    if not choices:
        shared["metavar"] = VALUES.get(kind, "N")
    group.add_argument(name, type=PARSERS[kind], choices=choices, **shared)


def _help(field: "dataclasses.Field[Any]") -> str:
    help = str(field.metadata["help"]).replace("%", "%%")
    return help if field.default in (None, "", ()) else f"{help} ({field.default})"


def config_options(namespace: argparse.Namespace, kind: Any = Config) -> dict[str, Any]:
    """The options of a dataclass that were given, by name; lists as tuples."""
    given = {f.name: vars(namespace)[f.name] for f in dataclasses.fields(kind) if f.name in namespace}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def config_from(namespace: argparse.Namespace) -> Config:
    """Raises ConfigError where `Config` does."""
    return Config.of(**config_options(namespace))


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """`--seed` is the engine's, which seeds requests that bring none."""
    group = parser.add_argument_group("sampling options", f"Where none is given, {NOT_A_DEFAULT}.")
    types = {
        field.name: plain_type(field.type)
        for field in dataclasses.fields(SamplingParams)
        if field.name in SAMPLING
    }
    for name, help in SAMPLING.items():
        default = max_tokens if name == "max_tokens" else argparse.SUPPRESS
        group.add_argument(flag(name), type=PARSERS[types[name]], default=default, metavar="N", help=help)
    group.add_argument(
        "--stop",
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="End before this text; repeatable.",
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Do not end at the end of sequence token.",
    )


def sampling_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given, and `max_tokens`."""
    given = vars(namespace)
    return {name: given[name] for name in (*SAMPLING, "stop", "ignore_eos") if name in given}
