"""The engine in a process of its own, which is killed, stopped and poisoned; and what is left when all is over."""

import asyncio
import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from quire.config import Config
from quire.engine.remote import RemoteEngine
from quire.engine.service import Status
from quire.errors import CapacityError, ConfigError, EngineCrash, EngineDead, InvalidRequest, ModelError
from quire.types import OutputKind, RequestOutput, SamplingParams
from tests.engine.faulty_group import COMPUTES, DIES, HANGS
from tests.processes import started

CONFIG = Config(
    model="demo", device="cpu", num_threads=1, kv_cache_memory_bytes=2**24, disable_log_stats=True
)
FAULTY, SHORT_LIVED = "tests.engine.faulty_group", "tests.engine.short_lived_group"
GREEDY = SamplingParams(
    temperature=0, max_tokens=96, ignore_eos=True, output_kind=OutputKind.DELTA, logprobs=1
)
SAMPLED = replace(GREEDY, temperature=0.9, top_k=40, frequency_penalty=0.2, min_tokens=20, n=2)
PROMPTS = [f"Tell me about number {i}, please." for i in range(16)]
PARAMS = [GREEDY if i % 2 else replace(SAMPLED, seed=i) for i in range(16)]
Tokens = list[list[int]]


@asynccontextmanager
async def running(config: Config = CONFIG, **options: object) -> AsyncIterator[RemoteEngine]:
    engine = RemoteEngine(config, **options)
    try:
        await engine.start()
        yield engine
    finally:
        engine.shutdown()


