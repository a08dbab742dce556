"""Ranks that Ray places, on a cluster of two nodes and a head that are all this machine."""

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
from tests.engine.test_nodes import DEMO, children, until
from tests.engine.test_ranks import GREEDY, PATIENCE_S, TWO, is_alive, llm
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

    found = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    for _ in range(2):  # one for each bundle, so that any rank's may go; the head may not
        found.add_node(**NODE)
    found.wait_for_nodes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
    ray.shutdown()
    found.shutdown()


def ranks(cluster: Any) -> list[int]:
    """Process ids of the cluster's actors that are ranks; other tests may have some of their own."""
    found, session = [], cluster.head_node.get_session_dir_path()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_rank = (folder / "cmdline").read_bytes().startswith(b"ray::RankActor")
            if is_rank and (folder / "fd" / "1").readlink().is_relative_to(session):
                found.append(int(folder.name))
    return [pid for pid in found if is_alive(pid)]


def node_of(cluster: Any, pid: int) -> Any:
    (found,) = [
        node for node in cluster.worker_nodes if pid in children(node.all_processes["raylet"][0].process.pid)
    ]
    return found


@pytest.mark.slow
def test_a_rank_or_its_node_may_be_lost_under_load(cluster: Any) -> None:
    async def work() -> None:
        async with running(replace(TWO, tensor_parallel_size=1)) as engine:
            want = await all_streams(engine)
        async with running(PLACED) as engine:
            (first,) = ranks(cluster)
            got = await all_streams(engine, [300], lambda: os.kill(first, signal.SIGKILL))
            assert got == want and engine.keeper.num_restarts == 1
            assert len(last := ranks(cluster)) == 1 and last != [first]
        await until(lambda: not ranks(cluster))

        def replace_node() -> None:
            (rank,) = ranks(cluster)
            cluster.remove_node(node_of(cluster, rank), allow_graceful=False)
            cluster.add_node(**NODE)

        async with running(PLACED) as engine:
            got = await all_streams(engine, [300], replace_node)
            assert got == want and engine.keeper.num_restarts >= 1
        await until(lambda: not ranks(cluster))

    in_a_loop(work)()


@pytest.mark.slow
def test_a_placement_group_that_is_there_is_used(cluster: Any) -> None:
    ray = pytest.importorskip("ray")
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    ray.init(address=cluster.address)
    try:
        given, small = placement_group([{"CPU": 1}] * 2), placement_group([{"CPU": 0.01}])
        assert given.wait(PATIENCE_S)
        options = {"distributed_executor_backend": "ray", "ray_placement_group": given.id.hex()}
        with llm(DEMO, **options) as found:  # nothing is left for bundles of its own
            made = {name for name, group in placement_group_table().items() if group["state"] != "REMOVED"}
            assert made == {given.id.hex(), small.id.hex()}
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
