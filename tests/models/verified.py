"""What the oracle cases verify: writes quire/models/verified.json and docs/models.md.

python -m tests.models.verified
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from quire.models.catalog import VERIFIED, rows
from quire.models.registry import decoder_spec
from tests.models.cases import CASES, config_of
from tests.models.mutations import mutations

NO_FEATURES = {"Attention.rope", "Attention.window off by one", "Norm.eps", "Rope.theta"}
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models

Architectures by the class that a model's `config.json` names, as `quire models` prints them. All are native: Quire
computes them with kernels of its own. Each is compared with Hugging Face Transformers on small random weights, with the
listed features forced on; for each feature there is a control, which leaves it out and must then differ. `python -m
tests.models.verified` writes this page from the tests.

| architecture | verified with |
|---|---|
"""


def features() -> dict[str, list[str]]:
    """By architecture, what its cases have that is not usual, and that has a control."""
    found = defaultdict(set)
    for case in CASES:
        spec, _ = decoder_spec(config_of(case))
        controls = {name for name, _ in mutations(spec)}
        unusual = {name for name in controls if " " in name} | set(_unusual(spec))
        found[case.described].update(name.lower() for name in controls & unusual - NO_FEATURES)
    return {name: sorted(words) for name, words in sorted(found.items())}


def _unusual(part: Any) -> Iterator[str]:
    """Fields that are not their defaults, of a spec and all its parts."""
    if isinstance(part, tuple):
        for item in part:
            yield from _unusual(item)
    elif is_dataclass(part):
        for field in fields(part):
            value = getattr(part, field.name)
            if value != field.default:
                yield f"{type(part).__name__}.{field.name}"
            yield from _unusual(value)


def as_json() -> str:
    return json.dumps(features(), indent=1) + "\n"


def as_page() -> str:
    """From what was written, as it is published."""
    lines = (f"| {row['architecture']} | {', '.join(row['features'])} |\n" for row in rows())
    return HEAD + "".join(lines)


if __name__ == "__main__":
    VERIFIED.write_text(as_json())
    DOCS.write_text(as_page())
