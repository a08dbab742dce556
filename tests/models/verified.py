"""What the oracle cases verify: writes quire/models/verified.json and docs/models.md.

python -m tests.models.verified         with the earliest Transformers, writes what that lacks instead of verified.json
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import transformers

from quire.models.catalog import VERIFIED, Row, refused, rows
from quire.models.foreign import generating
from quire.models.registry import decoder_spec, is_native
from tests.models import composites, foreign
from tests.models.case import EARLIEST, IS_EARLIEST, UNLIKE, is_installed
from tests.models.cases import BY_NAME, CASES, Case, config_of
from tests.models.foreign import outcome
from tests.models.mutations import mutations
from tests.models.refusals import UNSUPPORTED

ROADS = ("native", "transformers")
NO_FEATURES = {"Attention.rope", "Norm.eps", "Rope.theta"}
NO_FEATURES |= {"Attention.window off by one", "Attention.growth off by one"}
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
LACKING = Path(__file__).with_name("lacking.json")
PAGE = """# Models

Architectures by the class that a model's `config.json` names, as `quire models` prints them. `python -m
tests.models.verified` writes this page from the tests, with Transformers {version}.

## Native

{natives} architectures whose layers are Quire's own. Each is compared with Hugging Face Transformers on small random
weights, with the listed features (fields of `quire/models/spec.py`) forced on; for each feature there is a control,
which leaves it out and must then differ. Rotary embedding and norms have controls, too, and are not listed: with
nothing else, the list is empty. Where Transformers has no class of an architecture, the comparison is with another's
that computes the same, or with a plain network from the published description (`tests/models/networks.py`). With
`text only`, a network sees or hears as well, and parts of messages that are no text are refused; with
`attention.spans`, tokens of a prompt see each other, later ones too: those of an image, or all.

| architecture | verified with |
|---|---|
{native}
### What native families refuse

The same architectures with such values in config.json ask for what their families do not compute. They are refused
before weights are read, and the message names the value; so are a `rope_type` and an activation that nobody knows, and
checkpoints whose weights are quantized (`quantization_config`). Keys that a family does not know are named in a
warning. What is refused here `--model-impl transformers` may compute.

| architecture | refused |
|---|---|
{values}
## Through Transformers

{foreigns} classes of Transformers compute over Quire's cache what they compute by themselves: with its default config,
shrunk, and random weights, logits of sequences that come in pieces and share batches are equal. `--model-impl auto`
takes this road where there is no native one. Attention, linear layers and experts are Quire's, other operations
PyTorch's, and steps are launched operation by operation, so native architectures are faster. The same comparison is
made for a model's own config before it is served; it takes well under a second, and `--skip-conformance` leaves it out.
Code that comes with a model is never run. With `alone`, sequences of a step are computed one after another, by the
class's own attention, since it takes no other; with `attention.v_dim`, keys and values differ in size; with
`attention.v_in_k`, the cache holds latents (MLA); with `spans`, tokens of a prompt see each other; with `states`,
layers keep a state of each sequence, and with `experts`, these are Quire's; with `is_decoder`, config.json must say so.

| architecture | verified with |
|---|---|
{foreign}
## Not through Transformers

{refusals} more of its classes generate text, and are refused. Those that are native, or whose text is, are served all
the same, unless `--model-impl transformers` asks for Transformers' modules.

| class | native | why not |
|---|---|---|
{refused}
## With Transformers {earliest}

`make oracles` makes the same comparisons with the earliest version that is supported, of {both_native} native
architectures and of {both_transformers} of the classes. The others it lacks, or computes otherwise than later versions.
Architectures are native with either.

| road | without a class | computed otherwise |
|---|---|---|
{earlier}"""


def features() -> dict[str, list[str]]:
    """By architecture, what its cases have that is not usual, and that has a control."""
    found = defaultdict(set)
    for case in CASES:
        spec, _ = decoder_spec(config_of(case))
        controls = {name for name, _ in mutations(spec)}
        unusual = {name for name in controls if " " in name} | set(unusual_fields(spec))
        found[case.described].update(name.lower() for name in controls & unusual - NO_FEATURES)
    return {name: sorted(words) for name, words in sorted(found.items())}


def unusual_fields(part: Any) -> Iterator[str]:
    """Fields that are not their defaults, of a spec and all its parts."""
    if isinstance(part, tuple):
        for item in part:
            yield from unusual_fields(item)
    elif is_dataclass(part):
        for field in fields(part):
            value = getattr(part, field.name)
            if value != field.default:
                yield f"{type(part).__name__}.{field.name}"
            yield from unusual_fields(value)


def refused_values() -> dict[str, list[str]]:
    """By architecture, what of config.json is refused, and what the message names if that is something else."""
    found = defaultdict(list)
    for name, changes, word in UNSUPPORTED:
        for key, value in changes.items():
            shown = f"{key}={json.dumps(_short(value))}"
            found[BY_NAME[name].described].append(f"`{shown}`" + ("" if word in shown else f" ({word})"))
    return dict(sorted(found.items()))


def _short(value: Any) -> Any:
    """Of rotary embeddings, the kind or what is unusual."""
    if not isinstance(value, dict):
        return value
    kept = {key: one for key, one in value.items() if key != "rope_theta"}
    return {"rope_type": kept["rope_type"]} if "rope_type" in kept else kept


def as_json(foreign: Mapping[str, Any]) -> str:
    """`foreign`: what was found of Transformers' classes, which takes a minute."""
    return json.dumps({"native": features(), **foreign}, indent=1) + "\n"


def found_foreign() -> dict[str, Any]:
    """Served classes with their features, and refused ones with the reason, and of which version they are."""
    both = {name: outcome(name) for name in sorted(generating())}
    return {
        "version": transformers.__version__,
        "transformers": {name: found for name, found in both.items() if not isinstance(found, str)},
        "refused": {name: found for name, found in both.items() if isinstance(found, str)},
    }


def written_foreign() -> dict[str, Any]:
    """The same as it was written."""
    found = json.loads(VERIFIED.read_text())
    return {key: found[key] for key in ("version", "transformers", "refused")}


def lacking() -> dict[str, dict[str, list[str]]]:
    """By road, what the installed Transformers has no class of, and what it computes otherwise than it should."""
    by_name = defaultdict(list)
    for case in (*CASES, *composites.CASES):
        by_name[case.described].append(case)
    absent = {name for name, cases in by_name.items() if not any(map(is_there, cases))}
    unlike = {name for name, cases in by_name.items() if all(case.name in UNLIKE for case in cases)}
    listed = json.loads(VERIFIED.read_text())["transformers"].keys()
    return {
        "native": {"absent": sorted(absent), "unlike": sorted(unlike - absent)},
        "transformers": {
            "absent": sorted(listed - generating().keys()),
            "unlike": sorted(listed & foreign.UNLIKE & generating().keys()),
        },
    }


def is_there(case: Case | composites.Composite) -> bool:
    return is_installed(case.architecture) and is_installed(case.config_class)


def as_page() -> str:
    """From what was written, as it is published."""
    tables = {road: [row for row in rows() if row["road"] == road] for road in ROADS}
    native, foreign = (
        "".join(f"| {row['architecture']} | {', '.join(row['features'])} |\n" for row in tables[road])
        for road in ROADS
    )
    return PAGE.format(
        version=written_foreign()["version"],
        native=native,
        natives=len(tables["native"]),
        foreign=foreign,
        foreigns=len(tables["transformers"]),
        values="".join(f"| {name} | {', '.join(words)} |\n" for name, words in refused_values().items()),
        refused="".join(
            f"| {name} | {'yes' if is_native(name) else ''} | {reason} |\n"
            for name, reason in refused().items()
        ),
        refusals=len(refused()),
        **earliest(tables),
    )


def earliest(tables: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """What the page says of that version; `tables`: all rows by road."""
    found: dict[str, dict[str, list[str]]] = json.loads(LACKING.read_text())
    others = {road: sum(map(len, kinds.values())) for road, kinds in found.items()}
    return {
        "earliest": EARLIEST,
        **{f"both_{road}": len(tables[road]) - others[road] for road in ROADS},
        "earlier": "".join(
            f"| {road} | {', '.join(kinds['absent'])} | {', '.join(kinds['unlike'])} |\n"
            for road, kinds in found.items()
        ),
    }


if __name__ == "__main__":
    if IS_EARLIEST:
        LACKING.write_text(json.dumps(lacking(), indent=1) + "\n")
    else:
        VERIFIED.write_text(as_json(found_foreign()))
    DOCS.write_text(as_page())
