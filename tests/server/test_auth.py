"""Once there is a key, nothing but the probes answers without one, however the path is written."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from quire.errors import ConfigError
from quire.server.auth import Keys
from quire.server.settings import ServerSettings
from tests.server.conftest import InProcess, Live, serving
from tests.server.raw import head, status

PROBES = ("/livez", "/readyz", "/startupz")
GUARDED = (
    "/v1/models",
    "/version",
    "/metrics",
    "/health",
    "/ping",
    "/load",
    "/openapi.json",
    "/nothing",
    "/",
)


@pytest.fixture(scope="module")
def guarded(service: InProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# who may\nada key-of-ada\nada second-key-of-ada # being replaced\n\nbob key-of-bob\n")
    with serving(service, api_key=("sesame",), api_key_file=str(path), root_path="/llm") as live:
        yield live


def test_a_key_opens(guarded: Live) -> None:
    for key in ("sesame", "key-of-ada", "second-key-of-ada", "key-of-bob"):
        assert guarded.client(key).models.list().data
    with pytest.raises(openai.AuthenticationError, match="a valid key is needed"):
        guarded.client("wrong").models.list()


@pytest.mark.parametrize("path", GUARDED)
def test_everything_needs_a_key(guarded: Live, path: str) -> None:
    answer = guarded.get(path)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == 401


def test_probes_need_none(guarded: Live) -> None:
    for path in PROBES:
        assert guarded.get(path).status_code == guarded.get("/llm" + path).status_code == 200
        assert guarded.post(path).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/v1%2fmodels",
        "/%76%31/models",
        "/V1/models",
        "//v1/models",
        "/v1//models",
        "/livez/../v1/models",
        "/livez/..%2fv1/models",
        "/livez%2f..%2fv1%2fmodels",
        "/%2e/livez",
        "/./livez",
        "/livez/",
        "/LIVEZ",
        "/livez;/v1/models",
        "/livez%00",
        "/llm/v1/models",
        "/llm//livez",
        "/llm/llm/livez",
        "http://x/livez/v1/models",
        "*",
    ],
)
def test_other_spellings_open_nothing(guarded: Live, path: str) -> None:
    assert status(head(guarded.url, f"GET {path}")) in (400, 401)


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"])
def test_other_methods_open_nothing(guarded: Live, method: str) -> None:
    assert status(head(guarded.url, f"{method} /v1/models")) in (400, 401)


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: livez",),
        ("X-Original-URL: /livez",),
        ("X-Forwarded-Prefix: /livez",),
        ("Authorization: Basic sesame",),
        ("Authorization: sesame",),
        ("Authorization: Bearer",),
        ("Authorization: Bearer sesam",),
        ("Authorization: Bearer sesame2",),
        ("Authorization: Bearer wrong", "Authorization: Bearer sesame"),
        ("X-Api-Key: \xff",),
    ],
)
def test_other_headers_open_nothing(guarded: Live, headers: tuple[str, ...]) -> None:
    assert status(head(guarded.url, "GET /v1/models", *headers)) in (400, 401)


def test_a_websocket_is_not_a_way_in(guarded: Live) -> None:
    upgrade = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: x",
        "Sec-WebSocket-Version: 13",
    )
    assert status(head(guarded.url, "GET /v1/models", *upgrade)) in (400, 401)


def test_the_path_behind_a_proxy(guarded: Live) -> None:
    for path in ("/v1/models", "/llm/v1/models"):  # whether the proxy cuts its prefix or not
        answer = guarded.get(path, headers={"Authorization": "bearer sesame"})
        assert answer.status_code == 200


def test_tenants_share_no_cache(guarded: Live) -> None:
    def cached(key: str) -> int:
        prompt = "A secret of one tenant, said at some length. " * 10
        usage = guarded.client(key).completions.create(model="demo", prompt=prompt, max_tokens=1).usage
        return usage.prompt_tokens_details.cached_tokens

    assert cached("key-of-ada") == 0
    assert cached("key-of-ada") > 0
    assert cached("second-key-of-ada") > 0  # the same tenant
    assert cached("key-of-bob") == cached("sesame") == 0


def test_a_salt_divides_a_tenant_and_joins_no_two(guarded: Live) -> None:
    def cached(key: str, salt: str) -> int:
        body = {"prompt": "Salted words, again and again. " * 10, "max_tokens": 1, "cache_salt": salt}
        answer = guarded.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("key-of-ada", "a") == 0 and cached("key-of-ada", "b") == 0
    assert cached("key-of-ada", "a") > 0
    assert cached("key-of-bob", "a") == 0


def test_keys_are_kept_as_hashes() -> None:
    keys = Keys.of(ServerSettings(api_key=("one", "two")))
    assert [keys.tenant(k) for k in (b"one", b"two", b"three", b"")] == ["key-1", "key-2", None, None]
    assert "one" not in repr(vars(keys))
    assert not Keys.of(ServerSettings())


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for text, message in (("# nothing\n", "at least one key"), ("a\nname the-key more\n", "line 2")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            Keys.of(ServerSettings(api_key_file=str(path)))
        assert "the-key" not in str(caught.value)
    path.write_bytes(b"the-key\xff\n")
    with pytest.raises(ConfigError, match="no UTF-8 text") as caught:
        Keys.of(ServerSettings(api_key_file=str(path)))
    assert "the-key" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"api_key is '\*\*\*'"):
        ServerSettings(api_key=("with space",))


def test_web_pages_of_other_origins(service: InProcess) -> None:
    with serving(service, api_key=("sesame",), allowed_origins=("https://good.example",)) as live:
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}

        def preflight(origin: str) -> str | None:
            answer = httpx.options(live.url + "/v1/completions", headers={"Origin": origin, **ask})
            return answer.headers.get("access-control-allow-origin")

        assert preflight("https://good.example") == "https://good.example"
        assert preflight("https://bad.example") is None
        assert live.get("/v1/models", headers={"Origin": "https://good.example"}).status_code == 401
