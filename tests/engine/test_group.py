"""An engine group in a process of its own: what it is told, what it says, and how it ends."""

import multiprocessing
import os
import signal
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess

import msgspec
import pytest

from quire.config import Config
from quire.engine.build import build_core
from quire.engine.core import EngineCore
from quire.engine.events import Submission, TokenEvent
from quire.engine.group import main
from quire.engine.wire import (
    Abort,
    Add,
    Batch,
    Channel,
    Events,
    Failed,
    FromGroup,
    Launch,
    Message,
    Ping,
    Pong,
    Ready,
    Refused,
    Stop,
)
from quire.errors import EngineDead
from quire.types import SamplingParams

OPTIONS = {"model": "demo", "device": "cpu", "dtype": "float32", "num_threads": 1, "max_model_len": 256}
SEEDED = SamplingParams(temperature=1.5, seed=5, max_tokens=40, ignore_eos=True)
DEADLINE_S = 30


def hang(sock: socket.socket) -> None:
    """A group whose first step says so and never ends."""

    def step(_: EngineCore) -> list[TokenEvent]:
        Channel(sock).send(Pong(99))
        threading.Event().wait()
        return []

    EngineCore.step = step  # type: ignore[method-assign]
    main(sock)


class Peer:
    """The frontend's end of a group's socket."""

    def __init__(self, entry: Callable[[socket.socket], None] = main) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["quire.engine.group"])
        ours, theirs = socket.socketpair()
        self.process: BaseProcess = context.Process(target=entry, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.channel = Channel(ours, incoming=FromGroup)

    def launch(self, **options: object) -> Message:
        self.channel.send(Launch({**OPTIONS, **options}))
        return self.receive()

    def receive(self) -> Message:
        message = self.channel.receive(DEADLINE_S)
        assert message is not None, "the group says nothing"
        return message

    def until(self, wanted: Message) -> list[Message]:
        """Everything up to a message."""
        seen = [self.receive()]
        while seen[-1] != wanted:
            seen.append(self.receive())
        return seen

    def run(self, *submissions: Submission) -> dict[str, list[TokenEvent]]:
        """Events of requests by id, to their ends; a refusal counts as an end."""
        for each in submissions:
            self.channel.send(Add(each))
        events: dict[str, list[TokenEvent]] = defaultdict(list)
        waiting = {each.request_id for each in submissions}
        while waiting:
            match self.receive():
                case Events(new):
                    for event in new:
                        events[event.request_id].append(event)
                        waiting -= {event.request_id} if event.finish else set()
                case Refused(name):
                    waiting.discard(name)
        return events

    def drain(self) -> None:
        """Wait until the group is idle and has said so."""
        self.channel.send(Abort("nobody"))
        while True:
            match self.receive():
                case Events([], stats) if not (stats.num_running or stats.num_waiting or stats.used_blocks):
                    return

    def exit_code(self) -> int | None:
        self.process.join(DEADLINE_S)
        return self.process.exitcode

    def close(self) -> None:
        self.channel.sock.close()
        self.process.join(DEADLINE_S)
        alive = self.process.is_alive()
        self.process.kill()  # SIGTERM means nothing to it
        assert not alive, "it outlives its frontend"


@pytest.fixture(scope="module")
def shared() -> Iterator[Peer]:
    peer = Peer()
    assert isinstance(peer.launch(), Ready)
    yield peer
    peer.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def submission(name: str, params: SamplingParams = SEEDED, prompt: tuple[int, ...] = ()) -> Submission:
    return Submission(
        request_id=name,
        prompt_token_ids=prompt or (511, 263, len(name), 77),
        params=params,
        max_tokens=params.max_tokens or 40,
    )


def tokens(events: list[TokenEvent]) -> tuple[int, ...]:
    return tuple(e.token for e in events if e.token is not None)


def in_process(*submissions: Submission) -> dict[str, list[TokenEvent]]:
    core = build_core(Config(**OPTIONS), offline=True).core
    for each in submissions:
        core.add(each)
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    while not core.idle:
        for event in core.step():
            events[event.request_id].append(event)
    return events


def test_it_says_what_it_found_out(peer: Peer) -> None:
    ready = peer.launch(max_model_len=None)
    assert isinstance(ready, Ready)
    facts, local = ready.facts, build_core(Config(**{**OPTIONS, "max_model_len": None}), offline=False)
    assert (facts.vocab_size, facts.max_model_len) == (local.spec.vocab_size, local.max_model_len)
    assert facts.num_blocks > 0 and facts.block_size == local.config.block_size
    assert Config(**facts.options).max_num_seqs == local.config.max_num_seqs, "every option has a value"
    assert facts.reasons.keys() == local.reasons.keys() and "8 layers in float32 on cpu" in facts.summary
    assert facts.start_s > 0


def test_tokens_are_those_of_an_engine_in_this_process(shared: Peer) -> None:
    asked = [submission(f"r{i}", replace(SEEDED, seed=i, logprobs=1)) for i in range(8)]
    got, want = shared.run(*asked), in_process(*asked)
    for each in asked:
        assert tokens(got[each.request_id]) == tokens(want[each.request_id])
        assert got[each.request_id][-1].finish == "length"
        assert got[each.request_id][0].logprobs.token_ids == want[each.request_id][0].logprobs.token_ids


def test_the_batch_is_announced_before_its_tokens(shared: Peer) -> None:
    shared.drain()
    for name in ("a", "b"):
        shared.channel.send(Add(submission(name, replace(SEEDED, max_tokens=5 if name == "a" else 9))))
    members: set[str] = set()
    calls = ended = 0
    while ended < 2 or members:
        match shared.receive():
            case Batch(entered, left):
                calls += 1
                assert members.isdisjoint(entered) and members.issuperset(left)
                members = (members | set(entered)) - set(left)
            case Events(events):
                assert {e.request_id for e in events} <= members
                ended += sum(e.finish is not None for e in events)
    assert calls <= 4, "only what changes is said"


def test_what_cannot_run_is_refused_and_the_others_go_on(shared: Peer) -> None:
    shared.drain()
    good = submission("good")
    shared.channel.send(Add(good))
    shared.channel.send(Add(submission("long", prompt=(5,) * 300)))
    shared.channel.send(Add(submission("unknown", prompt=(5, 10**6))))
    shared.channel.send(Add(good))
    raw = msgspec.to_builtins(submission("garbage"))
    raw["params"]["temperature"] = 99
    body = msgspec.msgpack.encode({"type": "Add", "submission": raw})
    shared.channel.sock.sendall(len(body).to_bytes(4, "big") + body)
    refused: dict[str, Refused] = {}
    events: list[TokenEvent] = []
    while not (events and events[-1].finish):
        match shared.receive():
            case Refused(name) as message:
                refused[name] = message
            case Events(new):
                events += new
    assert refused.keys() == {"long", "unknown", "good", "garbage"}
    assert "300 prompt tokens" in refused["long"].message and refused["long"].param == "prompt"
    assert "4095" in refused["unknown"].message
    assert "'good' is in use" in refused["good"].message
    assert "temperature is 99" in refused["garbage"].message
    assert {e.request_id for e in events} == {"good"}
    assert tokens(events) == tokens(in_process(good)["good"])


def test_parameters_that_only_the_device_can_refuse_end_their_request_alone(shared: Peer) -> None:
    bad = submission("bad", replace(SEEDED, logit_bias={10**7: 1.0}))
    good = submission("good")
    got = shared.run(good, bad)
    assert [(e.token, e.finish) for e in got["bad"]] == [(None, "error")] and got["bad"][0].error
    assert tokens(got["good"]) == tokens(in_process(good)["good"])


def test_aborted_requests_stop_and_give_back_their_blocks(shared: Peer) -> None:
    shared.drain()
    shared.channel.send(Add(submission("gone", replace(SEEDED, max_tokens=200, n=2))))
    while not isinstance(message := shared.receive(), Events) or not message.events:
        pass
    shared.channel.send(Abort("gone", 0))
    shared.channel.send(Ping(1))
    shared.until(Pong(1))
    later = [m for m in (shared.receive() for _ in range(5)) if isinstance(m, Events)]
    assert {e.index for m in later for e in m.events} == {1}
    shared.channel.send(Abort("gone"))
    shared.drain()


def test_pings_are_answered_between_steps(shared: Peer) -> None:
    shared.channel.send(Add(submission("long", replace(SEEDED, max_tokens=100))))
    shared.channel.send(Ping(7))
    seen = shared.until(Pong(7))
    assert not any(e.finish for m in seen if isinstance(m, Events) for e in m.events)
    shared.channel.send(Abort("long"))
    shared.drain()


def test_interrupts_are_left_to_the_frontend(shared: Peer) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(shared.process.pid or 0, number)
    shared.channel.send(Ping(9))
    shared.until(Pong(9))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": "/no/such/folder"}, "ModelError", "/no/such/folder"),
        ({"dance": 1}, "ConfigError", "no option 'dance'"),
        ({"kv_cache_memory_bytes": 1}, "CapacityError", "KV cache"),
    ],
)
def test_it_says_why_it_cannot_start(peer: Peer, options: dict[str, object], kind: str, message: str) -> None:
    failed = peer.launch(**options)
    assert isinstance(failed, Failed) and failed.kind == kind and message in failed.message
    assert peer.exit_code() == 0


