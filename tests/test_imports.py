"""Imports point one way. The table of ranks is the architecture; change it in a change of its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.tree import PACKAGE, ROOT, package_files, parse, where

RANKS = (
    {"errors", "log", "types", "config"},
    {"models", "scheduler", "text", "grammar"},
    {"platforms", "parallel", "kernels"},
    {"quant", "checkpoint", "attention"},
    {"layers", "resolve"},
    {"sampling", "speculate", "lora"},
    {"runner", "kvstore", "media"},
    {"engine"},
    {"llm", "server", "cli"},
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
PURE = {"errors", "types", "config", "models", "scheduler"}
NOT_IN_PURE = {"torch", "numpy", "triton", "transformers", "time", "random", "datetime", "secrets", "uuid"}
BELOW_TORCH = {name for names in RANKS[:2] for name in names}
TORCH = {"torch", "triton", "torchvision"}


def part_of(path: Path) -> str:
    """`models` of quire/models/spec.py, `llm` of quire/llm.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere below `node`: at the top, in functions, or for types only."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield module, child.lineno
            if module == "quire":
                yield from ((f"quire.{a.name}", child.lineno) for a in child.names if a.name != "__version__")


def parts(path: Path) -> Iterator[tuple[str, int]]:
    """The parts of Quire that a file imports, other than its own."""
    for name, line in imports(parse(path)):
        head, *rest = name.split(".")
        if head == "quire" and rest and rest[0] != part_of(path):
            yield rest[0], line


def modules() -> list[Path]:
    return [path for path in package_files() if path != PACKAGE / "__init__.py"]  # that one imports lazily


def test_every_part_has_a_rank() -> None:
    assert {part_of(path) for path in modules()} - RANK.keys() == set()


def test_no_part_imports_one_above_it() -> None:
    wrong = [
        f"{where(path, line)}: {part_of(path)} is rank {RANK[part_of(path)]}, {name} is rank {RANK.get(name)}"
        for path in modules()
        for name, line in parts(path)
        if RANK.get(name, len(RANKS)) > RANK[part_of(path)]
    ]
    assert wrong == []


def test_parts_of_one_rank_do_not_import_each_other_in_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for path in modules():
        edges.setdefault(part_of(path), set()).update(name for name, _ in parts(path))
    assert circles(edges) == []


def test_files_do_not_import_each_other_in_a_circle() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    edges = {name: at_import(name, path, names) for name, path in names.items()}
    assert circles(edges) == []


def at_import(name: str, path: Path, names: dict[str, Path]) -> set[str]:
    """Files that are loaded while this one is, that is, by imports outside functions and type checking."""
    found: set[str] = set()
    for node in parse(path).body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
            found.update(below or {node.module})
    return (found & names.keys()) - {name}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Each set of nodes that can reach one another, and has more than one."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = edges.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reached = {name: reach(name) for name in edges}
    found = {
        frozenset(other for other in edges if other in reached[name] and name in reached[other])
        for name in edges
    }
    return sorted(sorted(group) for group in found if len(group) > 1)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_pure_parts_know_no_clock_no_chance_and_no_tensors() -> None:
    wrong = [
        f"{where(path, line)}: {part_of(path)} is pure and imports {name}"
        for path in modules()
        if part_of(path) in PURE
        for name, line in imports(parse(path))
        if name.split(".")[0] in NOT_IN_PURE
    ]
    assert wrong == []


def test_torch_begins_at_rank_two() -> None:
    wrong = [
        f"{where(path, line)}: {part_of(path)} imports {name}"
        for path in modules()
        if part_of(path) in BELOW_TORCH
        for name, line in imports(parse(path))
        if name.split(".")[0] in TORCH
    ]
    assert wrong == []


def test_every_folder_says_what_it_is() -> None:
    folders = {path.parent for path in package_files()}
    silent = [
        f
        for f in folders
        if not (f / "__init__.py").exists() or not ast.get_docstring(parse(f / "__init__.py"))
    ]
    assert sorted(str(folder.relative_to(ROOT)) for folder in silent) == []


def test_imports_are_absolute() -> None:
    wrong = [
        f"{where(path, line)}: {name}"
        for path in package_files()
        for name, line in imports(parse(path))
        if name.startswith(".")
    ]
    assert wrong == []
