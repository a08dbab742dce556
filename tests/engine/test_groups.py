"""Two engine groups behind one frontend: the same tokens as one, and one may die without the other."""

import asyncio
import dataclasses
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from quire import LLM, AsyncEngine, Config
from quire.engine.admission import Admission, TenantLimits
from quire.engine.groups import Groups, Share
from quire.engine.metrics import NOTHING, StepStats
from quire.engine.remote import RemoteEngine
from quire.engine.service import Status
from quire.errors import ConfigError, EngineDead, Overloaded
from quire.resolve import Machine
from quire.server.load import Load
from quire.types import RequestOutput, SamplingParams
from tests.engine.test_ranks import is_alive

OPTIONS = {"model": "demo", "device": "cpu", "num_threads": 1, "kv_cache_memory_bytes": 2**24}
NUM = 8
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=120, ignore_eos=True)


@dataclass
class Site:
    """An engine, and how far its streams are."""

    engine: RemoteEngine
    pieces: Counter[int] = field(default_factory=Counter)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def groups(self) -> Groups:
        assert isinstance(self.engine.keeper, Groups)
        return self.engine.keeper

    async def one(self, number: int, params: SamplingParams = DRAWN, tenant: str = "") -> RequestOutput:
        prompt = f"Tell me about number {number}, please."
        outputs: list[RequestOutput] = []
        async for output in self.engine.generate(prompt, params, f"request-{number}", tenant=tenant):
            outputs.append(output)
            self.pieces[number] += 1
            self.news.set()
        return outputs[-1]

    def streams(self, num: int = NUM, params: SamplingParams = DRAWN) -> list["asyncio.Task[RequestOutput]"]:
        self.pieces.clear()
        return [asyncio.create_task(self.one(number, params)) for number in range(num)]

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), 60)

    def processes(self) -> list[list[int]]:
        """Of each group."""
        found = [keeper.supervisor for keeper in self.groups.keepers]
        return [[each.pid, *each.ready.result().ranks] for each in found if each.ready is not None]

    def places(self) -> dict[int, set[str]]:
        """Labels of open requests by group."""
        return {
            i: {entry.submission.label for _, entry, _ in keeper.entries()}
            for i, keeper in enumerate(self.groups.keepers)
        }