def in_a_loop(work: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """A test that runs in an event loop, with an end to waiting."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(work(), 240))

    run.__name__, run.__doc__ = work.__name__, work.__doc__
    return run


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


async def collect(engine: RemoteEngine, *args: object, **kwargs: object) -> list[RequestOutput]:
    return [output async for output in engine.generate(*args, **kwargs)]


class Counter:
    """Collects streams, and calls back when all of them together have so many tokens."""

    def __init__(self, at: list[int], act: Callable[[], None]):
        self.at, self.act, self.num_tokens = sorted(at), act, 0

    async def tokens(
        self, engine: RemoteEngine, prompt: str, params: SamplingParams
    ) -> tuple[Tokens, list[str]]:
        """Each output's tokens and text; log probabilities must come with every token."""
        tokens: Tokens = [[] for _ in range(params.n)]
        texts, num_scores = [""] * params.n, 0
        async for output in engine.generate(prompt, params):
            for one in output.outputs:
                tokens[one.index] += one.token_ids
                texts[one.index] += one.text
                num_scores += len(one.logprobs or [])
                self.num_tokens += len(one.token_ids)
            if self.at and self.num_tokens >= self.at[0]:
                del self.at[0]
                self.act()
        assert num_scores == sum(map(len, tokens)) == params.n * (params.max_tokens or 0)
        return tokens, texts


async def all_streams(
    engine: RemoteEngine, at: list[int] | None = None, act: Callable[[], None] = lambda: None
) -> list[tuple[Tokens, list[str]]]:
    counter = Counter(at or [], act)
    pairs = zip(PROMPTS, PARAMS, strict=True)
    return await asyncio.gather(*(counter.tokens(engine, prompt, params) for prompt, params in pairs))


def total_tokens() -> int:
    return sum(params.n * (params.max_tokens or 0) for params in PARAMS)


@pytest.mark.slow
@in_a_loop
async def test_kills_at_any_point_change_nothing() -> None:
    """What a request without a seed draws depends on its number, so each run has an engine of its own."""
    async with running() as engine:
        want = await all_streams(engine)
        assert engine.keeper.num_restarts == 0
    for seed in range(2):
        points = random.Random(seed).sample(range(1, total_tokens() - 200), 4)
        async with running() as engine:
            got = await all_streams(
                engine, points, lambda e=engine: os.kill(e.keeper.supervisor.pid, signal.SIGKILL)
            )
            assert got == want
            assert 1 <= engine.keeper.num_restarts <= 4 and engine.keeper.num_replayed >= 16
            assert engine.status is Status.READY and len(engine.keeper.journal.entries) == 0
        counted = {m.name: m.value for m in engine.metrics.snapshot() if m.name.startswith("quire:")}
        assert counted["quire:engine_restarts_total"] == engine.keeper.num_restarts
        assert counted["quire:requests_replayed_total"] == engine.keeper.num_replayed


@in_a_loop
async def test_a_request_without_a_seed_draws_the_same_after_a_restart() -> None:
    got = []
    for at in ([], [60]):
        async with running() as engine:  # what it draws depends on which request of its engine it is
            counter = Counter(at, lambda e=engine: os.kill(e.keeper.supervisor.pid, signal.SIGKILL))
            got.append(await counter.tokens(engine, "hello", SAMPLED))
            assert engine.keeper.num_restarts == len(at)
    assert got[0] == got[1]


@pytest.mark.slow
@in_a_loop
async def test_a_stopped_process_is_noticed_and_replaced() -> None:
    async with running(hang_s=0.5) as engine:
        want = await all_streams(engine)
        stopped = engine.keeper.supervisor.pid
        got = await all_streams(engine, [300], lambda: os.kill(stopped, signal.SIGSTOP))
        assert got == want and engine.keeper.num_restarts == 1
        assert not Path(f"/proc/{stopped}").exists()


@pytest.mark.slow
@in_a_loop
async def test_the_process_that_starts_others_may_die_too() -> None:
    async with running() as engine:
        want = await all_streams(engine)
        first, group = engine.keeper.supervisor.nursery.process.pid, engine.keeper.supervisor.pid
        got = await all_streams(engine, [300], lambda: os.kill(first, signal.SIGKILL))
        assert got == want and engine.keeper.num_restarts == 1
        assert engine.keeper.supervisor.nursery.process.pid != first
        assert not Path(f"/proc/{first}").exists() and engine.keeper.supervisor.pid != group


@in_a_loop
async def test_an_idle_process_that_dies_is_replaced_before_it_is_needed() -> None:
    async with running() as engine:
        lost = engine.keeper.supervisor.pid
        os.kill(lost, signal.SIGKILL)
        outputs = await collect(engine, "hello", GREEDY)
        assert (
            outputs[-1].finished and engine.keeper.num_restarts == 1 and engine.keeper.supervisor.pid != lost
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mark", "hang_s", "at"), [(DIES, 10.0, 0), (DIES, 10.0, 1), (DIES, 10.0, 17), (HANGS, 0.5, 3)]
)
def test_a_poison_fails_alone(mark: int, hang_s: float, at: int) -> None:
    async def work() -> None:
        poison = replace(GREEDY, logit_bias={mark: at / 1000})
        async with running(entry=FAULTY, hang_s=hang_s) as engine:
            want = await all_streams(engine)
            streams = asyncio.create_task(all_streams(engine))
            with pytest.raises(EngineCrash):
                await asyncio.gather(streams, collect(engine, "deadly", poison, "poison"))
            assert await streams == want
            assert engine.keeper.num_restarts == 3
            assert (await collect(engine, "after", GREEDY))[-1].finished

    asyncio.run(asyncio.wait_for(work(), 240))


@pytest.mark.slow
@in_a_loop
async def test_a_process_that_computes_for_long_is_not_taken_for_hung() -> None:
    async with running(entry=FAULTY, hang_s=0.3) as engine:
        slow = replace(GREEDY, logit_bias={COMPUTES: 0.005})
        assert (await collect(engine, "hello", slow))[-1].finished
        assert engine.keeper.num_restarts == 0


@pytest.mark.slow
@in_a_loop
async def test_an_engine_that_always_dies_is_given_up() -> None:
    async with running(entry=SHORT_LIVED) as engine:
        await engine.keeper.supervisor.watch
        with pytest.raises(EngineDead, match="without computing a token"):
            await collect(engine, "hello", GREEDY)
        assert engine.status is Status.DEAD and engine.keeper.num_restarts == 5
        with pytest.raises(EngineDead):
            await engine.check_health()


@in_a_loop
async def test_consumers_that_leave_free_the_cache() -> None:
    async with running() as engine:

        async def leave(number: int) -> None:
            stream = engine.generate(f"number {number} will not stay", replace(SAMPLED, n=1 + number % 2))
            async for _ in stream:
                break
            await stream.aclose()

        await asyncio.gather(*(leave(i) for i in range(200)))
        assert engine.num_open == len(engine.keeper.journal.entries) == len(engine.requests.open) == 0
        await collect(engine, "after", GREEDY)  # what was sent before it has been obeyed
        assert engine.metrics.totals.used_blocks == 0
        assert engine.metrics.totals.num_running == engine.metrics.totals.num_waiting == 0


@pytest.mark.slow
@in_a_loop
async def test_a_slow_consumer_gets_everything_at_once() -> None:
    async with running() as engine:
        fast = await collect(engine, "hello", GREEDY)
        slow = engine.generate("hello", GREEDY)
        first = await anext(slow)
        await collect(engine, "hello", replace(GREEDY, max_tokens=500))  # takes much longer
        rest = [output async for output in slow]
        assert len(rest) == 1 and rest[0].finished
        tokens = first.outputs[0].token_ids + rest[0].outputs[0].token_ids
        assert tokens == sum((o.outputs[0].token_ids for o in fast), [])
        assert first.outputs[0].text + rest[0].outputs[0].text == "".join(o.outputs[0].text for o in fast)


@in_a_loop
async def test_requests_that_come_or_leave_during_a_restart() -> None:
    async with running() as engine:
        stays, leaves = engine.generate("stays", GREEDY), engine.generate("leaves", GREEDY)
        head = await anext(stays)
        await anext(leaves)
        os.kill(engine.keeper.supervisor.pid, signal.SIGKILL)
        while engine.status is Status.READY:
            await asyncio.wait([engine.keeper.supervisor.link.closed])
            await asyncio.sleep(0)
        assert engine.status is Status.RESTARTING
        await leaves.aclose()
        comes = asyncio.create_task(collect(engine, "comes", GREEDY))
        tokens = head.outputs[0].token_ids + [t async for o in stays for t in o.outputs[0].token_ids]
        assert len(tokens) == 96 and (await comes)[-1].finished
        assert engine.keeper.num_replayed == 1


@pytest.mark.slow
@in_a_loop
async def test_errors_belong_to_their_request() -> None:
    async with running() as engine:
        long = replace(GREEDY, max_tokens=400)
        results = await asyncio.gather(
            collect(engine, "hello", GREEDY, "good"),
            collect(engine, "", GREEDY, "empty"),
            collect(engine, [10**6], GREEDY, "no token"),
            collect(engine, "twice", long, "same"),
            collect(engine, "twice", long, "same"),
            return_exceptions=True,
        )
        assert results[0][-1].finished
        assert sum(isinstance(r, InvalidRequest) for r in results) == 3
        assert engine.keeper.num_restarts == 0

    small = replace(CONFIG, kv_cache_memory_bytes=2**19, max_model_len=64)
    async with running(small) as engine:
        with pytest.raises(InvalidRequest):
            await collect(engine, list(range(5, 70)), GREEDY)


@pytest.mark.slow
@in_a_loop
async def test_abort_ends_the_stream_and_frees_the_id() -> None:
    async with running() as engine:
        outputs = []
        async for output in engine.generate("hello", replace(GREEDY, max_tokens=500), "again"):
            outputs.append(output)
            await engine.abort("again")
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        again = await collect(engine, "hello", GREEDY, "again")
        other = await collect(engine, "hello", GREEDY, "other")
        joined = [sum((o.outputs[0].token_ids for o in stream), []) for stream in (again, other)]
        assert joined[0] == joined[1] and len(joined[0]) == 96


@in_a_loop
async def test_chat_stop_strings_and_final_outputs() -> None:
    async with running() as engine:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        params = SamplingParams(
            temperature=0, max_tokens=40, stop=["Paris"], output_kind=OutputKind.FINAL_ONLY
        )
        prompt = engine.inputs.chat_prompt(question, None)
        outputs = [output async for output in engine.generate(prompt, params)]
        assert len(outputs) == 1 and outputs[0].outputs[0].stop_reason == "Paris"
        assert outputs[0].outputs[0].text == "The capital of France is "


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "/no/such/model"}, ModelError),
        ({"kv_cache_memory_bytes": 2**50}, CapacityError),
        ({"max_model_len": 10**9}, ConfigError),
    ],
)
def test_what_cannot_start_says_why_and_leaves_nothing(
    options: dict[str, object], error: type[Exception]
) -> None:
    async def work() -> None:
        engine = RemoteEngine(replace(CONFIG, **options))
        before = open_files()
        with pytest.raises(error):
            await engine.start()
        assert engine.status is Status.DEAD and engine.keeper.supervisor.nursery is None
        await asyncio.sleep(0)  # transports close their sockets in the loop's next round
        assert open_files() == before

    asyncio.run(asyncio.wait_for(work(), 60))


