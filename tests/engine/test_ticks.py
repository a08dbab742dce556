"""Engine groups that share experts, and compute in lockstep: the tokens of one process, whatever befalls them."""

import asyncio
import os
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from quire.attention.groups import cache_layout
from quire.checkpoint.files import read_config
from quire.config import Config
from quire.engine.events import Submission, TokenEvent
from quire.engine.metrics import NOTHING
from quire.engine.remote import RemoteEngine
from quire.engine.ticks import Ask, Follower, FromFollower, Go, Leader, Sequences, ToFollower
from quire.engine.wire import Channel, Events, Ping, Stop, ToGroup
from quire.errors import ConfigError, EngineDead
from quire.models.registry import decoder_spec
from quire.models.shard import shard
from quire.scheduler.near import Extent
from quire.types import OutputKind, SamplingParams
from tests.engine.test_ranks import is_alive, pids
from tests.engine.test_remote import in_a_loop, running
from tests.models.cases import BY_NAME, build_hf

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, output_kind=OutputKind.DELTA)
PARAMS = [replace(GREEDY, max_tokens=24 + 5 * (i % 3)) for i in range(12)]
PARAMS[3] = replace(PARAMS[3], temperature=1.0, seed=5, n=2)
PROMPTS = [[3 + (i * j) % 11 for j in range(4 + 2 * i)] for i in range(12)]
BLOCK, LENGTH, BATCHED = 4, 64, 16
NAMES = ("Qwen2Moe",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in found.items():
        build_hf(BY_NAME[name], folder)
    return found


def config(folder: Path, **options: object) -> Config:
    """Of so small a cache that two requests make way for each other, and of steps that cut prompts."""
    spec, size = decoder_spec(read_config(folder))[0], int(str(options.get("tensor_parallel_size", 1)))
    layout = cache_layout(shard(spec, size, 0), BLOCK, 4, max_length=LENGTH)
    num_blocks = Extent(layout.near, BLOCK, BATCHED).num_blocks(LENGTH) + 1
    return Config(
        model=str(folder),
        device="cpu",
        dtype="float32",
        num_threads=1,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        block_size=BLOCK,
        max_model_len=LENGTH,
        max_num_batched_tokens=BATCHED,
        kv_cache_memory_bytes=num_blocks * layout.block_bytes,
        **options,
    )


async def tokens_of(engine: RemoteEngine, which: Sequence[int] = range(12)) -> list[list[list[int]]]:
    async def one(i: int) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(PARAMS[i].n)]
        async for output in engine.generate(PROMPTS[i], PARAMS[i]):
            for part in output.outputs:
                found[part.index] += part.token_ids
        return found

    return await asyncio.gather(*map(one, which))