@asynccontextmanager
async def running(
    num_groups: int = 2, admission: Admission | None = None, **options: object
) -> AsyncIterator[Site]:
    config = Config(**OPTIONS, data_parallel_size=num_groups, disable_log_stats=True, **options)
    engine = RemoteEngine(config, admission=admission)
    await engine.start()
    try:
        yield Site(engine)
    finally:
        engine.shutdown()


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What one group says."""

    async def work() -> list[list[int]]:
        async with running(1) as site:
            return tokens(await asyncio.gather(*site.streams()))

    return asyncio.run(work())


def test_two_groups_say_what_one_says_and_share_the_work(expected: list[list[int]]) -> None:
    async def work() -> None:
        async with running() as site:
            assert site.engine.facts.summary.startswith("2 engine groups, each with 8 layers")
            tasks = site.streams()
            await site.until(lambda: len(site.pieces) == NUM)
            assert min(map(len, site.places().values())) >= 2
            load = Load.of(site.engine.metrics)
            assert load is not None and load.running > 0 and load.kv_tokens > 0
            assert tokens(await asyncio.gather(*tasks)) == expected
            assert_nothing_is_left(site)
            text = generate_latest(site.engine.metrics.registry).decode()
            assert text.count("# HELP vllm:num_requests_running ") == 1
            generated = {
                sample.labels["engine"]: sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.name == "vllm:iteration_tokens_total_sum"
            }
            assert generated.keys() == {"0", "1"} and min(generated.values()) >= 2 * 120

    asyncio.run(work())


def assert_nothing_is_left(site: Site) -> None:
    assert not site.groups.division.tickets
    for keeper, replica in zip(site.groups.keepers, site.groups.division.router.replicas, strict=True):
        assert not keeper.clients and not keeper.journal.entries
        assert (replica.queued_tokens, replica.num_open, replica.num_running) == (0, 0, 0)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_group_loses_a_rank_and_the_others_streams_do_not_notice(num_ranks: int) -> None:
    async def work() -> None:
        async with running(tensor_parallel_size=num_ranks, dtype="float32") as site:
            expected = tokens(await asyncio.gather(*site.streams()))
            lost, spared = site.processes()
            tasks = site.streams()
            await site.until(lambda: len(site.pieces) == NUM)
            hit, others = site.places()[0], site.places()[1]
            assert hit and others and len(lost) == num_ranks
            os.kill(lost[-1], signal.SIGKILL)
            outputs = await asyncio.gather(*tasks)
            assert tokens(outputs) == expected
            replayed = {output.request_id for output in outputs if output.metrics.num_replays}
            assert replayed == hit and not replayed & others
            assert [keeper.num_restarts for keeper in site.groups.keepers] == [1, 0]
            await site.one(99)
            assert site.engine.status is Status.READY and site.groups.num_replayed == len(hit)
            assert not any(map(is_alive, lost)) and site.processes()[1] == spared
            assert_nothing_is_left(site)

    asyncio.run(work())


@pytest.mark.slow
def test_both_are_killed_and_requests_wait(expected: list[list[int]]) -> None:
    async def work() -> None:
        async with running() as site:
            early = site.streams(NUM // 2)
            await site.until(lambda: len(site.pieces) == NUM // 2)
            for keeper in site.groups.keepers:
                keeper.supervisor.replace()
            while site.engine.status is Status.READY:
                site.groups.changed.clear()
                await site.groups.changed.wait()
            late = [asyncio.create_task(site.one(number)) for number in range(NUM // 2, NUM)]
            assert tokens(await asyncio.gather(*early, *late)) == expected

    asyncio.run(work())


@pytest.mark.slow
def test_another_group_goes_on_when_one_is_given_up(expected: list[list[int]]) -> None:
    async def work() -> None:
        async with running() as site:
            tasks = site.streams()
            await site.until(lambda: len(site.pieces) == NUM)
            site.groups.keepers[0].close(EngineDead("it cannot be started any more"))
            assert len(site.places()[1]) == NUM and site.engine.status is Status.READY
            assert tokens(await asyncio.gather(*tasks)) == expected
            assert_nothing_is_left(site)
            site.groups.keepers[1].close(EngineDead("nor can this"))
            assert site.engine.status is Status.DEAD
            with pytest.raises(EngineDead, match="nor can this"):
                await site.one(1)

    asyncio.run(work())


@pytest.mark.slow
def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    async def work() -> None:
        story, params = list(range(20, 420)), SamplingParams(temperature=0, max_tokens=1)
        async with running() as site:
            found = []
            for turn in range(6):
                prompt = {"prompt_token_ids": story[: 300 + 20 * turn]}
                outputs = site.engine.generate(prompt, params)
                found += [output.num_cached_tokens async for output in outputs]
            assert found[0] == 0 and min(found[1:]) > 200
            assert site.groups.division.router.num_cached_tokens > 5 * 200

    asyncio.run(work())


@pytest.mark.slow
def test_what_a_tenant_may_have_holds_over_all_groups() -> None:
    admission = Admission({"a": TenantLimits(max_concurrent=2)}, TenantLimits(), 100, 10**6, 100.0)

    async def work() -> None:
        async with running(admission=admission) as site:
            tasks = [asyncio.create_task(site.one(number, tenant="a")) for number in range(2)]
            await site.until(lambda: len(site.pieces) == 2)
            with pytest.raises(Overloaded) as caught:
                await site.one(2, tenant="a")
            assert caught.value.reason == "tenant_concurrency"
            site.groups.keepers[0].close(EngineDead("its requests go on elsewhere, admitted as they are"))
            await asyncio.gather(*tasks)
            await site.one(3, tenant="a")
            assert_nothing_is_left(site)
            assert not admission.open

    asyncio.run(work())


def test_tokens_that_a_group_found_are_counted_once() -> None:
    admission = Admission({}, TenantLimits(), 100, 10**6, 100.0)
    latest: dict[int, StepStats] = {}
    one, two = Share(admission, latest, 0), Share(admission, latest, 1)

    def step(share: Share, hits: int, now: float) -> None:
        stats = dataclasses.replace(
            NOTHING, num_running=1, num_waiting=1, prefill_tokens=100, cache_hits=hits
        )
        share.computed(stats, now)

    step(one, 1000, 0.0)
    step(two, 5000, 0.0)
    before = admission.speed.token.units
    step(one, 1010, 0.0)
    step(two, 5000, 0.0)
    two.restarted(0.0)
    step(one, 1010, 0.0)
    step(two, 0, 0.0)
    assert admission.speed.token.units - before == 4 * 100 + 10


@pytest.mark.slow
def test_requests_that_are_left_are_forgotten() -> None:
    async def work() -> None:
        async with running() as site:
            tasks = site.streams(4)
            await site.until(lambda: len(site.pieces) == 4)
            tasks[0].cancel()
            await asyncio.wait([tasks[0]])
            await site.engine.abort("request-1")
            assert (await tasks[1]).outputs[0].finish_reason == "abort"
            site.groups.forget(site.engine)
            assert_nothing_is_left(site)
            for task in tasks[2:]:
                task.cancel()
            await asyncio.wait(tasks)

    asyncio.run(work())


def test_what_does_not_go_together_is_refused() -> None:
    two = {**OPTIONS, "data_parallel_size": 2}
    with pytest.raises(ConfigError, match="trace_file"):
        Config(**two, trace_file="trace")
    with pytest.raises(ConfigError, match="quire serve"):
        LLM(**two)
    with pytest.raises(ConfigError, match="quire serve"):
        AsyncEngine(Config(**two))
    for number in (0, 65):
        with pytest.raises(ConfigError, match="data_parallel_size"):
            Config(**{**OPTIONS, "data_parallel_size": number})


def test_groups_divide_the_machine() -> None:
    machine = Machine(
        device="cpu",
        total_bytes=100,
        available_bytes=50,
        num_cores=5,
        fast_dtypes=("bfloat16",),
        block_size=16,
        asynchronous=False,
    )
    part = machine.part(2)
    assert (part.total_bytes, part.available_bytes, part.num_cores) == (50, 25, 2)
    assert machine.part(8).num_cores == 1
