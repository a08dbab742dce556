"""Chunks written from parts equal chunks written whole."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.server.sse import Chunks

ENVELOPE = {"id": 'a"\\', "object": "chunk", "created": 1, "model": "m\u0000"}


def shape(text: str) -> dict[str, Any]:
    return {"delta": {"content": text}, "logprobs": None}


def value(chunk: bytes) -> Any:
    assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and chunk.count(b"\n") == 2
    return json.loads(chunk[6:])


@given(st.lists(st.tuples(st.integers(0, 3), st.text()), max_size=8), st.booleans())
@settings(derandomize=True, deadline=None)
def test_parts_make_the_whole(news: list[tuple[int, str]], usage: bool) -> None:
    chunks = Chunks(ENVELOPE, usage=usage)
    for index, text in news:
        want = {
            **ENVELOPE,
            "choices": [{"index": index, **shape(text)}],
            **({"usage": None} if usage else {}),
        }
        assert value(chunks.text(index, text, shape)) == want
        assert value(chunks.choice({"index": index, **shape(text)})) == want


def test_usage_comes_with_a_choice_or_without() -> None:
    chunks, counts = Chunks(ENVELOPE, usage=True), {"prompt_tokens": 3}
    assert value(chunks.usage(counts)) == {**ENVELOPE, "choices": [], "usage": counts}
    assert value(chunks.choice({"index": 0}, counts)) == {
        **ENVELOPE,
        "choices": [{"index": 0}],
        "usage": counts,
    }
