"""What the command says and exits with."""

import argparse
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from quire import __version__
from quire.cli.main import main
from quire.cli.options import same_dashes, whole
from quire.models.catalog import rows
from tests.cli.conftest import COMMAND, Quire
from tests.processes import started


def test_version(process: Quire) -> None:
    assert process("--version").stdout == f"quire {__version__}\n"


@pytest.mark.parametrize("words", [[], ["dance"], ["run"], ["run", "m", "p", "--dance"], ["bench"]])
def test_what_cannot_be_parsed_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert capsys.readouterr().err.startswith("usage: quire")


def test_user_errors_are_one_line_and_exit_code_2(process: Quire, folder: Path) -> None:
    done = process("inspect", str(folder))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert str(folder) in done.stderr


def test_a_missing_file_is_a_user_error(quire: Quire, folder: Path) -> None:
    done = quire("replay", str(folder / "nothing"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert str(folder / "nothing") in done.stderr
    assert done.stderr.count("\n") == 1


def test_debug_shows_where(process: Quire, folder: Path) -> None:
    done = process("inspect", str(folder), QUIRE_LOG_LEVEL="DEBUG")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_an_unknown_log_level_is_named(process: Quire, folder: Path) -> None:
    done = process("inspect", str(folder), QUIRE_LOG_LEVEL="LOUD")
    assert "QUIRE_LOG_LEVEL is 'LOUD'; it must be one of DEBUG, INFO, WARNING, ERROR" in done.stderr


def test_a_bad_option_is_a_user_error(quire: Quire, tiny: str) -> None:
    done = quire("run", tiny, "hello", "--gpu-memory-utilization", "7")
    assert done.returncode == 2
    assert done.stderr.startswith("error: gpu_memory_utilization is 7.0")


def test_models_are_listed(quire: Quire) -> None:
    found = json.loads(quire("models", "--json").stdout)
    assert found == [dict(row) for row in rows()]
    gemma, other = (row for row in found if row["architecture"] == "Gemma2ForCausalLM")
    assert (gemma["road"], other["road"]) == ("native", "transformers")
    assert gemma["road"] == "native"
    assert gemma["verified"]
    assert {"attention.window", "attention.softcap"} <= set(gemma["features"])
    names = [line.split()[0] for line in quire("models").stdout.splitlines()]
    assert names == [row["architecture"] for row in found]


def test_inspect_prints_a_network(quire: Quire, tiny: str) -> None:
    text = quire("inspect", tiny).stdout
    assert text.startswith("Qwen3ForCausalLM, native\n")
    assert "512" in text
    assert "64" in text


def test_inspect_compares(quire: Quire, tiny: str, folder: Path) -> None:
    config = (Path(tiny) / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))
    assert quire("inspect", tiny, tiny).stdout == "no difference\n"
    assert quire("inspect", tiny, str(folder)).stdout not in ("", "no difference\n")


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("DiffLlamaForCausalLM", "DiffLlamaForCausalLM runs through Transformers' modules"),
        ("XLMWithLMHeadModel", "not served through Transformers' modules: its config cannot be shrunk"),
    ],
)
def test_inspect_names_the_other_road(quire: Quire, architecture: str, words: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert words in quire("inspect", str(folder)).stderr


def test_dashes_and_underscores_are_equal() -> None:
    words = ["--max_tokens=a_b", "--top-p", "a_b", "-x_y", "--", "--not_touched"]
    assert same_dashes(words) == ["--max-tokens=a_b", "--top-p", "a_b", "-x_y", "--", "--not_touched"]


@pytest.mark.parametrize("text", ["", "k", "1.5", "1e3", "4kk", "0x10"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
        whole(text)


def test_interrupting_is_quiet(tiny: str) -> None:
    with started(
        [*COMMAND, "chat", tiny, "--max-tokens", "4"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.readline()  # it has answered, so it waits for the next line
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(60) == 130
    assert "Traceback" not in errors


def test_a_closed_pipe_is_quiet(tiny: str) -> None:
    read, write = os.pipe()
    with started(
        [*COMMAND, "run", tiny, "hello", "--max-tokens", "2000", "--ignore-eos"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(write)
        assert os.read(read, 1)
        os.close(read)
        errors = process.stderr.read()
        assert process.wait(60) == 1
    assert "Traceback" not in errors
    assert "Broken pipe" not in errors
