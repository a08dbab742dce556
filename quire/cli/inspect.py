"""`quire inspect`: what a network is, or how two differ. Reads config.json, no weights."""

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.models.spec import Decoder


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Folder or Hugging Face id.")
    parser.add_argument(
        "other", metavar="OTHER", nargs="?", help="Print only how this one differs from the first."
    )
    parser.add_argument("--revision", metavar="X", help="Branch, tag or commit of Hugging Face ids.")


def main(args: argparse.Namespace) -> int:
    from quire.models.describe import describe, difference

    if args.other is None:
        text = describe(_spec(args.model, args))
    else:
        text = "\n".join(difference(_spec(args.model, args), _spec(args.other, args))) or "no difference"
    sys.stdout.write(text.rstrip("\n") + "\n")
    return 0


def _spec(model: str, args: argparse.Namespace) -> "Decoder":
    from quire.checkpoint.files import read_config
    from quire.checkpoint.source import resolve
    from quire.errors import UnsupportedModel
    from quire.models.catalog import refused
    from quire.models.registry import TRANSFORMERS, decoder_spec, road

    folder = resolve(model, args.revision, weights=False).folder
    raw = read_config(folder)
    if road(raw) == TRANSFORMERS:
        name = raw["architectures"][0]
        if why := refused().get(name):
            raise UnsupportedModel(
                f"{name} is not native, and not served through Transformers' modules: {why}"
            )
        raise UnsupportedModel(
            f"{name} runs through Transformers' modules, whose layers Quire does not describe"
        )
    return decoder_spec(raw)[0]
