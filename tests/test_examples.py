"""Every example and the README's Python run as they are, with the model that comes with Quire."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.make_tiny import make
from quire.cli.options import config_from
from quire.cli.serve import add_options
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


def containers(part: object) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield from part.get("containers", ())
    if isinstance(part, dict | list):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from containers(inner)


@pytest.mark.parametrize("name", ["deployment", "leaderworkerset"])
def test_manifests_have_commands_that_there_are(name: str) -> None:
    text = (ROOT / f"examples/kubernetes/{name}.yaml").read_text()
    found = [each for document in yaml.safe_load_all(text) for each in containers(document)]
    for container in found:
        parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
        add_options(parser)
        assert container["command"] == ["quire"] and container["args"][0] == "serve"
        args = parser.parse_args(container["args"][1:])
        assert config_from(args).tensor_parallel_size in (
            1,
            2 * container["resources"]["limits"]["nvidia.com/gpu"],
        )
        for file in (value for value in vars(args).values() if str(value).startswith("/")):
            assert Path(file).parent == Path(container["volumeMounts"][0]["mountPath"])
    assert found


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_pages_name_files_that_exist(page: str) -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|md|toml|txt))`", (ROOT / page).read_text()))
    there = [f"/{path.relative_to(ROOT)}" for path in (*all_files(), *ROOT.glob("*.*"), *ROOT.glob("docs/*"))]
    assert named
    assert sorted(name for name in named if not any(path.endswith(f"/{name}") for path in there)) == []
