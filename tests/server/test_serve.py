"""`quire serve` as users start and stop it: its own process, and the engine's, and nothing left of them."""

import contextlib
import json
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import PARIS
from tests.server.raw import connect
from tests.server.served import COMMAND, OPTIONS, Served, gone, interrupted_at_once, serve

MAX_LINES = 25
LISTENS = "0A"  # as /proc/net/tcp writes it
LONG = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True, "stream": True}


def test_what_is_printed_until_ready(served: Served) -> None:
    assert len(served.greeting) + len(served.first_log.splitlines()) <= MAX_LINES
    assert served.greeting[0].startswith("Serving demo: ") and "KV cache" in served.greeting[0]
    assert "  Of answers it reads tool calls as hermes, reasoning as think." in served.greeting
    assert httpx.get(f"{served.url}/readyz").text == "ready"


@pytest.mark.skipif(shutil.which("curl") is None, reason="the command is curl's")
def test_the_printed_command_works(served: Served) -> None:
    words = shlex.split(served.greeting[-1])
    answer = subprocess.run(words, capture_output=True, check=True, timeout=60).stdout
    assert json.loads(answer)["choices"][0]["message"]["content"] == PARIS


def test_the_frontend_has_no_torch(served: Served) -> None:
    frontend, *others = served.family()
    assert "libtorch" not in Path(f"/proc/{frontend}/maps").read_text()
    assert any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in others)


def test_it_listens_at_one_loopback_port_and_nowhere_else(served: Served) -> None:
    """Processes talk over socket pairs, which have no name that anybody else could use."""
    inodes = set()
    for pid in served.family():
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # it was closed meanwhile
                inodes.add(entry.readlink().name.removeprefix("socket:[").removesuffix("]"))
    listening, names = [], []
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENS and words[9] in inodes:
                listening.append(words[1])
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if words[6] in inodes:
            names += words[7:]
    port = int(served.url.rpartition(":")[2])
    assert listening == [f"0100007F:{port:04X}"] and names == []


@pytest.mark.slow
def test_a_signal_lets_streams_end(tmp_path: Path) -> None:
    with serve(tmp_path / "log") as served:
        family = served.family()
        with httpx.stream("POST", f"{served.url}/v1/completions", json=LONG, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert served.process.wait(60) == 0
        assert gone(family)


@pytest.mark.slow
def test_a_drain_has_an_end(tmp_path: Path) -> None:
    with serve(tmp_path / "log", "--drain-timeout", "0") as served:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=LONG, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGINT)
            *_, error, done = [line for line in lines if line]
        assert done == "data: [DONE]" and json.loads(error[6:])["error"]["code"] == 503
        assert served.process.wait(60) == 0


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with serve(tmp_path / "log", "--drain-timeout", "600") as served:
        family = served.family()
        with connect(served.url) as connection:  # it holds a request open and reads nothing
            body = json.dumps({**LONG, "n": 16, "temperature": 1, "logprobs": 20}).encode()
            kind = "Host: x\r\nContent-Type: application/json"
            head = f"POST /v1/completions HTTP/1.1\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            served.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{served.url}/readyz").status_code == 200:
                pass  # the first signal is being handled
            assert served.stop() == 130
        assert gone(family)


def test_a_signal_while_it_starts(tmp_path: Path) -> None:
    """Probes are answered before the engine is there."""
    assert interrupted_at_once(tmp_path / "log", "/startupz") == ("starting", 130)
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/no/such/folder"], "/no/such/folder"),
        (["demo", "--max-model-len", "4096"], "max_model_len"),
        (["demo", "--api-key", "with space"], "api_key"),
        (["demo", "--api-key-file", "/no/such/file"], "/no/such/file"),
        (["demo", "--host", "256.0.0.1"], "cannot listen"),
        (["demo", "--ssl-certfile", "/no/such/file"], "No such file"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(words: list[str], message: str) -> None:
    done = subprocess.run(
        [*COMMAND, *OPTIONS, *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        words = [*COMMAND, "demo", "--port", port]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and f"port {port}: Address already in use" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_https(tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    options = [
        "--ssl-keyfile",
        key,
        "--ssl-certfile",
        certificate,
        "--api-key",
        "sesame",
        "--served-model-name",
        "x",
    ]
    with serve(tmp_path / "log", *options) as served:
        assert served.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=certificate)
        headers = {"Authorization": "Bearer sesame"}
        answer = httpx.get(f"{served.url}/v1/models", verify=trusted, headers=headers)
        assert answer.json()["data"][0]["id"] == "x"
        assert served.greeting[-1].endswith('-H "Authorization: Bearer $KEY"')
        assert "sesame" not in "\n".join(served.greeting) + served.log.read_text()
