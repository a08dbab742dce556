"""Every example and the README's Python run, with a tiny model in place of a downloaded one."""

import re
import subprocess
import sys

import pytest

from examples.make_tiny import make
from tests.tree import ROOT, all_files

MODEL = "Qwen/Qwen3-0.6B"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make(tmp_path_factory.mktemp("tiny")))


def python(*words: str) -> list[str]:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["offline", "streams"])
def test_example(tiny: str, name: str) -> None:
    found = python(f"examples/{name}.py", tiny)
    assert len(found) == 3
    assert all(re.match(r"'[\w ]+' -> ['\"].+['\"]", line) for line in found)


def test_a_tiny_model_is_the_same_each_time(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    again = make(tmp_path_factory.mktemp("again"))
    for path in again.iterdir():
        assert path.read_bytes() == (again.parent / tiny / path.name).read_bytes(), path.name


def test_readme(tiny: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert MODEL in blocks[0]
    assert len(blocks[0].splitlines()) <= 12
    assert len(python("-c", blocks[0].replace(MODEL, tiny))) >= 3


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_pages_name_files_that_exist(page: str) -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|md|toml|txt))`", (ROOT / page).read_text()))
    there = [f"/{path.relative_to(ROOT)}" for path in (*all_files(), *ROOT.glob("*.*"), *ROOT.glob("docs/*"))]
    assert named
    assert sorted(name for name in named if not any(path.endswith(f"/{name}") for path in there)) == []
