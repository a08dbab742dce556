"""A tiny checkpoint with random weights, and two ways to give the command: here, or as its own process."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.make_tiny import make
from quire.cli.main import main

COMMAND = [sys.executable, "-m", "quire.cli.main"]


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


Quire = Callable[..., Done]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def quire(monkeypatch: pytest.MonkeyPatch) -> Quire:
    """The command in this process, which has loaded torch already. Log lines are not captured."""

    def run(*words: str, input: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = main(words)
        return Done(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def process() -> Quire:
    """The command as users give it; `environment` is added to this process's."""

    def run(*words: str, **environment: str) -> Done:
        env = {**os.environ, **environment}
        done = subprocess.run([*COMMAND, *words], env=env, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a test may write."""
    return tmp_path
