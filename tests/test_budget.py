"""Sizes are limits, set in pyproject.toml. `python -m tests.test_budget` prints lines by folder."""

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.tree import PACKAGE, ROOT, all_files, calls, package_files, parse, where

BUDGET = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["budget"]
NATIVE = {".cpp", ".cu", ".h", ".inl"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(tree: ast.Module) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def is_frozen(node: ast.ClassDef) -> bool:
    """A value: a frozen dataclass, or a frozen model of pydantic's."""
    marks = [ast.unparse(d) for d in node.decorator_list]
    marks += [ast.unparse(n) for n in node.body if isinstance(n, ast.Assign)]
    return any(("dataclass" in mark or "ConfigDict" in mark) and "frozen=True" in mark for mark in marks)


def attributes(node: ast.ClassDef) -> set[str]:
    """Names a class's objects carry: `self.x = ...` anywhere in it, and fields that its body declares."""
    names = {
        child.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute)
        and isinstance(child.ctx, ast.Store)
        and isinstance(child.value, ast.Name)
        and child.value.id == "self"
    }
    fields = {
        n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    return names | fields


def arguments(node: Function) -> list[str]:
    a = node.args
    return [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs) if arg.arg not in ("self", "cls")]


def test_files() -> None:
    native = [path for path in PACKAGE.rglob("*") if path.suffix in NATIVE]
    limit = BUDGET["lines_per_file"]
    sizes = {str(path.relative_to(ROOT)): num_lines(path) for path in [*all_files(), *native]}
    assert {path: lines for path, lines in sizes.items() if lines > limit} == {}


def test_functions() -> None:
    limit = BUDGET["lines_per_function"]
    long = [
        f"{where(path, f)}: {f.name} has {length} lines"
        for path in all_files()
        for f in functions(parse(path))
        if (length := (f.end_lineno or 0) - f.lineno + 1) > limit
    ]
    assert long == []


def is_kernel(node: Function) -> bool:
    """One that Triton compiles: it gets its pointers and sizes one by one, since it has no structures."""
    return any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)


def test_arguments() -> None:
    limit = BUDGET["arguments_per_function"]
    many = [
        f"{where(path, f)}: {f.name} takes {len(arguments(f))}"
        for path in all_files()
        for f in functions(parse(path))
        if len(arguments(f)) > limit and not is_kernel(f)
    ]
    assert many == []


def test_attributes() -> None:
    limit = BUDGET["attributes_per_class"]
    many = [
        f"{where(path, c)}: {c.name} has {len(attributes(c))}"
        for path in package_files()
        for c in ast.walk(parse(path))
        if isinstance(c, ast.ClassDef) and not is_frozen(c) and len(attributes(c)) > limit
    ]
    assert many == []


def test_package() -> None:
    assert sum(num_lines(path) for path in package_files()) <= BUDGET["lines_of_package"]


def test_no_duck_typing() -> None:
    """An attribute whose name is known is written as an attribute, so that types and searches see it."""
    allowed = {ROOT / name for name in BUDGET["duck_typing_allowed_in"]}
    wrong = [
        f"{where(path, call)}: {ast.unparse(call)}"
        for path in package_files()
        if path not in allowed
        for name, call in calls(parse(path))
        if name in ("getattr", "hasattr", "setattr", "delattr")
        and len(call.args) > 1
        and isinstance(call.args[1], ast.Constant)
    ]
    assert wrong == []


def environment(tree: ast.Module) -> Iterator[tuple[ast.expr | None, ast.AST]]:
    """(name, node) of each use of the process environment; None where a use has no single name."""
    named: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            named.add(node.value)
            yield node.slice, node
        elif isinstance(node, ast.Compare) and any(is_environ(c) for c in node.comparators):
            named.update(node.comparators)
            yield node.left, node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if is_environ(node.func.value) and node.args:
                named.add(node.func.value)
                yield node.args[0], node
            elif node.func.attr in ("getenv", "putenv"):
                yield node.args[0], node
    yield from ((None, node) for node in ast.walk(tree) if is_environ(node) and node not in named)


def is_environ(node: ast.AST) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def test_environment_variables_are_listed() -> None:
    own = BUDGET["environment_variables"]
    listed = {*own, *BUDGET["environment_variables_of_launchers"]}
    used: set[str] = set()
    for path in package_files():
        for name, node in environment(parse(path)):
            ok = isinstance(name, ast.Constant) and name.value in listed
            assert ok, (
                f"{where(path, node)}: {ast.unparse(node)} is not in [tool.budget] environment_variables"
            )
            assert isinstance(name, ast.Constant)
            used.add(str(name.value))
    for path in PACKAGE.rglob("*"):
        if path.suffix in NATIVE:
            assert "getenv" not in path.read_text(encoding="utf-8"), path
    assert used == listed
    assert len(own) <= BUDGET["max_environment_variables"]


def test_environment_finds_every_spelling() -> None:
    tree = ast.parse(
        'os.environ["A"]; os.environ.get("B"); environ.setdefault("C", "")\n'
        'os.getenv("D"); "E" in os.environ; os.environ'
    )
    found = [name.value if isinstance(name, ast.Constant) else name for name, _ in environment(tree)]
    assert sorted(map(str, found)) == ["A", "B", "C", "D", "E", "None"]


def test_ignored_types_name_what_they_ignore() -> None:
    bare = re.compile(r"#\s*type:\s*ignore(?!\[)")
    wrong = [
        where(path, number)
        for path in package_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if bare.search(line)
    ]
    assert wrong == []


def main() -> None:
    totals: Counter[str] = Counter()
    for path in all_files():
        parts = path.relative_to(ROOT).parts
        folder = "/".join(parts[:2]) if parts[0] == "quire" and len(parts) > 2 else parts[0]
        totals[folder] += num_lines(path)
        if folder != parts[0] or parts[0] == "quire":
            totals["quire, all"] += num_lines(path)
    for folder, lines in sorted(totals.items()):
        print(f"{lines:7,}  {folder}")


if __name__ == "__main__":
    main()
