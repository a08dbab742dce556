"""`quire connect` asks a live server, and prints what shells and parsers of TOML and JSON read as meant."""

import json
import socket
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import closing

import pytest

from quire.cli.main import FAILED, USER_ERROR, main
from tests.cli.peer import Manners
from tests.cli.peer import serving as other_server
from tests.server.conftest import InProcess, Live, serving

KEY = "QUIRE_API_KEY"
ODD = """a "b" $(c) 'd' é\\n"""  # as little as shells and files can be trusted with
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture(scope="module")
def keyed(service: InProcess) -> Iterator[Live]:
    with serving(service, served_model_name=(ODD,), api_key=("secret",)) as live:
        yield live


def connect(capsys: Capture, *words: str, code: int = 0) -> str:
    """What it prints; of what fails, why."""
    assert main(["connect", *words]) == code
    done = capsys.readouterr()
    assert (done.out == "") == bool(code)
    return done.err if code else done.out


def environment(commands: str, **before: str) -> dict[str, str]:
    done = subprocess.run(["sh", "-c", f"{commands}env -0"], env=before, capture_output=True, check=True)
    assert not done.stderr
    return dict(line.split("=", 1) for line in done.stdout.decode().split("\0") if line)


def test_of_claude_a_shell_makes_variables(live: Live, capsys: Capture) -> None:
    found = environment(connect(capsys, "claude", "--url", live.url), ANTHROPIC_API_KEY="another")
    models = {name for name, value in found.items() if value == "demo"}
    tiers = {f"ANTHROPIC_DEFAULT_{tier}_MODEL" for tier in ("OPUS", "SONNET", "HAIKU", "FABLE")}
    assert models == {"ANTHROPIC_MODEL", *tiers}
    assert (found["ANTHROPIC_BASE_URL"], found["ANTHROPIC_AUTH_TOKEN"]) == (live.url, "none")
    assert found["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "2048"
    assert "ANTHROPIC_API_KEY" not in found


def test_of_codex_it_is_toml(live: Live, capsys: Capture) -> None:
    found = tomllib.loads(connect(capsys, "codex", "--url", f"{live.url}/v1/", "--model", "small"))
    assert (found["model"], found["model_provider"], found["model_context_window"]) == (
        "small",
        "quire",
        2048,
    )
    assert found["model_providers"] == {
        "quire": {"name": "Quire", "base_url": f"{live.url}/v1", "wire_api": "responses"}
    }


def test_of_opencode_it_is_json(live: Live, capsys: Capture) -> None:
    found = json.loads(connect(capsys, "opencode", "--url", live.url))
    provider = found["provider"]["quire"]
    assert found["model"] == found["small_model"] == "quire/demo"
    assert provider["options"] == {"baseURL": f"{live.url}/v1"}
    assert provider["models"] == {"demo": {"limit": {"context": 2048, "output": 512}}}


def test_keys_stay_in_the_environment(keyed: Live, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEY in connect(capsys, "codex", "--url", keyed.url, code=USER_ERROR)
    monkeypatch.setenv(KEY, "wrong")
    assert "401" in connect(capsys, "codex", "--url", keyed.url, code=FAILED)
    monkeypatch.setenv(KEY, "secret")
    claude, codex, opencode = (
        connect(capsys, agent, "--url", keyed.url) for agent in ("claude", "codex", "opencode")
    )
    assert "secret" not in claude + codex + opencode
    found = environment(claude, **{KEY: "secret"})
    assert (found["ANTHROPIC_AUTH_TOKEN"], found["ANTHROPIC_MODEL"]) == ("secret", ODD)
    written = tomllib.loads(codex)
    assert (written["model"], written["model_providers"]["quire"]["env_key"]) == (ODD, KEY)
    written = json.loads(opencode)
    assert written["model"] == f"quire/{ODD}"
    assert written["provider"]["quire"]["options"]["apiKey"] == f"{{env:{KEY}}}"


def test_what_is_not_there_is_named(live: Live, capsys: Capture) -> None:
    message = connect(capsys, "claude", "--url", live.url, "--model", "large", code=USER_ERROR)
    assert message == f"error: model is 'large'; {live.url} has demo, small\n"
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    message = connect(capsys, "claude", "--url", f"http://127.0.0.1:{port}", code=FAILED)
    assert message.startswith(f"error: no connection to http://127.0.0.1:{port}: ")
    with other_server(Manners()) as peer:
        connect(capsys, "claude", "--url", f"http://127.0.0.1:{peer.port}", code=FAILED)
    assert "base_url" in connect(capsys, "claude", "--url", "here", code=USER_ERROR)
