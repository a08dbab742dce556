"""A tiny checkpoint with random weights, and the command in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.make_tiny import make

COMMAND = [sys.executable, "-c", "import sys; from quire.cli.main import main; sys.exit(main())"]
Quire = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def quire() -> Quire:
    def run(*words: str, input: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **environment}
        return subprocess.run(
            [*COMMAND, *words], input=input, env=env, capture_output=True, text=True, check=False, timeout=300
        )

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a test may write."""
    return tmp_path
