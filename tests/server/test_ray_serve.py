"""Engines as replicas of a Ray Serve deployment: streams reach clients, from every replica."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import pytest

import quire
from quire.errors import ConfigError
from quire.server.ray_serve import num_wanted, pressure
from tests.engine.test_nodes import free_port
from tests.engine.test_placement import ranks
from tests.engine.test_ranks import wait_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "num_threads": 1,
    "kv_cache_memory_bytes": 2**24,
    "max_model_len": 256,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": {"port": 1, "host": "x"}}, "server has host, port, which Ray Serve decides"),
        ({"server": {"api_keys": ["k"]}}, "server has api_keys, and there are no such options"),
        ({"server": {"max_n": 0}}, "max_n is 0"),
        (
            {"num_replicas": 2, "server": {"response_store_bytes": 9}},
            "response_store_bytes is 9.*one replica",
        ),
        ({"num_replicas": 2, "autoscaling": {}}, "num_replicas is 2, and autoscaling is given"),
        ({"data_parallel_size": 2}, "data_parallel_size is 2.*use num_replicas"),
        ({"distributed_executor_backend": "env"}, "backend is env"),
        ({"ray_placement_group": "ab"}, "ray_placement_group is given"),
        ({"tensor_parallel": 2}, "no option 'tensor_parallel'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("ray.serve")
    with pytest.raises(ConfigError, match=message):
        quire.serve_app("demo", **options)


@pytest.mark.parametrize(
    ("pressures", "num_replicas"),
    [
        ([0.0], 1),
        ([0.7], 1),
        ([0.8], 2),
        ([0.3, 0.3], 1),
        ([pressure(1.0, 2.0)], 5),
        ([pressure(0.5, 0.0)] * 4, 3),
    ],
)
def test_replicas_follow_from_what_they_have_to_do(pressures: list[float], num_replicas: int) -> None:
    assert num_wanted(pressures) == num_replicas


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Of two nodes that are both this machine."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    found.add_node(**NODE)
    found.wait_for_nodes()
    yield found
    found.shutdown()


@pytest.fixture
def url(cluster: Any) -> Iterator[str]:
    """Of a Serve that has nothing to serve yet."""
    ray = pytest.importorskip("ray")
    from ray import serve

    ray.init(address=cluster.address)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def said(lines: Iterator[str]) -> str:
    """What is left of a stream."""
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def num_generated(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


@pytest.mark.slow
def test_two_replicas_of_two_ranks_stream(cluster: Any, url: str) -> None:
    """One that is full is passed over."""
    from ray import serve

    options = {**SMALL, "tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    server = {"api_key": ("secret",)}
    serve.run(quire.serve_app("demo", num_replicas=2, max_ongoing_requests=1, server=server, **options))
    assert len(ranks(cluster)) == 2
    body = {"prompt": "hello", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
    texts: list[str] = []
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(2) as pool:
        assert client.post("/v1/completions", json=body).status_code == 401
        client.headers["authorization"] = "Bearer secret"

        def stream(_: int) -> str:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                return said(answer.iter_lines())

        for _ in range(10):  # a stream may end before the other one comes
            texts += pool.map(stream, range(2))
            if 0 < num_generated(client) < 200 * len(texts):  # what is missing is another replica's
                break
        else:
            pytest.fail("one replica answers all")
    assert len(set(texts)) == 1


@pytest.mark.slow
def test_the_number_of_replicas_follows_what_they_have_to_do(url: str) -> None:
    from ray import serve

    soon = {"upscale_delay_s": 1, "downscale_delay_s": 2, "metrics_interval_s": 1, "look_back_period_s": 2}
    scaling = {"min_replicas": 1, "max_replicas": 2, **soon}
    serve.run(quire.serve_app("demo", autoscaling=scaling, max_num_seqs=2, **SMALL))
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True}

    def num_replicas() -> int:
        return sum(serve.status().applications["default"].deployments["quire"].replica_states.values())

    grown = Event()

    def keep_busy() -> None:
        while not grown.is_set():
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200

    with ThreadPoolExecutor() as pool:
        busy = [pool.submit(keep_busy) for _ in range(6)]
        try:
            wait_for(lambda: num_replicas() == 2)
        finally:
            grown.set()
        for each in busy:
            each.result()
    wait_for(lambda: num_replicas() == 1)
