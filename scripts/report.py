"""What families of models cost: lines of each, fields of the spec by who uses them, and lines that stand twice.

    python scripts/report.py          or: make report

A family is a function that describes an architecture (quire/models/registry.py), or several. A field is used where an
oracle case has a value that is not its default. One that a single family uses should not be in the shared spec; equal
lines of two families may be one function.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from quire.models.registry import FAMILIES, decoder_spec  # noqa: E402
from tests.models.cases import CASES, config_of  # noqa: E402
from tests.models.verified import unusual_fields  # noqa: E402

MODELS = ROOT / "quire" / "models"
RULE = 2  # families that a field of the shared spec needs
RUN = 4  # equal lines that are worth a look


def functions() -> Mapping[str, list[str]]:
    """The lines of each family's function, without its docstring and blank lines, by module.function."""
    found = {}
    for name in sorted(set(FAMILIES.values())):
        module, function = name.split(".")
        text = (MODELS / f"{module}.py").read_text()
        (node,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == function)
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = text.splitlines()[body[0].lineno - 1 : node.end_lineno]
        found[name] = [line.strip() for line in lines if line.strip()]
    return found


def users() -> Mapping[str, set[str]]:
    """Families by the fields of the spec that their cases use."""
    found: dict[str, set[str]] = defaultdict(set)
    for case in CASES:
        for field in unusual_fields(decoder_spec(config_of(case))[0]):
            found[field].add(FAMILIES[case.described])
    return found


def repeated(texts: Mapping[str, list[str]]) -> Iterator[tuple[str, str, int]]:
    """Pairs of families with a run of equal lines, and how many lines the longest has."""
    for (a, first), (b, second) in combinations(texts.items(), 2):
        longest, before = 0, [0] * (len(second) + 1)
        for line in first:
            row = [0] * (len(second) + 1)
            for j, other in enumerate(second):
                row[j + 1] = before[j] + 1 if line == other else 0
            longest, before = max(longest, *row), row
        if longest >= RUN:
            yield a, b, longest


def main() -> None:
    texts, by_field = functions(), users()
    num_lines = sum(map(len, texts.values()))
    print(f"{len(FAMILIES)} architectures, {len(texts)} families, {num_lines} lines of them\n")
    print("lines  family  architectures")
    for name, lines in sorted(texts.items(), key=lambda item: -len(item[1])):
        named = ", ".join(sorted(a for a, function in FAMILIES.items() if function == name))
        print(f"{len(lines):5}  {name}  {named}")
    print("\nfamilies  field")
    for field, who in sorted(by_field.items(), key=lambda item: (len(item[1]), item[0])):
        few = f"  only {', '.join(sorted(who))}" if len(who) < RULE else ""
        print(f"{len(who):8}  {field}{few}")
    print(f"\nequal lines, {RUN} or more in a row")
    for a, b, count in sorted(repeated(texts), key=lambda pair: -pair[2]):
        print(f"{count:5}  {a}  {b}")


if __name__ == "__main__":
    main()
