"""Which architectures run, and what of each was compared with Hugging Face: `verified.json`, which the tests write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from quire.models.registry import families

VERIFIED = Path(__file__).with_name("verified.json")


class Row(TypedDict):
    """One architecture.

    `features` are fields of the spec whose loss a comparison of logits has noticed, `attention.window` for one;
    `verified` is whether there was such a comparison.
    """

    architecture: str
    road: str  # native
    verified: bool
    features: Sequence[str]


def rows() -> list[Row]:
    """By name."""
    found: Mapping[str, list[str]] = json.loads(VERIFIED.read_text())
    return [
        Row(architecture=name, road="native", verified=name in found, features=found.get(name, []))
        for name in families()
    ]
