"""Starting is cheap: heavy libraries are loaded where they are used. Times are in benchmarks/startup.py."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "rich")
REPORT = f"""
import sys
for name in {HEAVY!r}:
    if name in sys.modules:
        sys.stderr.write("loaded " + name)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_loads_nothing_heavy() -> None:
    done = python("import quire\n" + REPORT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words", [[], ["run"], ["chat"], ["bench"], ["bench", "throughput"], ["inspect"], ["replay"]]
)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    call = f"from quire.cli.main import main\ntry: main({[*words, '--help']!r})\n"
    call += "except SystemExit as e: code = e.code\n"
    done = python(call + REPORT + "sys.exit(code)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: quire")


def test_public_names_exist_and_are_typed() -> None:
    done = python("import quire\nfor name in quire.__all__: getattr(quire, name)\nprint(*dir(quire))")
    assert done.stderr == ""
    assert {"LLM", "SamplingParams", "QuireError", "__version__"} <= set(done.stdout.split())


def test_an_unknown_name_is_an_attribute_error() -> None:
    done = python("import quire\ntry: quire.Nothing\nexcept AttributeError as e: print(e)")
    assert done.stdout.strip() == "module 'quire' has no attribute 'Nothing'"
