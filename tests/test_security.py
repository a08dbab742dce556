"""What may not be in the tree: ways to run code that came as data, and checks that `python -O` removes."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.tree import all_files, calls, package_files, parse, where

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "marshal", "dill", "shelve", "joblib", "jsonpickle"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
}
CALLS |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.fromregex"}
CALLS |= {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
FLAGS = {"trust_remote_code", "allow_pickle", "shell"}
UNTRUSTED_TEMPLATES = {"jinja2.Environment", "jinja2.Template", "Environment", "Template"}


def dangers(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, a.name) for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from [(node, node.module)] if node.module.split(".")[0] in MODULES else []
            names = {f"{node.module}.{a.name}" for a in node.names}
            yield from ((node, name) for name in names & CALLS)
    for name, call in calls(tree):
        if name in CALLS | UNTRUSTED_TEMPLATES or name == "np.load" and not is_off(call, "allow_pickle"):
            yield call, name
        for keyword in call.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in FLAGS and not off:
                yield call, f"{keyword.arg}={ast.unparse(keyword.value)}"


def is_off(call: ast.Call, name: str) -> bool:
    """numpy's default; any value that is not the literal False counts as on."""
    values = [k.value for k in call.keywords if k.arg == name]
    return all(isinstance(v, ast.Constant) and v.value is False for v in values)


def test_no_data_is_run_as_code() -> None:
    wrong = [f"{where(path, node)}: {what}" for path in all_files() for node, what in dangers(parse(path))]
    assert wrong == []


def test_dangers_are_found() -> None:
    for text in (
        "import pickle",
        "from dill import loads",
        "import cloudpickle as c",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "from torch import load",
        "yaml.load(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "np.load(path, allow_pickle=True)",
        "jinja2.Environment()",
    ):
        assert list(dangers(ast.parse(text))), text
    for text in (
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "re.compile('a')",
        "np.load(path)",
    ):
        assert not list(dangers(ast.parse(text))), text


def asserts(path: Path) -> Iterator[ast.Assert]:
    yield from (node for node in ast.walk(parse(path)) if isinstance(node, ast.Assert))


def test_the_package_does_not_check_with_assert() -> None:
    """`python -O` removes asserts; what must hold is checked with an error that says what to do."""
    assert [where(path, node) for path in package_files() for node in asserts(path)] == []


def test_no_handler_hides_every_error() -> None:
    wrong = [
        where(path, node)
        for path in package_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert wrong == []
