"""Ranks of one group on several machines: the tokens of one process, whichever machine or wire is lost meanwhile."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from quire.config import Config
from quire.engine.node import GONE_S, LEADER_GONE
from quire.engine.service import Status
from tests.engine.test_ranks import GREEDY, PATIENCE_S, TWO, is_alive, llm, pids, ranks_of, wait_for
from tests.engine.test_remote import all_streams, collect, in_a_loop, running
from tests.processes import started

ONLY_ROOT = "network namespaces are made by root, with the program ip, on Linux"
DEMO = Path("demo")
NODE = "import sys; from quire.cli.main import main; sys.exit(main(sys.argv[1:]))"
HERE, THERE, NAMESPACE = "10.77.0.1", "10.77.0.2", f"quire-{os.getpid()}"
WIRE, WIRE_THERE = f"qa{os.getpid()}", f"qb{os.getpid()}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def two(tmp_path: Path) -> Config:
    """Two ranks on two machines, which are both this one."""
    secret = tmp_path / "secret"
    secret.write_text("a secret of a test, and long enough\n")
    return replace(TWO, nnodes=2, master_port=free_port(), launch_secret_file=str(secret))


def command(config: Config, node_rank: int) -> list[str]:
    options = {
        "distributed_executor_backend": config.distributed_executor_backend,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "device": "cpu",
        "nnodes": config.nnodes,
        "node_rank": node_rank,
        "master_addr": config.master_addr,
        "master_port": config.master_port,
        "launch_secret_file": config.launch_secret_file,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-c", NODE, "serve", config.model, *flags]


@contextmanager
def node(config: Config, *before: str) -> Iterator[subprocess.Popen[bytes]]:
    """Machine 1, by the command that a user would give there."""
    with started([*before, *command(config, 1)]) as process:
        yield process


async def until(holds: Callable[[], bool]) -> None:
    """The test's own end comes if it never does."""
    while not holds():
        await asyncio.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_machines_give_the_tokens_of_one_and_either_may_lose_its_rank(two: Config) -> None:
    async def work() -> None:
        async with running(replace(TWO, tensor_parallel_size=1)) as engine:
            want = await all_streams(engine)
        with node(two) as machine:
            async with running(two) as engine:
                assert len(pids(engine)) == 1, "the other is not this machine's"
                (theirs,) = children(machine.pid)
                got = await all_streams(engine, [300], lambda: os.kill(theirs, signal.SIGKILL))
                assert got == want and engine.keeper.num_restarts == 1
                (last,) = children(machine.pid)
                assert last != theirs
            wait_for(lambda: not is_alive(last))
            assert machine.poll() is None, "it waits for another group"

    in_a_loop(work)()


def test_an_llm_has_ranks_on_other_machines(two: Config) -> None:
    prompts = [[1, 2, 3 + i] for i in range(4)]
    with llm(DEMO) as alone:
        want = [output.outputs[0].token_ids for output in alone.generate(prompts, GREEDY, use_tqdm=False)]
    several = {name: getattr(two, name) for name in ("nnodes", "master_port", "launch_secret_file")}
    with node(two) as machine:
        with llm(DEMO, **several) as found:
            got = [output.outputs[0].token_ids for output in found.generate(prompts, GREEDY, use_tqdm=False)]
            (rank,) = children(machine.pid)
            assert got == want and ranks_of(found.engine).pids == []
        wait_for(lambda: not is_alive(rank))


def test_a_machine_with_other_sizes_is_refused(two: Config) -> None:
    async def work() -> None:
        with node(replace(two, tensor_parallel_size=4)) as wrong, ExitStack() as later:

            async def right() -> None:
                assert await asyncio.to_thread(wrong.wait, PATIENCE_S) == 2
                later.enter_context(node(two))

            correcting = asyncio.create_task(right())
            async with running(two) as engine:
                assert (await collect(engine, "hello", GREEDY))[-1].finished
            await correcting

    in_a_loop(work)()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=["stages", "stages-of-two"])
