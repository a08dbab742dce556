"""`quire inspect`: what a network is, or how two differ. Reads config.json, no weights."""

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.models.names import Names
    from quire.models.spec import Decoder


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Folder or Hugging Face id.")
    parser.add_argument(
        "other", metavar="OTHER", nargs="?", help="Print only how this one differs from the first."
    )
    parser.add_argument("--revision", metavar="X", help="Branch, tag or commit of Hugging Face ids.")


def main(args: argparse.Namespace) -> int:
    from quire.models.composite import COMPOSITES
    from quire.models.describe import describe, difference

    name, spec, names = _native(args.model, args)
    if args.other is None:
        text = f"{name}, native{', text only' * (name in COMPOSITES)}\n{describe(spec, names)}"
    else:
        text = "\n".join(difference(spec, _native(args.other, args)[1])) or "no difference"
    sys.stdout.write(text.rstrip("\n") + "\n")
    return 0


def _native(model: str, args: argparse.Namespace) -> "tuple[str, Decoder, Names]":
    """The architecture, what it is, and how its checkpoint is spelled."""
    from quire.checkpoint.files import read_config
    from quire.checkpoint.source import resolve
    from quire.errors import UnsupportedModel
    from quire.models.catalog import refused
    from quire.models.registry import TRANSFORMERS, decoder_spec, road

    folder = resolve(model, args.revision, weights=False).folder
    raw = read_config(folder)
    taken, name = road(raw), raw["architectures"][0]
    if taken == TRANSFORMERS:
        if why := refused().get(name):
            raise UnsupportedModel(
                f"{name} is not native, and not served through Transformers' modules: {why}"
            )
        raise UnsupportedModel(
            f"{name} runs through Transformers' modules, whose layers Quire does not describe"
        )
    return name, *decoder_spec(raw)
