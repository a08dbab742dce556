"""What is kept for several clients: whose it is, who is refused, what happens when one of them or the engine goes."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from quire.config import Config
from quire.engine.admission import Admission, TenantLimits
from quire.engine.events import Submission, TokenEvent
from quire.engine.keeper import Keeper
from quire.engine.link import Link
from quire.engine.merge import Fixed, kept, merged, samples_of
from quire.engine.metrics import Metrics
from quire.engine.service import Status
from quire.engine.supervisor import GROUP
from quire.engine.wire import Abort, Channel, FromWorker, Message, Refused, WireError, ended, error_of
from quire.errors import EngineCrash, EngineDead, InvalidRequest, Overloaded, PromptTooLong, QuireError
from quire.types import SamplingParams
from tests.engine.faulty_group import DIES

CONFIG = Config(
    model="demo", device="cpu", num_threads=1, kv_cache_memory_bytes=2**24, disable_log_stats=True
)
GREEDY = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, seed=0)


@dataclass(eq=False)
class Listener:
    """A client that writes down what it is told."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, str | QuireError] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def heard(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            assert event.request_id not in self.ends
            if event.token is not None:
                self.tokens.setdefault(event.request_id, []).append(event.token)
            if event.finish is not None:
                self.ends[event.request_id] = event.finish
        self.news.set()

    def failed(self, name: str, error: QuireError) -> None:
        assert name not in self.ends
        self.ends[name] = error
        self.news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), 60)


@asynccontextmanager
async def running(admission: Admission | None = None, entry: str = GROUP) -> AsyncIterator[Keeper]:
    keeper = Keeper(CONFIG, Metrics("demo", log_stats=False), admission=admission, entry=entry)
    try:
        await keeper.start()
        yield keeper
    finally:
        keeper.close(EngineDead("the test is over"))


def submission(name: str, params: SamplingParams = GREEDY, tenant: str = "") -> Submission:
    prompt = tuple(range(20, 40))
    return Submission(
        request_id=name,
        prompt_token_ids=prompt,
        params=params,
        max_tokens=params.max_tokens or 0,
        tenant=tenant,
    )


def counted(keeper: Keeper, name: str) -> float:
    return sum(metric.value for metric in keeper.metrics.snapshot() if metric.name == name)


def test_everybody_hears_of_their_own() -> None:
    async def work() -> None:
        async with running() as keeper:
            one, other, alone = Listener(), Listener(), Listener()
            for number in range(4):
                keeper.add(submission(f"1-{number}"), one)
                keeper.add(submission(f"2-{number}"), other)
            keeper.add(submission("bad"), alone)
            keeper.abort("bad")
            await one.until(lambda: len(one.ends) == 4)
            await other.until(lambda: len(other.ends) == 4)
            assert sorted(one.tokens) == [f"1-{number}" for number in range(4)]
            assert sorted(other.tokens) == [f"2-{number}" for number in range(4)]
            assert len({tuple(tokens) for tokens in (one.tokens | other.tokens).values()}) == 1
            assert not alone.ends and not keeper.clients and not keeper.journal.entries

    asyncio.run(work())


def test_a_client_that_is_gone_is_forgotten() -> None:
    async def work() -> None:
        async with running() as keeper:
            stays, goes = Listener(), Listener()
            for number in range(4):
                keeper.add(submission(f"1-{number}", replace(GREEDY, max_tokens=1500)), goes)
            keeper.add(submission("2-0"), stays)
            await goes.until(lambda: len(goes.tokens) == 4)
            keeper.forget(goes)
            assert set(keeper.clients) <= {"2-0"}
            await stays.until(lambda: bool(stays.ends))
            assert keeper.metrics.totals.num_running == keeper.metrics.totals.used_blocks == 0
            assert not goes.ends

    asyncio.run(work())


def test_who_is_refused_is_told_and_who_comes_back_is_not() -> None:
    async def work() -> None:
        limits = {"few": TenantLimits(max_concurrent=2, share=3.0)}
        async with running(Admission(limits, TenantLimits(), 100, 10**6, 30.0)) as keeper:
            client = Listener()
            long = replace(GREEDY, max_tokens=400)
            for number in range(3):
                keeper.add(submission(f"few-{number}", long, "few"), client)
            keeper.add(submission("other", long), client)
            refused = client.ends["few-2"]
            assert isinstance(refused, Overloaded) and refused.scope == "tenant"
            assert keeper.journal.entries["few-0"].submission.share == 3.0
            assert keeper.journal.entries["other"].submission.share == 1.0
            await client.until(lambda: len(client.tokens) == 3)
            os.kill(keeper.supervisor.pid, signal.SIGKILL)
            await client.until(lambda: len(client.ends) == 4)
            assert client.ends == {
                "few-0": "length",
                "few-1": "length",
                "other": "length",
                "few-2": refused,
            }
            assert {len(tokens) for tokens in client.tokens.values()} == {400}
            assert keeper.num_replayed == 3
            assert counted(keeper, "vllm:admission_rejections_total") == 1
            keeper.add(submission("few-3", GREEDY, "few"), client)  # there is room again
            await client.until(lambda: "few-3" in client.ends)
            assert client.ends["few-3"] == "length"
            assert keeper.admission is not None and keeper.admission.saturation(0).num_queued_reqs == 0

    asyncio.run(work())


