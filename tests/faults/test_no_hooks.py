"""Faults live in this folder only: what is installed has no way to ask for one."""

import argparse
import ast
import dataclasses
import re
import tomllib
from fnmatch import fnmatch

from quire.cli import serve
from quire.config import Config
from quire.server.settings import ServerSettings
from tests.faults import injection
from tests.tree import PACKAGE, ROOT, calls, package_files, parse, where

HOOK = re.compile(r"inject|sabotage|chaos|simulate|fault(?!handler)", re.IGNORECASE)
NOT_HOOKS = re.compile(r"default|segfault|CLIENTS_FAULT", re.IGNORECASE)
IDENTIFIERS = (ast.Name, ast.Attribute, ast.arg, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def identifier(node: ast.AST) -> str:
    return next((value for key, value in ast.iter_fields(node) if key in ("id", "attr", "arg", "name")), "")


def is_hook(name: str) -> bool:
    return HOOK.search(NOT_HOOKS.sub("", name)) is not None


def test_no_name_in_the_package_is_a_hooks() -> None:
    wrong = [
        f"{where(path, node)}: {identifier(node)}"
        for path in package_files()
        for node in ast.walk(parse(path))
        if isinstance(node, IDENTIFIERS) and is_hook(identifier(node))
    ]
    assert wrong == []


def test_hooks_are_found() -> None:
    assert all(map(is_hook, ("fault_at", "inject", "FaultPlan", "default_fault")))
    assert not any(map(is_hook, ("default", "faulthandler", "DefaultDict", "entry")))


def test_no_option_asks_for_a_fault_or_another_entry() -> None:
    parser = argparse.ArgumentParser()
    serve.add_options(parser)
    names = {option for action in parser._actions for option in action.option_strings}
    names |= {field.name for kind in (Config, ServerSettings) for field in dataclasses.fields(kind)}
    assert len(names) > 50
    assert [name for name in names if is_hook(name) or "entry" in name] == []


def test_only_the_engines_own_module_is_ever_entered() -> None:
    """An `entry` is handed on, or is a module of this package; no value of it comes from outside."""
    wrong = []
    for path in package_files():
        wrong += [
            where(path, call)
            for _, call in calls(parse(path))
            for keyword in call.keywords
            if keyword.arg == "entry" and not isinstance(keyword.value, ast.Name | ast.Attribute)
        ]
        wrong += [
            where(path, node)
            for node in ast.walk(parse(path))
            if isinstance(node, ast.FunctionDef)
            for name, default in defaults(node)
            if name == "entry" and not isinstance(default, ast.Name)
        ]
    assert wrong == []


def defaults(node: ast.FunctionDef) -> list[tuple[str, ast.expr]]:
    """Arguments that have one."""
    plain = node.args.args[len(node.args.args) - len(node.args.defaults) :]
    pairs = [*zip(plain, node.args.defaults, strict=True)]
    pairs += [
        (a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None
    ]
    return [(argument.arg, default) for argument, default in pairs]


def test_the_package_knows_nothing_of_these_files() -> None:
    mark = str(injection.MARK)[1:-1]
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(rf"[\"']{injection.VARIABLE}[\"']", text), path
        assert not re.search(r"^\s*(from|import) tests\b", text, re.MULTILINE), path
        assert mark not in text, path


def test_these_files_are_not_installed() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = tool["packages"]["find"]["include"]
    assert any(fnmatch("quire.server", pattern) for pattern in patterns)
    assert not any(fnmatch(name, pattern) for name in ("tests", "tests.faults") for pattern in patterns)
    assert all("tests" not in pattern for many in tool["package-data"].values() for pattern in many)
