"""Messages come out as they went in, and what is none is a typed error."""

import dataclasses
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.config import Config
from quire.engine import wire
from quire.engine.events import Submission, TokenEvent
from quire.engine.metrics import StepStats
from quire.engine.wire import Channel, WireError
from quire.errors import EngineDead
from quire.types import (
    CacheMisses,
    Coordinates,
    FinishReason,
    Grammar,
    OutputKind,
    SamplingParams,
    ThinkingBudget,
    Thoughts,
    TokenLogprobs,
)

quick = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
token_ids = st.integers(0, 2**31 - 1)
many = st.lists(token_ids, max_size=5)
counts = st.integers(0, 2**63 - 1)
floats = st.floats(-2, 2)
PARAMS = {
    "n": st.integers(1, 16_384),
    "temperature": st.floats(0.1, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 2**63 - 1),
    "min_p": st.floats(0, 1),
    "presence_penalty": floats,
    "frequency_penalty": floats | st.integers(-2, 2),
    "repetition_penalty": st.floats(0.01, 1e300),
    "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
    "stop": st.none() | words | st.lists(words, max_size=4),
    "stop_token_ids": st.none() | many,
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "max_tokens": st.none() | st.just(2**63 - 1),
    "min_tokens": counts,
    "logprobs": st.none() | st.integers(-1, 2**31),
    "prompt_logprobs": st.none() | st.integers(-1, 2**31),
    "logit_bias": st.none() | st.dictionaries(token_ids, st.floats(-100, 100), max_size=5),
    "allowed_token_ids": st.none() | st.lists(token_ids, min_size=1, max_size=5),
    "bad_words": st.none() | st.lists(words, max_size=4),
    "detokenize": st.just(True),
    "skip_special_tokens": st.booleans(),
    "skip_reading_prefix_cache": st.none() | st.booleans(),
    "structured_outputs": st.none(),  # the submission's grammar is made of it
    "thinking_token_budget": st.none() | counts,
    "output_kind": st.sampled_from(OutputKind),
}
params = st.builds(SamplingParams, **PARAMS)
outputs = st.lists(st.none() | many.map(tuple), max_size=4).map(tuple)
thoughts = st.builds(Thoughts, texts, texts, st.booleans(), st.booleans())
submissions = st.builds(
    Submission,
    request_id=texts,
    prompt_token_ids=many.map(tuple),
    params=params,
    max_tokens=counts,
    eos_token_ids=st.frozensets(token_ids, max_size=3),
    bad_words=st.lists(many.map(tuple), max_size=3).map(tuple),
    priority=st.integers(-(2**63), 2**63 - 1),
    tenant=texts,
    cache_salt=texts,
    outputs=outputs,
    coordinates=st.none() | st.builds(Coordinates, st.lists(many.map(tuple), max_size=3).map(tuple), counts),
    grammar=st.none()
    | st.builds(
        Grammar,
        st.none() | texts,
        st.none() | thoughts,
        st.none() | st.builds(ThinkingBudget, counts, thoughts, many.map(tuple)),
    ),
)
scores = st.builds(
    TokenLogprobs, many, st.lists(st.floats(allow_nan=False), max_size=4), st.lists(counts, max_size=4)
)
misses = st.builds(CacheMisses, *[counts] * len(dataclasses.fields(CacheMisses)))
events = st.builds(
    TokenEvent,
    request_id=texts,
    index=st.integers(0, 16_383),
    token=st.none() | token_ids,
    logprobs=st.none() | scores,
    finish=st.none() | st.sampled_from([reason.value for reason in FinishReason]),
    stop_token=st.none() | token_ids,
    error=st.none() | texts,
    prompt_logprobs=st.none() | st.lists(scores, max_size=3).map(tuple),
    num_cached_tokens=counts,
    cache_misses=st.none() | misses,
    num_preemptions=counts,
    seated_s=st.none() | st.floats(0, 1e12),
)
stats = st.builds(StepStats, *[counts] * (len(dataclasses.fields(StepStats)) - 1), misses)
options = st.just(
    {f.name: f.default for f in dataclasses.fields(Config)} | {"hf_overrides": {"a": [1, None]}}
)
facts = st.builds(
    wire.Facts,
    options=options,
    reasons=st.dictionaries(texts, texts, max_size=3),
    vocab_size=counts,
    max_model_len=counts,
    num_blocks=counts,
    block_size=counts,
    summary=texts,
    start_s=st.floats(0, 1e6),
    ranks=st.lists(counts, max_size=3),
)
names = st.lists(texts, max_size=4)
to_group = st.one_of(
    st.builds(wire.Launch, options),
    st.builds(wire.Add, submissions),
    st.builds(wire.Abort, texts, st.none() | counts),
    st.builds(wire.Reset),
    st.builds(wire.Ping, counts),
    st.builds(wire.Stop),
)
from_group = st.one_of(
    st.builds(wire.Ready, facts),
    st.builds(wire.Failed, texts, texts),
    st.builds(wire.Batch, names, names),
    st.builds(wire.Events, st.lists(events, max_size=4), stats),
    st.builds(wire.Refused, texts, texts, st.none() | texts),
    st.builds(wire.Pong, counts),
)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def test_every_field_has_a_case() -> None:
    assert set(PARAMS) == {f.name for f in dataclasses.fields(SamplingParams)}


