"""Every example and the README's Python run as they are, with the model that comes with Quire."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.make_tiny import make
from tests.tree import ROOT, all_files


def python(*words: str) -> list[str]:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["offline", "streams"])
def test_example(name: str) -> None:
    found = python(f"examples/{name}.py")
    assert len(found) == 3
    assert all(re.match(r"'[\w +?]+' -> ['\"].+['\"]", line) for line in found)


def test_a_tiny_model_is_the_same_each_time(tmp_path: Path) -> None:
    tiny, again = make(tmp_path / "tiny"), make(tmp_path / "again")
    for path in again.iterdir():
        assert path.read_bytes() == (tiny / path.name).read_bytes(), path.name


def test_readme() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= 12
    assert len(python("-c", blocks[0])) >= 3


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_pages_name_files_that_exist(page: str) -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|md|toml|txt))`", (ROOT / page).read_text()))
    there = [f"/{path.relative_to(ROOT)}" for path in (*all_files(), *ROOT.glob("*.*"), *ROOT.glob("docs/*"))]
    assert named
    assert sorted(name for name in named if not any(path.endswith(f"/{name}") for path in there)) == []
