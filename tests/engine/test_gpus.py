"""Which GPUs the ranks of engine groups take, where torch only says that there are some."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from quire.config import Config
from quire.engine.build import build_core
from quire.engine.device import mesh_of, platform_of
from quire.engine.groups import Groups
from quire.engine.metrics import Metrics
from quire.engine.ranks import seat_at, seat_of
from quire.engine.site import located
from quire.engine.ticks import Follower, Post, ToFollower
from quire.errors import ConfigError
from tests.engine.test_ticks import pair
from tests.test_resolve import CPU, GPU

CONFIG = Config(model="demo", device="cuda")
DP, TP, PP = "data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size"
Have = Callable[[int], None]


@pytest.fixture
def have(monkeypatch: pytest.MonkeyPatch) -> Have:
    """So many GPUs of 80 GB, each with one GB more of it in use than the one before."""

    def patch(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((80 - index) * 10**9, 80 * 10**9))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    return patch


def first_gpu(config: Config, group: int, *, lockstep: bool) -> int:
    if not lockstep:
        seat = seat_of(config, group)
    else:
        ours, theirs = pair(ToFollower)
        size = mesh_of(config).size
        seat = seat_at(Post(group, None, Follower(ours)), size, size * config.data_parallel_size)
        ours.sock.close(), theirs.sock.close()
    if seat.segment is not None:
        os.close(seat.segment)
    return seat.index


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("sizes", [{DP: 4}, {DP: 2, TP: 2}, {DP: 2, PP: 3}, {DP: 3, TP: 2, PP: 2}])
def test_groups_take_gpus_one_after_the_other(have: Have, sizes: dict[str, int], lockstep: bool) -> None:
    config = replace(CONFIG, **sizes)
    size = mesh_of(config).size
    have(size * config.data_parallel_size)
    taken = []
    for group in range(config.data_parallel_size):
        index = first_gpu(config, group, lockstep=lockstep)
        taken += [platform_of(config, index + rank) for rank in range(size)]
    assert [one.device.index for one in taken] == list(range(size * config.data_parallel_size))
    assert [one.available_bytes for one in taken] == [(80 - i) * 10**9 for i in range(len(taken))]


def test_each_group_is_told_its_number_and_takes_the_gpu_of_that(
    have: Have, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(3)
    config = replace(CONFIG, data_parallel_size=3)
    launches = [
        keeper.supervisor.launch for keeper in Groups(config, Metrics("demo", log_stats=False)).keepers
    ]
    assert [launch.group for launch in launches] == [0, 1, 2]

    def taken(index: int) -> tuple[int, int]:
        raise RuntimeError(f"GPU {index} it is")

    monkeypatch.setattr(torch.cuda, "mem_get_info", taken)
    with pytest.raises(RuntimeError, match="GPU 2 it is"):
        build_core(config, offline=False, group=2)


@pytest.mark.parametrize(
    "sizes", [{DP: 5}, {DP: 3, TP: 2}, {TP: 5}, {DP: 2, "enable_expert_parallel": True, TP: 3}]
)
def test_too_few_gpus_are_refused(have: Have, sizes: dict[str, object]) -> None:
    have(4)
    with pytest.raises(
        ConfigError, match="there are [56] ranks on this machine, and 4 GPUs.*data_parallel_size"
    ):
        platform_of(replace(CONFIG, **sizes))


def test_groups_share_out_cores_and_memory_but_for_that_of_gpus() -> None:
    assert GPU.part(4) == replace(GPU, num_cores=1)
    assert CPU.part(4) == replace(CPU, num_cores=1, total_bytes=2**32, available_bytes=3 * 2**30)


def test_processes_of_a_launcher_have_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in {**told, "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    two = replace(CONFIG, data_parallel_size=2, tensor_parallel_size=2, distributed_executor_backend="env")
    with pytest.raises(
        ConfigError, match="data_parallel_size is 2, and 2 processes have.*a server for each group"
    ):
        located(two)
