"""More than there is room for: who is refused, with what, and that nobody else notices."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from quire.errors import ConfigError
from quire.server.auth import Keys, admission_of
from quire.server.settings import ServerSettings
from tests.server.raw import until
from tests.server.served import Served, serve

KEYS = """
ada key-of-ada max_concurrent=1 share=2
bob key-of-bob requests_per_minute=2
eve key-of-eve tokens_per_minute=40
"""
LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "Once upon a time", "max_tokens": 1}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One request runs, two wait; the operator's key comes from the environment."""
    folder = tmp_path_factory.mktemp("overload")
    (folder / "keys").write_text(KEYS)
    options = ["--api-key-file", str(folder / "keys"), "--max-num-seqs", "1", "--max-num-queued-reqs", "2"]
    with serve(folder / "log", *options, QUIRE_API_KEY="of-the-environment") as served:
        yield served


def post(served: Served, key: str, body: dict[str, object]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=60)


def metric(served: Served, name: str) -> float:
    """The sum of a metric's samples."""
    text = httpx.get(f"{served.url}/metrics", headers={"Authorization": "Bearer of-the-environment"}).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))


def begin(stack: ExitStack, served: Served, key: str) -> httpx.Response:
    """A stream that has begun, and ends with the stack."""
    headers = {"Authorization": f"Bearer {key}"}
    ask = httpx.stream("POST", f"{served.url}/v1/completions", json=LONG, headers=headers, timeout=60)
    answer = stack.enter_context(ask)
    assert answer.status_code == 200
    return answer


def check_refusal(answer: httpx.Response, status: int, code: str, limit: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["limit"]) == (status, code, limit), error
    seconds = int(answer.headers["retry-after"])
    assert 1 <= seconds <= 120 and f"try again in {seconds} s" in error["message"]


def test_the_key_of_the_environment_opens_and_is_not_inherited(small: Served) -> None:
    assert post(small, "of-the-environment", SHORT).status_code == 200
    for pid in small.family()[1:]:
        assert b"of-the-environment" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_tenant_has_its_own_limits(small: Served) -> None:
    with ExitStack() as stack:
        stream = begin(stack, small, "key-of-ada")
        check_refusal(post(small, "key-of-ada", SHORT), 429, "rate_limit_exceeded", "tenant_concurrency")
        client = openai.OpenAI(base_url=f"{small.url}/v1", api_key="key-of-ada", max_retries=0)
        stack.enter_context(client)
        with pytest.raises(openai.RateLimitError, match="1 requests at a time"):
            client.completions.create(model="demo", prompt="x", max_tokens=1)
        stream.close()
    until(lambda: post(small, "key-of-ada", SHORT).status_code == 200)
    assert [post(small, "key-of-bob", SHORT).status_code for _ in range(2)] == [200, 200]
    check_refusal(post(small, "key-of-bob", SHORT), 429, "rate_limit_exceeded", "tenant_requests")
    assert post(small, "key-of-eve", {**SHORT, "prompt": [5] * 39}).status_code == 200
    check_refusal(post(small, "key-of-eve", SHORT), 429, "rate_limit_exceeded", "tenant_tokens")


def test_a_full_queue_is_503_and_those_in_it_are_served(small: Served) -> None:
    key, rejected = "of-the-environment", metric(small, "vllm:admission_rejections_total")
    with ExitStack() as stack:
        running = begin(stack, small, key)
        pool = stack.enter_context(ThreadPoolExecutor(2))
        waiting = [pool.submit(post, small, key, SHORT) for _ in range(2)]
        until(lambda: metric(small, "quire:saturation_queued_requests") == 2)
        check_refusal(post(small, key, SHORT), 503, "server_overloaded", "max_num_queued_reqs")
        assert metric(small, "vllm:admission_rejections_total") == rejected + 1
        lines = [line for line in running.iter_lines() if line.startswith("data: {")]
        assert json.loads(lines[-1][6:])["choices"][0]["finish_reason"] == "length"
        assert [answer.result(60).status_code for answer in waiting] == [200, 200]


def test_limits_are_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(KEYS + "ada another-key-of-ada\nbase64= \n")
    settings = ServerSettings(api_key_file=str(path), max_num_queued_reqs=7)
    keys, admission = Keys.of(settings), admission_of(settings)
    assert keys.tenant(b"another-key-of-ada") == "ada" and keys.tenant(b"base64=") == "line-6"
    assert keys.limits["ada"].max_concurrent == 1 and admission.share("ada") == 2
    assert admission.share("somebody") == 1 and admission.max_num_queued_reqs == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ada the-key max=1", "LIMIT=NUMBER"),
        ("ada the-key share", "share is ''; it must be a number above 0"),
        ("ada the-key share=inf", "share is 'inf'"),
        ("ada the-key max_concurrent=0", "max_concurrent is '0'; it must be a whole number from 1"),
        ("ada the-key requests_per_minute=1.5", "'1.5'"),
        ("ada the-key share=2\nada the-key2 share=3", "'ada' two different limits"),
    ],
)
def test_lines_that_are_no_limits(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Keys.of(ServerSettings(api_key_file=str(path)))
    assert "the-key" not in str(caught.value)


@pytest.mark.parametrize("name", ["max_num_queued_reqs", "max_num_queued_tokens", "max_queue_seconds"])
def test_a_queue_has_room_for_one(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ServerSettings(**{name: 0})
