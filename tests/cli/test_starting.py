"""SIGINT while a command starts ends it, whatever the module that is being imported then makes of exceptions."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND

ROOT = Path(__file__).parent.parent.parent
SWALLOWS = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            sys.stdout.write("importing")
            sys.stdout.flush()
            try:
                os.kill(os.getpid(), signal.{kind})
                for _ in range(1000):
                    pass  # Python's handlers run between its instructions
            except BaseException:
                pass

sys.meta_path.insert(0, Finder())
"""
SERVE, MODEL = ["--port", "0"], ["--device", "cpu", "--max-model-len", "64"]
COMMANDS = {
    "serve": (["serve", "{model}", *SERVE, *MODEL], "uvloop"),
    "serve, its settings": (["serve", "{model}", *SERVE, *MODEL], "quire.server.settings"),
    "several servers": (["serve", "{model}", *SERVE, *MODEL, "--api-server-count", "2"], "quire.server.run"),
    "a router": (["router", "--backend", "http://127.0.0.1:9", *SERVE], "quire.server.router.site"),
    "run": (["run", "{model}", "hello", *MODEL], "torch"),
    "chat": (["chat", "{model}", *MODEL], "quire.llm"),
    "bench": (["bench", "latency", "{model}", *MODEL], "torch"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(("kind", "code"), [("SIGINT", 130), ("SIGTERM", -signal.SIGTERM)])
def test_a_signal_ends_it(tmp_path: Path, tiny: str, name: str, kind: str, code: int) -> None:
    words, module = COMMANDS[name]
    (tmp_path / "sitecustomize.py").write_text(SWALLOWS.format(module=module, kind=kind))
    done = subprocess.run(
        [*COMMAND, *(word.format(model=tiny) for word in words)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("importing", code)
    assert done.stderr == ("interrupted\n" if kind == "SIGINT" else "")