def through(message: wire.Message, pieces: int, incoming: object) -> list[object]:
    """What comes out when the bytes arrive in pieces."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        data = Channel(ours).encode(message)
        channel = Channel(theirs, incoming=incoming)
        return [m for i in range(0, len(data), pieces) for m in channel.decode(data[i : i + pieces])]


@quick
@given(to_group, st.sampled_from([1, 7, 10**6]))
def test_messages_to_the_group_come_out_as_they_went_in(message: wire.Message, pieces: int) -> None:
    assert through(message, pieces, wire.ToGroup) == [message]


@quick
@given(from_group, st.sampled_from([1, 7, 10**6]))
def test_messages_of_the_group_come_out_as_they_went_in(message: wire.Message, pieces: int) -> None:
    assert through(message, pieces, wire.FromGroup) == [message]


def test_what_came_out_is_of_the_same_kind() -> None:
    """Equality of dataclasses looks at fields only, and 1 equals 1.0."""
    p = SamplingParams(temperature=1, stop="a", stop_token_ids=[3], logit_bias={3: 1}, allowed_token_ids=[1])
    sent = Submission(
        request_id="r",
        prompt_token_ids=(1, 3),
        params=p,
        max_tokens=1,
        outputs=((1, 2), None, ()),
        spans=((0, 2),),
    )
    (add,) = through(wire.Add(sent), 10**6, wire.ToGroup)
    got = add.submission
    assert isinstance(got, Submission) and isinstance(got.params, SamplingParams)
    assert [type(o) for o in got.outputs] == [tuple, type(None), tuple] and type(
        got.eos_token_ids
    ) is frozenset
    assert (type(got.params.stop), type(got.params.stop_token_ids), got.params.output_kind) == (
        tuple,
        tuple,
        OutputKind.CUMULATIVE,
    )
    assert got == sent
    hash(got.prompt_token_ids), hash(got.outputs), hash(got.bad_words), hash(got.spans)


def test_several_messages_in_one_piece_and_waiting(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    assert channel.receive(0) is None
    assert channel.receive(0.001) is None
    theirs.sendall(channel.encode(wire.Ping(1)) + channel.encode(wire.Ping(2)) + b"\0")
    assert [channel.receive(None), channel.receive(0), channel.receive(0)] == [
        wire.Ping(1),
        wire.Ping(2),
        None,
    ]


def test_a_closed_socket_is_an_error(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.sendall(channel.encode(wire.Ping(1)))
    theirs.close()
    assert channel.receive(None) == wire.Ping(1)
    with pytest.raises(EngineDead, match="socket is gone$"):
        channel.receive(None)
    with pytest.raises(EngineDead, match="gone: "):
        channel.send(wire.Pong(1))


def test_a_truncated_message_is_an_error(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.sendall(channel.encode(wire.Abort("request"))[:-1])
    theirs.close()
    with pytest.raises(EngineDead, match="in the middle of a message"):
        channel.receive(None)


def test_messages_above_the_limit_are_refused(
    pair: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, theirs = pair
    theirs.sendall((wire.MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(WireError, match=f"claims {wire.MAX_MESSAGE_BYTES + 1} bytes; the limit is"):
        channel.receive(None)
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 100)
    assert channel.encode(wire.Abort("a" * 20))
    with pytest.raises(WireError, match="an? Abort has .* the limit is 100"):
        channel.encode(wire.Abort("a" * 100))


@pytest.mark.parametrize(
    "message",
    [wire.Ping(10**30), wire.Abort("\ud800"), wire.Launch({"a": object()})],
    ids=lambda m: repr(m)[:12],
)
def test_what_cannot_travel_is_refused(message: wire.Message, pair: tuple[Channel, socket.socket]) -> None:
    with pytest.raises(WireError, match="holds what cannot be sent"):
        pair[0].encode(message)


def body(**fields: object) -> bytes:
    raw = wire.msgspec.msgpack.encode(fields)
    return len(raw).to_bytes(4, "big") + raw


@pytest.mark.parametrize(
    ("data", "owner"),
    [
        (body(type="Dance"), None),
        (body(type="Pong", number=1), None),
        (body(type="Ping", number="one"), None),
        (b"\0\0\0\1\xc1", None),
        (b"\0\0\0\0", None),
        (b"\0\1\0\0" + b"\x91" * 65536, None),
        (body(type="Abort", request_id="r", index="x"), "r"),
        (body(type="Add", submission={"request_id": "r", "params": {"temperature": 9}}), "r"),
        (body(type="Add", submission={"request_id": 3}), None),
    ],
)
def test_garbage_is_an_error_and_the_next_message_is_read(
    data: bytes, owner: str | None, pair: tuple[Channel, socket.socket]
) -> None:
    channel, theirs = pair
    theirs.sendall(channel.encode(wire.Ping(1)) + data + channel.encode(wire.Ping(2)))
    assert channel.receive(None) == wire.Ping(1)
    with pytest.raises(WireError, match="cannot be read") as caught:
        channel.receive(None)
    assert caught.value.request_id == owner
    assert channel.receive(0) == wire.Ping(2)
