"""A signal in every phase of a server's life: the exit code says what happened, and nothing stays behind."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.faults.client import Load, get, streams
from tests.faults.running import run
from tests.faults.server import Server, finish, start, until

pytestmark = pytest.mark.slow

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
DRAINED, FORCED = 0, 130
NUM_STREAMS, MAX_TOKENS = 8, 100


@asynccontextmanager
async def started(folder: Path, **faults: object) -> AsyncIterator[Server]:
    """A server that may be in any phase; whatever it leaves is a failure."""
    server = start(folder, **faults)
    try:
        yield server
        await server.gone()
    finally:
        finish(server)


async def under_load(server: Server) -> Load:
    await server.said("\ncurl ")
    load = Load(server.url, streams(NUM_STREAMS, MAX_TOKENS))
    await load.tokens(3 * NUM_STREAMS)
    assert not load.is_over
    return load


def code_of(number: int, otherwise: int) -> int:
    """SIGKILL is nobody's to handle."""
    return -number if number == signal.SIGKILL else otherwise


@pytest.mark.parametrize("number", SIGNALS)
def test_during_imports(tmp_path: Path, number: int) -> None:
    """It dies of the signal, as any program, or ends by itself if it has come to where it handles that."""

    async def work() -> None:
        async with started(tmp_path) as server:
            await server.said("importing")
            server.send(number)
            assert await server.exit_code(10) in (-number, code_of(number, FORCED))

    run(work())


@pytest.mark.parametrize("number", SIGNALS)
def test_while_the_engine_starts(tmp_path: Path, number: int) -> None:
    async def work() -> None:
        async with started(tmp_path, first_start_s=60) as server:
            await until(server.is_listening)
            assert await get(server.url, "/startupz") == (503, "starting")
            await until(lambda: server.board.get("engines"))
            server.send(number)
            assert await server.exit_code(10) == code_of(number, FORCED)

    run(work())


@pytest.mark.parametrize("number", SIGNALS)
def test_when_it_is_ready(tmp_path: Path, number: int) -> None:
    async def work() -> None:
        async with started(tmp_path) as server:
            await server.said("\ncurl ")
            server.send(number)
            assert await server.exit_code(10) == code_of(number, DRAINED)

    run(work())


@pytest.mark.parametrize("number", SIGNALS)
def test_under_load(tmp_path: Path, number: int) -> None:
    async def work() -> None:
        async with started(tmp_path, step_s=0.005) as server:
            load = await under_load(server)
            server.send(number)
            assert await server.exit_code() == code_of(number, DRAINED)
            wanted = number != signal.SIGKILL
            assert {answer.ok for answer in await load.answers()} == {wanted}

    run(work())


@pytest.mark.parametrize("number", SIGNALS)
def test_while_it_drains(tmp_path: Path, number: int) -> None:
    async def work() -> None:
        async with started(tmp_path, step_s=0.1) as server:
            load = await under_load(server)
            server.send(signal.SIGTERM)
            await server.readyz(503)
            server.send(number)
            assert await server.exit_code(10) == code_of(number, FORCED)
            assert {answer.ok for answer in await load.answers()} == {False}

    run(work())


@pytest.mark.parametrize("number", SIGNALS)
def test_while_the_engine_restarts(tmp_path: Path, number: int) -> None:
    async def work() -> None:
        async with started(tmp_path, other_starts_s=1, step_s=0.005) as server:
            load = await under_load(server)
            os.kill(server.board.get("pid"), signal.SIGKILL)
            await server.readyz(503)
            server.send(number)
            assert await server.exit_code() == code_of(number, DRAINED)
            wanted = number != signal.SIGKILL
            assert {answer.ok for answer in await load.answers()} == {wanted}, "a drain waits for the engine"

    run(work())


def test_twice_while_the_engine_restarts(tmp_path: Path) -> None:
    async def work() -> None:
        async with started(tmp_path, other_starts_s=60, step_s=0.005) as server:
            load = await under_load(server)
            os.kill(server.board.get("pid"), signal.SIGKILL)
            await server.readyz(503)
            server.send(signal.SIGTERM)
            await server.status("draining")
            server.send(signal.SIGTERM)
            assert await server.exit_code(10) == FORCED
            assert {answer.ok for answer in await load.answers()} == {False}

    run(work())
