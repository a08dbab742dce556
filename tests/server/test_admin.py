"""What operators may do, over a Unix socket and a port, beside a server under load."""

import asyncio
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire import Config
from quire.engine.keeper import Keeper
from quire.engine.metrics import Metrics
from quire.errors import ConfigError
from quire.server.admin import Control, admin_app, listen_at_path, listen_at_port, read_keys
from quire.server.settings import ServerSettings
from tests.server.served import Served, gone, serve

KEY, TENANT_KEY = "operator-key-1", "tenant-key-1"
PUBLIC = {"Authorization": f"Bearer {TENANT_KEY}"}
SECRET = "a prompt that nobody else reads"
STORY = {"prompt": SECRET, "temperature": 0, "max_tokens": 400, "ignore_eos": True, "stream": True}
PATHS = ("requests", "abort", "reset_prefix_cache", "drain", "restart_engine", "server_info", "log_level")
WAIT_S = 60.0


class Site:
    """A server with both listeners."""

    def __init__(self, served: Served, path: Path):
        self.served, self.path = served, path
        self.client = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://operator")

    def get(self, path: str) -> Any:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask(self, **body: Any) -> httpx.Response:
        url = f"{self.served.url}/v1/completions"
        return httpx.post(url, json={**STORY, **body}, headers=PUBLIC, timeout=WAIT_S)

    @contextmanager
    def stream(self, **body: Any) -> Iterator[Iterator[str]]:
        """Lines of a stream whose first chunk has come."""
        url = f"{self.served.url}/v1/completions"
        with httpx.stream("POST", url, json={**STORY, **body}, headers=PUBLIC, timeout=WAIT_S) as answer:
            yield (line.removeprefix("data: ") for line in answer.iter_lines() if line)

    def admin_url(self) -> str:
        (line,) = [line for line in self.served.first_log.splitlines() if "operators: http://" in line]
        return line.split()[-1]


def until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@contextmanager
def administered(folder: Path, *options: str) -> Iterator[Site]:
    path, keys, tenants = folder / "admin.sock", folder / "keys", folder / "tenants"
    keys.write_text(f"# operators\n{KEY}\n")
    tenants.write_text(f"team {TENANT_KEY}\n")
    flags = ["--admin-socket", str(path), "--admin-port", "0", "--api-key-file", str(tenants)]
    with serve(folder / "log", *flags, "--admin-key-file", str(keys), *options) as served:
        site = Site(served, path)
        with site.client:
            yield site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with administered(tmp_path_factory.mktemp("admin")) as site:
        site.client.headers["Authorization"] = f"Bearer {KEY}"
        yield site


def text_of(lines: Iterator[str]) -> str:
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_only_this_user_may_open_the_socket(site: Site) -> None:
    assert stat.S_IMODE(site.path.stat().st_mode) == 0o600


def test_both_listeners_need_the_key_once_there_is_one(site: Site) -> None:
    url = site.admin_url()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, PUBLIC):
        for path in PATHS:
            assert httpx.get(f"{url}/{path}", headers=headers).status_code == 401
    assert httpx.get(f"{url}/requests", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(site.path)), base_url="http://x") as client:
        assert client.post("/drain").status_code == 401


def test_the_public_port_has_none_of_it(site: Site) -> None:
    for headers in (PUBLIC, {**PUBLIC, "Authorization": f"Bearer {KEY}"}):
        wanted = 404 if headers is PUBLIC else 401
        for path in PATHS:
            assert httpx.post(f"{site.served.url}/{path}", headers=headers).status_code == wanted


def test_requests_are_listed_without_their_text(site: Site) -> None:
    assert site.get("/requests") == {"requests": []}
    with site.stream(n=2, temperature=1, seed=3) as lines:
        first = json.loads(next(lines))
        (row,) = until(lambda: [r for r in site.get("/requests")["requests"] if r["tokens"] > 8])
        assert row["id"].startswith(first["id"]) and row["tenant"] == "team"
        assert row["state"] == "running" and row["age_s"] > 0 and row["replays"] == 0
        assert row["prompt_tokens"] > 0 and row["priority"] == 0
        assert SECRET not in site.client.get("/requests").text
        assert site.get("/server_info")["num_requests"] == 1
    until(lambda: not site.get("/requests")["requests"])