def test_it_stops_when_told(peer: Peer) -> None:
    peer.launch()
    peer.channel.send(Add(submission("left behind")))
    peer.channel.send(Stop())
    assert peer.exit_code() == 0


def test_it_stops_when_told_so_before_anything_else(peer: Peer) -> None:
    """A frontend may be interrupted as soon as it has a group."""
    peer.channel.send(Stop())
    assert peer.exit_code() == 0


def test_it_ends_with_its_frontend_in_the_middle_of_a_step() -> None:
    peer = Peer(hang)
    peer.launch()
    peer.channel.send(Add(submission("r")))
    peer.until(Pong(99))
    peer.close()
    assert peer.process.exitcode == 0


def test_it_ends_with_its_frontend_under_load(peer: Peer) -> None:
    peer.launch()
    peer.channel.send(Add(submission("r", replace(SEEDED, max_tokens=200))))
    while not isinstance(peer.receive(), Batch):
        pass
    peer.close()
    assert peer.process.exitcode == 0


def test_what_is_no_protocol_ends_it(peer: Peer) -> None:
    peer.channel.send(Ping(1))
    assert peer.exit_code() == 1


def test_a_killed_group_is_noticed_and_its_requests_go_on_in_another(peer: Peer) -> None:
    peer.launch()
    asked = submission("r", replace(SEEDED, max_tokens=60, frequency_penalty=0.5))
    peer.channel.send(Add(asked))
    had: list[TokenEvent] = []
    while len(had) < 7:
        if isinstance(message := peer.receive(), Events):
            had += message.events
    os.kill(peer.process.pid or 0, signal.SIGKILL)
    with pytest.raises(EngineDead):
        while message := peer.receive():
            had += message.events if isinstance(message, Events) else []
    assert peer.exit_code() == -signal.SIGKILL
    another = Peer()
    another.launch()
    rest = another.run(replace(asked, outputs=(tokens(had),)))["r"]
    another.close()
    assert tokens(had) + tokens(rest) == tokens(in_process(asked)["r"])
