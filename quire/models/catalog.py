"""Which architectures run, and what of each was compared with Hugging Face: `verified.json`, which the tests write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from quire.models.composite import COMPOSITES
from quire.models.registry import NATIVE, TRANSFORMERS, families
from quire.models.spans import SPANNED

VERIFIED = Path(__file__).with_name("verified.json")


class Row(TypedDict):
    """One architecture on one road.

    `features` are fields of the spec whose loss a comparison of logits has noticed, `attention.window` for one;
    `verified` is whether there was such a comparison.
    """

    architecture: str
    road: str  # native | transformers
    verified: bool
    features: Sequence[str]


def rows() -> list[Row]:
    """Native ones first, by name."""
    found: Mapping[str, dict[str, list[str]]] = json.loads(VERIFIED.read_text())
    native, foreign = found[NATIVE], found[TRANSFORMERS]
    native |= {name: ["attention.spans"] * (name in SPANNED) + ["text only"] for name in COMPOSITES}
    return [
        *(
            Row(architecture=name, road=NATIVE, verified=name in native, features=native.get(name, []))
            for name in sorted([*families(), *COMPOSITES])
        ),
        *(
            Row(architecture=name, road=TRANSFORMERS, verified=True, features=features)
            for name, features in foreign.items()
        ),
    ]


def refused() -> Mapping[str, str]:
    """Classes of Transformers that generate text and cannot be served by their modules, and why."""
    found: Mapping[str, str] = json.loads(VERIFIED.read_text())["refused"]
    return found