@pytest.mark.slow
def test_a_poison_is_one_clients_alone() -> None:
    async def work() -> None:
        async with running(entry="tests.engine.faulty_group") as keeper:
            one, other = Listener(), Listener()
            for number in range(4):
                keeper.add(submission(f"2-{number}"), other)
            keeper.add(submission("1-0", replace(GREEDY, logit_bias={DIES: 0.005})), one)
            await one.until(lambda: bool(one.ends))
            await other.until(lambda: len(other.ends) == 4)
            assert isinstance(one.ends["1-0"], EngineCrash)
            assert set(other.ends.values()) == {"length"}
            assert {len(tokens) for tokens in other.tokens.values()} == {80}

    asyncio.run(work())


def test_what_is_being_replaced_is_not_ready() -> None:
    """Nor can it be replaced before another is there: whoever waits for that would take the old one for it."""

    async def work() -> None:
        async with running() as keeper:
            mine = Listener()
            keeper.add(submission("mine"), mine)
            await mine.until(lambda: bool(mine.tokens))
            assert keeper.replace()
            assert keeper.status is Status.RESTARTING
            assert not keeper.replace()
            keeper.add(submission("later"), mine)
            await mine.until(lambda: len(mine.ends) == 2)
            assert keeper.status is Status.READY
            assert keeper.num_restarts == 1
            assert mine.ends == {"mine": "length", "later": "length"}
            assert mine.tokens["mine"] == mine.tokens["later"]

    asyncio.run(work())


def test_its_status_is_told() -> None:
    async def work() -> None:
        async with running() as keeper:
            seen = []
            keeper.changed.clear()
            os.kill(keeper.supervisor.pid, signal.SIGKILL)
            while Status.READY not in seen:
                await asyncio.wait_for(keeper.changed.wait(), 60)
                keeper.changed.clear()
                seen.append(keeper.status)
            assert seen == [Status.RESTARTING, Status.READY]
        assert keeper.status is Status.DEAD
        client = Listener()
        keeper.add(submission("late"), client)
        assert isinstance(client.ends["late"], EngineDead)

    asyncio.run(work())


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", param="prompt"),
        InvalidRequest("no"),
        PromptTooLong("long", num_tokens=9, limit=8),
        EngineCrash("died"),
        EngineDead("gone"),
        Overloaded("full", retry_after_s=7, scope="server", reason="max_queue_seconds"),
        WireError("large", request_id="x"),
    ],
)
def test_an_error_travels_with_all_it_says(error: QuireError) -> None:
    message = ended("3-1", error)
    assert message.request_id == "3-1"
    there = error_of(message.kind, message.message, message.details)
    assert type(there) is type(error) and str(there) == str(error) and vars(there) == vars(error)


def test_an_unknown_error_is_the_engines_death() -> None:
    assert isinstance(error_of("KeyError", "what"), EngineDead)


def test_a_damaged_message_costs_its_request_only() -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        found: list[Message] = []
        link = Link(ours, found.extend, incoming=FromWorker)
        await link.connect()
        with theirs:
            whole = Channel(theirs).encode(Abort("1-0"))
            body = Channel(theirs).encoder.encode({"type": "Add", "submission": {"request_id": "1-1"}})
            theirs.sendall(whole + len(body).to_bytes(4, "big") + body + whole)
            theirs.shutdown(socket.SHUT_WR)
            await link.closed
        assert [type(message) for message in found] == [Abort, Refused, Abort]
        assert isinstance(found[1], Refused) and found[1].request_id == "1-1"

    asyncio.run(work())


def registry(count: float, gauge: float | None, observed: Sequence[float]) -> CollectorRegistry:
    made = CollectorRegistry()
    counter = Counter("calls", "Calls", ["kind"], registry=made)
    for kind in ("a", "b"):
        counter.labels(kind).inc(count)
    histogram = Histogram("seconds", "Seconds", buckets=(1.0, 2.0), registry=made)
    for value in observed:
        histogram.observe(value)
    Gauge("open", "Open", registry=made).set(5)
    if gauge is not None:
        Gauge("blocks", "Blocks", registry=made).set(gauge)
    return made


def test_metrics_of_several_processes_add_up() -> None:
    main = samples_of(registry(1, 7, []))
    workers = [samples_of(registry(10, 3, [0.5])), samples_of(registry(100, 4, [1.5, 9.0]))]
    main = [metric for metric in main if metric.name != "open"]
    text = generate_latest(Fixed(merged(main, workers))).decode()
    values = {
        (s.name, s.labels.get("kind") or s.labels.get("le")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert values["calls_total", "a"] == values["calls_total", "b"] == 111
    assert values["blocks", None] == 7 and values["open", None] == 10
    assert [values["seconds_bucket", le] for le in ("1.0", "2.0", "+Inf")] == [1, 2, 3]
    assert values["seconds_count", None] == 3 and values["seconds_sum", None] == 11
    assert [metric.name for metric in kept(workers[0])] == ["calls", "seconds"]
