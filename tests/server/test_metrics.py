"""What a scrape says: valid text, true counts, and nothing in a label that a client wrote."""

import httpx
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from quire.server.counts import watch_process
from tests.server.conftest import FRANCE, InProcess, Live, serving

CHAT = {"messages": FRANCE, "temperature": 0}
ROUTE = "/v1/chat/completions"
SECRET = "zebra-7f3a"  # no metric may hold it


def scraped(live: Live) -> dict[str, Metric]:
    answer = live.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert len({f.name for f in families}) == len(families)
    return {family.name: family for family in families}


def value(families: dict[str, Metric], name: str, sample: str, **labels: str) -> float:
    found = [
        s.value
        for s in (families[name].samples if name in families else ())
        if s.name == sample and labels.items() <= s.labels.items()
    ]
    return sum(found)


def calls(live: Live, status: str, handler: str = ROUTE, method: str = "POST") -> float:
    labels = {"handler": handler, "method": method, "status": status}
    return value(scraped(live), "http_requests", "http_requests_total", **labels)


def test_calls_are_counted_by_route_and_class_of_status(live: Live) -> None:
    before = scraped(live)
    assert live.post(ROUTE, json=CHAT).status_code == 200
    assert live.post(ROUTE, json={**CHAT, "stream": True}).status_code == 200
    assert live.post(ROUTE, json={"messages": 1}).status_code == 400
    after = scraped(live)

    def more(name: str, sample: str, **labels: str) -> float:
        return value(after, name, sample, **labels) - value(before, name, sample, **labels)

    assert more("http_requests", "http_requests_total", handler=ROUTE, status="2xx") == 2
    assert more("http_requests", "http_requests_total", handler=ROUTE, status="4xx") == 1
    name = "http_request_duration_seconds"
    assert more(name, f"{name}_count", handler=ROUTE, method="POST") == 3
    assert more("vllm:request_success", "vllm:request_success_total", finished_reason="stop") == 2
    assert more("vllm:generation_tokens", "vllm:generation_tokens_total") == 16
    assert more("vllm:e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds_count") == 2


def test_paths_with_a_parameter_are_one_handler(live: Live) -> None:
    before = calls(live, "4xx", "/v1/models/{name}", "GET")
    for name in (SECRET, "another", "third"):
        live.get(f"/v1/models/{name}")
    assert calls(live, "4xx", "/v1/models/{name}", "GET") - before == 3


def test_a_scrape_and_probes_are_not_counted(live: Live) -> None:
    for path in ("/metrics", "/livez", "/health", "/load", "/version"):
        live.get(path)
    handlers = {s.labels["handler"] for s in scraped(live)["http_requests"].samples}
    assert not handlers & {"/metrics", "/livez", "/health", "/load", "/version"}


def test_labels_hold_nothing_that_clients_wrote(live: Live) -> None:
    body = {"prompt": SECRET, "user": SECRET, "request_id": SECRET, "cache_salt": SECRET, "max_tokens": 1}
    headers = {"X-Request-Id": SECRET, "User-Agent": SECRET, "Authorization": f"Bearer {SECRET}"}
    for answer in (
        live.post("/v1/completions", json={**body, SECRET: SECRET}, headers=headers),
        live.post("/v1/completions", json={**body, "model": SECRET}, headers=headers),
        live.post(f"/{SECRET}", json=body, headers=headers),
        httpx.request("PROPFIND", f"{live.url}/{SECRET}", timeout=60),
        live.get(f"/v1/models/{SECRET}"),
    ):
        assert answer.status_code in (200, 404, 405)
    text = live.get("/metrics").text
    assert SECRET not in text and "PROPFIND" not in text
    assert calls(live, "4xx", "none", "POST") >= 1


def test_routes_are_known_behind_a_proxys_path(service: InProcess) -> None:
    with serving(service, root_path="/llm") as live:
        before = calls(live, "2xx")
        assert live.post(f"/llm{ROUTE}", json=CHAT).status_code == 200
        assert live.post(ROUTE, json=CHAT).status_code == 200
        found = scraped(live)["http_requests"].samples
        handlers = {s.labels["handler"] for s in found if ROUTE in s.labels["handler"]}
        assert calls(live, "2xx") - before == 2 and handlers == {ROUTE}
        assert live.get("/llm/livez").status_code == 200
        assert "/livez" not in {s.labels["handler"] for s in scraped(live)["http_requests"].samples}


def test_refusals_without_a_key_have_no_route(service: InProcess) -> None:
    with serving(service, api_key=("good",)) as live:
        assert live.post(ROUTE, json=CHAT).status_code == 401
        answer = live.get("/metrics", headers={"Authorization": "Bearer good"})
        (family,) = [f for f in text_string_to_metric_families(answer.text) if f.name == "http_requests"]
        assert any(s.labels["handler"] == "none" and s.labels["status"] == "4xx" for s in family.samples)


def test_a_process_tells_of_itself() -> None:
    registry = CollectorRegistry()
    watch_process(registry)
    names = {family.name for family in registry.collect()}
    assert {
        "process_resident_memory_bytes",
        "process_cpu_seconds",
        "process_open_fds",
        "python_info",
    } <= names
