"""`quire demo` in a pipe, with a question and on a terminal."""

import os
import pty
import subprocess

import pytest

from quire.cli.main import main
from tests.cli.conftest import COMMAND, Quire
from tests.processes import started

GREEDY = ("--temperature", "0", "--max-tokens", "64")
QUESTION = "What is the capital of France?"


def test_a_pipe_gets_the_answers_only(quire: Quire) -> None:
    words = ("demo", *GREEDY)
    done = quire(*words, input=f"{QUESTION}\n/reset\n{QUESTION}\n")
    first, second = done.stdout.splitlines()
    assert "Paris" in first
    assert first == second
    assert "Ask it" not in done.stdout + done.stderr


def test_one_question(quire: Quire) -> None:
    done = quire("demo", QUESTION, *GREEDY, input="not read\n")
    assert done.stdout == quire("chat", "demo", *GREEDY, input=f"{QUESTION}\n").stdout
    assert done.stdout.count("\n") == 1


def test_a_question_that_is_too_long_fails_the_command(quire: Quire) -> None:
    done = quire("demo", "word " * 3000, "--max-model-len", "64")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the prompt is too long: at least 941 tokens > 63")
    assert done.stdout == ""


def test_a_system_prompt(quire: Quire) -> None:
    assert "PARIS" in quire("demo", QUESTION, "--system", "Answer in capitals.", *GREEDY).stdout


def test_a_terminal_is_told_what_to_ask() -> None:
    terminal, theirs = pty.openpty()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started([*COMMAND, "demo"], stdin=theirs, text=True, **pipes) as done:
        os.write(terminal, b"/quit\n")
        out, errors = done.communicate(timeout=60)
    os.close(theirs)
    os.close(terminal)
    assert (done.returncode, out) == (0, "")
    assert "What is the capital of France?" in errors
    assert "/quit ends it" in errors


@pytest.mark.parametrize("words", [["demo", "one", "two"], ["demo", "--model", "x"]])
def test_it_takes_no_other_model(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert capsys.readouterr().err.startswith("usage: quire demo")