MESHES = [  # more of them in test_every_mesh.py
    ("Qwen2Moe", {"data_parallel_size": 2}),
    pytest.param("Qwen2Moe", {"data_parallel_size": 4, "enable_eplb": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_tokens_are_those_of_one_process(
    folders: dict[str, Path], name: str, mesh: dict[str, object]
) -> None:
    """With all at work, with one at work and the others idle, and after that again."""

    async def work() -> None:
        async with running(config(folders[name])) as engine:
            want = await tokens_of(engine)
        eplb = {"eplb_step_interval": 5} if "enable_eplb" in mesh else {}
        async with running(config(folders[name], enable_expert_parallel=True, **mesh, **eplb)) as engine:
            assert await tokens_of(engine) == want
            assert engine.metrics.totals.num_preemptions > 0
            for i in (0, 9):
                assert await tokens_of(engine, [i]) == [want[i]]
            assert await tokens_of(engine) == want
            assert engine.keeper.num_restarts == 0
            processes = pids(engine)
            assert len(set(processes)) == mesh["data_parallel_size"] and all(map(is_alive, processes))
        assert not any(map(is_alive, processes))

    in_a_loop(work)()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_each_process_may_be_lost_under_load(folders: dict[str, Path], number: int) -> None:
    """Of either group, the first or another rank: all go, and come back with every request."""
    sizes = {"enable_expert_parallel": True, "data_parallel_size": 2, "tensor_parallel_size": 2}
    check_losses(config(folders["Qwen2Moe"], **sizes), number)


def check_losses(config: Config, number: int) -> None:
    """Each of the engine's processes gets the signal once, while requests run."""

    async def work() -> None:
        async with running(config) as engine:
            want, num_processes = await tokens_of(engine), len(pids(engine))
        assert num_processes == config.data_parallel_size * config.tensor_parallel_size
        for victim in range(num_processes):
            async with running(config, hang_s=3.0) as engine:
                first = pids(engine)
                streams = asyncio.create_task(tokens_of(engine))
                while engine.keeper.metrics.totals.num_generated < 20:
                    await asyncio.sleep(0.01)
                os.kill(first[victim], number)
                assert await streams == want
                assert engine.keeper.num_restarts == 1 and not any(map(is_alive, first))

    in_a_loop(work)()


def test_what_cannot_be_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    build_hf(BY_NAME["Qwen3"], tmp_path)
    for folder, options, message in (
        (tmp_path, {}, "no experts that could be spread"),
        (folders["Qwen2Moe"], {"distributed_executor_backend": "ray"}, "on one machine"),
    ):

        async def work(folder: Path = folder, options: dict[str, str] = options) -> None:
            async with running(config(folder, enable_expert_parallel=True, data_parallel_size=2, **options)):
                pass

        with pytest.raises(ConfigError, match=message):
            in_a_loop(work)()


def follow(line: Follower, num_steps: int) -> list[int]:
    """A group with so many steps to compute, the next of one token less each; what each tick's most was."""
    found, left = [], num_steps
    while True:
        if left:
            found.append(line.turn(left))
            left -= 1
        elif isinstance(line.receive(None), Stop):
            return found
        elif line.wanted:
            found.append(line.turn(0))


def pair(incoming: Any) -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair()
    return Channel(ours, incoming=FromFollower), Channel(theirs, incoming=incoming)


def test_all_groups_take_every_step_whoever_has_work() -> None:
    """And nobody waits for more: there are as many ticks as the busiest has steps."""
    steps, pairs = (3, 7, 0), [pair(ToFollower) for _ in range(3)]
    frontend, channel = pair(ToGroup)
    leader, left, found = Leader(channel, [ours for ours, _ in pairs], 0), 5, []
    with ThreadPoolExecutor(3) as pool:
        running = [
            pool.submit(follow, Follower(theirs), n) for (_, theirs), n in zip(pairs, steps, strict=True)
        ]
        while len(found) < max(steps):
            assert leader.receive(None if not left else 0.0) is None
            if left or leader.wanted:
                found.append(leader.turn(left))
                left = max(left - 1, 0)
        frontend.send(Stop())
        assert isinstance(leader.receive(None), Stop)
        assert [one.result(60) for one in running] == [found] * 3
    assert found == [7, 6, 5, 4, 3, 2, 1] and leader.num_turns == 7
    for one in (frontend, channel, *chain.from_iterable(pairs)):
        one.sock.close()


def test_a_command_that_comes_while_a_step_is_to_begin_is_obeyed_after_it() -> None:
    ours, theirs = pair(ToFollower)
    line = Follower(theirs)
    for message in (Ask(), Ping(1), Go(4), Ping(2)):
        ours.send(message)
    assert line.turn(3) == 4 and not line.wanted
    assert [line.receive(0.0) for _ in range(3)] == [Ping(1), Ping(2), None]
    ours.send(Ask())
    assert line.receive(None) is None and line.wanted
    ours.sock.close()
    with pytest.raises(EngineDead):
        line.turn(0)
    theirs.sock.close()


def submission(name: str, n: int = 1) -> Submission:
    """Of a prompt that no other is like."""
    prompt = tuple(range(int(name), 2000 + int(name)))
    params = SamplingParams(n=n, temperature=1.0)
    return Submission(request_id=name, prompt_token_ids=prompt, params=params, max_tokens=4)


def test_requests_are_divided_and_forgotten_when_they_end() -> None:
    division = Sequences(3, seed=0)
    found = [division.route(submission(str(i), n=2)) for i in range(6)]
    assert {found.count(number) for number in range(3)} == {2}
    for i in range(6):
        assert division.aborted(str(i), 0) == found[i], "one of its sequences"
    for i in range(6):
        last = TokenEvent(request_id=str(i), index=1, token=5, finish="length")
        division.heard(Events([last], NOTHING))
    assert not division.tickets and all(r.num_open == 0 for r in division.router.replicas)
    assert division.aborted("0", None) is None