def test_stages_may_be_on_machines_of_their_own(two: Config, sizes: tuple[int, int]) -> None:
    tensor, stages = sizes
    prompts = [[1, 2, 3 + i] for i in range(4)]
    with llm(DEMO, tensor_parallel_size=1) as alone:
        want = [output.outputs[0].token_ids for output in alone.generate(prompts, GREEDY, use_tqdm=False)]
    config = replace(two, tensor_parallel_size=tensor, pipeline_parallel_size=stages)
    names = ("nnodes", "master_port", "launch_secret_file", "tensor_parallel_size", "pipeline_parallel_size")
    with node(config), llm(DEMO, **{name: getattr(config, name) for name in names}) as found:
        got = [output.outputs[0].token_ids for output in found.generate(prompts, GREEDY, use_tqdm=False)]
        assert got == want and len(ranks_of(found.engine).pids) == tensor - 1


@pytest.mark.slow
def test_a_machine_that_is_killed_joins_again_when_it_is_started_again(two: Config) -> None:
    async def work() -> None:
        with node(two) as first, ExitStack() as later:
            async with running(two) as engine:
                want = await all_streams(engine)

                def replaced() -> None:
                    first.kill()
                    later.enter_context(node(two))

                ranks = children(first.pid)
                got = await all_streams(engine, [300], replaced)
                assert got == want and engine.keeper.num_restarts == 1
                assert not any(map(is_alive, ranks))

    in_a_loop(work)()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def other_machine() -> Iterator[list[str]]:
    """A network of two machines: this one at HERE, and what is run with these words at THERE."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip(ONLY_ROOT)
    try:
        ip("netns", "add", NAMESPACE)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{ONLY_ROOT}: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", WIRE, "type", "veth", "peer", "name", WIRE_THERE, "netns", NAMESPACE)
        ip("addr", "add", f"{HERE}/24", "dev", WIRE)
        ip("-n", NAMESPACE, "addr", "add", f"{THERE}/24", "dev", WIRE_THERE)
        ip("link", "set", WIRE, "up")
        ip("-n", NAMESPACE, "link", "set", WIRE_THERE, "up")
        ip("-n", NAMESPACE, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", NAMESPACE]
    finally:
        ip("netns", "del", NAMESPACE)  # and the wire with it


@pytest.mark.slow
def test_a_wire_that_is_cut_and_mended_costs_no_request(two: Config, other_machine: list[str]) -> None:
    config = replace(two, master_addr=HERE)

    async def work() -> None:
        async with running(replace(TWO, tensor_parallel_size=1)) as engine:
            want = await all_streams(engine)
        with node(config, *other_machine) as machine:
            async with running(config, hang_s=3.0) as engine:
                first = pids(engine)
                (rank,) = children(machine.pid)

                async def mend() -> None:
                    await until(lambda: not any(map(is_alive, [*first, rank])))  # each side noticed by itself
                    assert engine.status is Status.RESTARTING
                    ip("link", "set", WIRE, "up")

                mended: list[asyncio.Task[None]] = []

                def cut() -> None:
                    ip("link", "set", WIRE, "down")
                    mended.append(asyncio.create_task(mend()))

                got = await all_streams(engine, [300], cut)
                await mended[0]
                assert got == want and engine.keeper.num_restarts >= 1
            assert await asyncio.to_thread(machine.wait, GONE_S + PATIENCE_S) == LEADER_GONE

    in_a_loop(work)()


@pytest.mark.slow
def test_torchrun_starts_the_ranks(two: Config) -> None:
    """Two processes of one rank each, of which the first serves."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "--no-python", *command(replace(two, distributed_executor_backend="env"), 0)]
    with started([*words, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = next(line for line in process.stdout if line.startswith("Listening")).split()[2].strip(";")
            body = {"model": "demo", "prompt": "hello", "max_tokens": 5, "temperature": 0}
            answer = httpx.post(f"{url}/completions", json=body, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == 5
        finally:
            process.terminate()  # not killed: its ranks end with it
            process.wait(PATIENCE_S)
