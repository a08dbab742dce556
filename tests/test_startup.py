"""Starting is cheap: heavy libraries are loaded where they are used. Times are in benchmarks/startup.py."""

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "rich")
HEAVY += ("fastapi", "pydantic", "uvicorn", "msgspec", "prometheus_client")
REPORT = f"""
import sys
for name in {HEAVY!r}:
    if name in sys.modules:
        sys.stderr.write("loaded " + name)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    spinning = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    inherited = {name: value for name, value in os.environ.items() if name not in spinning}
    command, env = [sys.executable, "-c", code], inherited | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_import_loads_nothing_heavy() -> None:
    done = python("import quire\n" + REPORT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["serve"],
        ["router"],
        ["run"],
        ["chat"],
        ["demo"],
        ["bench"],
        ["bench", "throughput"],
        ["bench", "serve"],
        ["bench", "kernels"],
        ["models"],
        ["inspect"],
        ["replay"],
    ],
)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    call = f"from quire.cli.main import main\ntry: main({[*words, '--help']!r})\n"
    call += "except SystemExit as e: code = e.code\n"
    done = python(call + REPORT + "sys.exit(code)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: quire")


def test_the_server_loads_no_torch() -> None:
    done = python("import quire.server.run, sys\nassert 'torch' not in sys.modules")
    assert (done.returncode, done.stderr) == (0, "")


def test_answering_loads_no_compiler() -> None:
    """Torch loads its own when it is watched by someone that does not ask it not to, which takes a second."""
    call = "from quire import LLM, SamplingParams\nimport sys\n"
    call += "LLM('demo', device='cpu', num_threads=1).generate('Hello', SamplingParams(max_tokens=4))\n"
    done = python(call + "sys.exit('torch._dynamo' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_half_that_talks_to_users_loads_no_torch() -> None:
    done = python("import sys, quire.engine.remote\nprint({'torch', 'transformers'} & sys.modules.keys())")
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_public_names_exist_and_are_typed() -> None:
    done = python("import quire\nfor name in quire.__all__: getattr(quire, name)\nprint(*dir(quire))")
    assert done.stderr == ""
    assert {"LLM", "SamplingParams", "QuireError", "__version__"} <= set(done.stdout.split())


def test_an_unknown_name_is_an_attribute_error() -> None:
    done = python("import quire\ntry: quire.Nothing\nexcept AttributeError as e: print(e)")
    assert done.stdout.strip() == "module 'quire' has no attribute 'Nothing'"


@pytest.mark.parametrize(
    ("environment", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_waiting_threads_spin_shortly_unless_told_otherwise(environment: dict[str, str], spins: str) -> None:
    done = python("import os, quire; print(os.environ.get('GOMP_SPINCOUNT'))", **environment)
    assert done.stdout.strip() == spins