def test_an_aborted_stream_is_told_so(site: Site) -> None:
    with site.stream() as lines:
        name = json.loads(next(lines))["id"]
        assert site.post("/abort", {"request_id": name}) == {"aborted": 1}
        *_, error, done = lines
    assert done == "[DONE]" and json.loads(error)["error"]["code"] == "request_cancelled"
    assert site.get("/requests") == {"requests": []}
    assert site.client.post("/abort", json={"request_id": name}).status_code == 404


def test_an_aborted_call_is_told_so(site: Site) -> None:
    answers: list[httpx.Response] = []
    body = {"stream": False, "prompt": ["one", "two"], "request_id": "mine"}
    thread = threading.Thread(target=lambda: answers.append(site.ask(**body)))
    thread.start()
    until(lambda: len(site.get("/requests")["requests"]) == 2)
    assert site.post("/abort", {"request_id": "cmpl-mine"}) == {"aborted": 2}
    thread.join(WAIT_S)
    (answer,) = answers
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "request_cancelled"


@pytest.mark.slow
def test_a_restart_of_the_engine_is_a_pause(site: Site) -> None:
    want = text_of(iter([site.ask(stream=False, max_tokens=100).text]))
    before = site.get("/server_info")
    with site.stream(return_timing=True, max_tokens=100) as lines:
        head = [next(lines), next(lines)]
        assert site.post("/restart_engine") == {"restarting": True}
        lines_after = list(lines)
    assert lines_after.pop() == "[DONE]"
    assert text_of(iter([*head, *lines_after])) == want
    assert json.loads(lines_after[-1])["timing"]["num_replays"] == 1
    after = until(lambda: (info := site.get("/server_info"))["status"] == "ready" and info)
    assert after["num_restarts"] == before["num_restarts"] + 1
    assert after["engine_pids"] != before["engine_pids"] and after["pid"] == before["pid"]
    assert gone(before["engine_pids"])


@pytest.mark.slow
def test_restarts_that_were_asked_for_are_nobodys_fault(site: Site) -> None:
    """More of them than crashes without progress are forgiven, and the same request in each."""
    want = text_of(iter([site.ask(stream=False).text]))
    with site.stream() as lines:
        head = [next(lines)]
        for _ in range(7):
            until(lambda: site.get("/server_info")["status"] == "ready")
            until(lambda: site.get("/requests")["requests"][0]["state"] == "running")
            site.post("/restart_engine")
        assert text_of(iter([*head, *lines])) == want
    assert site.get("/server_info")["status"] == "ready"


def test_a_reset_empties_the_prefix_cache(site: Site) -> None:
    def cached() -> int:
        usage = site.ask(stream=False, prompt="words and words " * 20, max_tokens=1).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() > 0
    assert site.post("/reset_prefix_cache") == {"success": True}
    assert cached() == 0
    assert cached() > 0


def test_the_log_level_changes(site: Site) -> None:
    assert site.get("/log_level") == {"level": "INFO"}
    assert site.post("/log_level", {"level": "WARNING"}) == {"level": "WARNING"}
    assert site.post("/log_level", {"level": "INFO"}) == {"level": "INFO"}
    assert "operator: /log_level" in site.served.log.read_text()
    assert site.client.post("/log_level", json={"level": "LOUD"}).status_code == 400


def test_info_holds_no_key(site: Site) -> None:
    info = site.get("/server_info")
    assert info["engine_options"]["model"] == "demo" and info["server_options"]["max_n"] == 16
    assert info["engine_options"]["max_model_len"] > 0 and info["uptime_s"] > 0
    text = json.dumps(info)
    assert KEY not in text and TENANT_KEY not in text and "api_key_file" in text


