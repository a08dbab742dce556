"""Ranks that Ray places, on a cluster of two nodes that are both this machine."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire.engine.placement import place
from quire.errors import ConfigError
from tests.engine.test_nodes import DEMO
from tests.engine.test_ranks import GREEDY, PATIENCE_S, TWO, is_alive, llm, ranks_of, wait_for
from tests.engine.test_remote import all_streams, in_a_loop, running

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
PLACED = replace(TWO, distributed_executor_backend="ray")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'quire\[ray\]'"):
        place(PLACED, 2)


def test_without_a_cluster_the_way_to_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="no Ray cluster"):
        place(PLACED, 2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    found.add_node(**NODE)
    found.wait_for_nodes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
    ray.shutdown()
    found.shutdown()


def ranks() -> list[int]:
    """Process ids of Ray's actors that are ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::RankActor"):
                found.append(int(folder.name))
    return [pid for pid in found if is_alive(pid)]


@pytest.mark.slow
def test_a_rank_or_its_node_may_be_lost_under_load(cluster: Any) -> None:
    async def work() -> None:
        async with running(replace(TWO, tensor_parallel_size=1)) as engine:
            want = await all_streams(engine)
        async with running(PLACED) as engine:
            first = ranks()
            got = await all_streams(engine, [300], lambda: os.kill(first[0], signal.SIGKILL))
            assert got == want and engine.keeper.num_restarts == 1
            wait_for(lambda: len(ranks()) == 1)
            last = ranks()
            assert last != first
        wait_for(lambda: not ranks())

        def replace_node() -> None:
            (node,) = cluster.worker_nodes
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(**NODE)

        async with running(PLACED) as engine:
            got = await all_streams(engine, [300], replace_node)
            assert got == want and engine.keeper.num_restarts >= 1
        wait_for(lambda: not ranks())

    in_a_loop(work)()


@pytest.mark.slow
def test_a_placement_group_that_is_there_is_used(cluster: Any) -> None:
    ray = pytest.importorskip("ray")
    from ray.util.placement_group import placement_group, remove_placement_group

    ray.init(address=cluster.address)
    try:
        given, small = placement_group([{"CPU": 1}] * 2), placement_group([{"CPU": 0.01}])
        assert given.wait(PATIENCE_S)
        options = {"distributed_executor_backend": "ray", "ray_placement_group": given.id.hex()}
        with llm(DEMO, **options) as found:  # nothing is left for bundles of its own
            assert ranks_of(found.engine).placement.group is None
            assert len(found.generate([[1, 2, 3]], GREEDY, use_tqdm=False)) == 1
        assert ray.is_initialized(), "it was before"
        assert given.wait(PATIENCE_S)
        for wrong, message in (
            ("xy", "no id of one"),
            (small.id.hex(), "has 1 bundles, and an engine group 2 ranks"),
        ):
            with (
                pytest.raises(ConfigError, match=message),
                llm(DEMO, **options | {"ray_placement_group": wrong}),
            ):
                pass
        remove_placement_group(given)
    finally:
        ray.shutdown()