@in_a_loop
async def test_shutdown_leaves_no_process_and_no_socket() -> None:
    before = open_files()
    async with running() as engine:
        streams = asyncio.gather(
            *(collect(engine, "hello", GREEDY) for _ in range(4)), return_exceptions=True
        )
        await collect(engine, "hello", replace(GREEDY, max_tokens=4))
        processes = [engine.keeper.supervisor.pid, engine.keeper.supervisor.nursery.process.pid]
    assert all(isinstance(result, EngineDead) for result in await streams)
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    assert open_files() == before
    with pytest.raises(EngineDead):
        await collect(engine, "late", GREEDY)
    engine.shutdown()  # a second time does nothing


FRONTEND = f"""
import asyncio, json, sys
from quire.config import Config
from quire.engine.remote import RemoteEngine
from quire.types import SamplingParams

async def main():
    engine = RemoteEngine(Config(**json.loads({json.dumps(json.dumps({"model": "demo", "device": "cpu"}))})))
    starting = asyncio.create_task(engine.start())
    while engine.keeper.supervisor.nursery is None:
        await asyncio.sleep(0)
    print(engine.keeper.supervisor.nursery.process.pid, flush=True)
    await starting
    print(engine.keeper.supervisor.pid, flush=True)
    async for output in engine.generate("hello", SamplingParams(max_tokens=1000, ignore_eos=True)):
        print("token", flush=True)

assert "torch" not in sys.modules
asyncio.run(main())
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(each, marks=SLOW) for each in (signal.SIGTERM, signal.SIGINT))]
)
@pytest.mark.parametrize("num_lines", [1, 2, 3])
def test_nothing_outlives_the_frontend(number: int, num_lines: int) -> None:
    """It gets the signal while its nursery loads, when it is ready, or amid a stream."""
    command = [sys.executable, "-c", FRONTEND]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as frontend:
        lines = [frontend.stdout.readline() for _ in range(num_lines)]
        watched = [os.pidfd_open(int(line)) for line in lines[:2]]
        frontend.send_signal(number)
        frontend.wait(20)
        for descriptor in watched:
            gone, _, _ = select.select([descriptor], [], [], 20)
            os.close(descriptor)
            assert gone