def test_what_is_wrong_is_refused(site: Site) -> None:
    assert site.client.get("/nothing").status_code == 404
    assert site.client.get("/drain").status_code == 405
    for body in ({}, {"request_id": ""}, {"request_id": "x", "all": True}, {"request": "x"}):
        answer = site.client.post("/abort", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert site.client.post("/abort", content=b"x" * 9999).status_code == 400
    large = site.client.post("/abort", json={"request_id": "x" * 9999})
    assert large.status_code == 413
    assert "operator: /drain" not in site.served.log.read_text()


@pytest.mark.slow
def test_a_drain_ends_the_server_and_its_socket(tmp_path: Path) -> None:
    with administered(tmp_path) as site:
        site.client.headers["Authorization"] = f"Bearer {KEY}"
        with site.stream(max_tokens=100) as lines:
            next(lines)
            assert site.post("/drain") == {"draining": True, "already": False}
            assert site.post("/drain") == {"draining": True, "already": True}  # and nothing is cut off
            assert len(text_of(lines)) > 100
        assert site.served.process.wait(WAIT_S) == 0
        assert not site.path.exists()


@pytest.mark.slow
def test_a_killed_servers_socket_is_replaced_and_two_frontends_have_one(tmp_path: Path) -> None:
    with administered(tmp_path) as site:
        family = site.served.family()
        os.kill(site.served.process.pid, signal.SIGKILL)
        assert gone(family) and site.path.exists()
    with administered(tmp_path, "--api-server-count", "2") as site:
        site.client.headers["Authorization"] = f"Bearer {KEY}"
        with site.stream() as lines:
            name = json.loads(next(lines))["id"]
            (row,) = site.get("/requests")["requests"]
            assert row["id"].startswith(name)
            assert site.post("/abort", {"request_id": name}) == {"aborted": 1}
            assert "request_cancelled" in list(lines)[-2]
        assert site.served.stop() == 0
    assert not site.path.exists()


def test_a_path_is_free_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with listen_at_path(path), pytest.raises(ConfigError, match="another server listens there"):
        listen_at_path(path)
    assert path.exists()  # as after a kill: nobody listens
    with listen_at_path(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    plain = tmp_path / "file"
    plain.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        listen_at_path(plain)
    assert plain.read_text() == "precious"
    for wrong in (tmp_path / ("x" * 200), tmp_path / "no" / "folder"):
        with pytest.raises(ConfigError, match="no socket can be there"):
            listen_at_path(wrong)


def test_a_link_to_a_socket_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no socket"):
        listen_at_path(tmp_path / "link")


def test_keys_are_read_and_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one # ours\n\n# none\n  two\n")
    assert read_keys(path) == ["one", "two"]
    for text, message in {"": "at least one key", "# x\n": "at least one", "good\nba d": "line 2"}.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            read_keys(path)
        assert "ba d" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "missing")


def test_a_port_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="admin_key_file"):
        ServerSettings(admin_port=0)
    with pytest.raises(ConfigError, match="admin_port"):
        ServerSettings(admin_port=1 << 16, admin_key_file="x")
    with pytest.raises(ConfigError, match="another one than port"):
        ServerSettings(admin_port=8000, admin_key_file="x")
    assert ServerSettings(admin_port=8001, admin_key_file="x").admin_host == "127.0.0.1"


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            listen_at_port("127.0.0.1", port)


def test_before_the_engine_is_ready() -> None:
    stops = iter((True, False))
    settings = ServerSettings(served_model_name=("demo",), api_key=(TENANT_KEY,))
    keeper = Keeper(Config(model="demo"), Metrics("demo", log_stats=False))
    transport = httpx.ASGITransport(admin_app(Control(keeper, settings, lambda: next(stops))))

    async def main() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            refused = await client.post("/restart_engine")
            assert refused.status_code == 409 and "starting" in refused.json()["error"]["message"]
            assert (await client.get("/requests")).json() == {"requests": []}
            info = await client.get("/server_info")
            assert info.json()["status"] == "starting" and TENANT_KEY not in info.text
            assert [(await client.post("/drain")).json()["already"] for _ in range(2)] == [False, True]

    asyncio.run(main())
