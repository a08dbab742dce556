"""Whatever a body holds, the answer is 200 or a refusal that names its reason, and the engine goes on."""

import json
import math
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.server.openai.protocol import (
    REFUSED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tests.server.conftest import FRANCE, PARIS, InProcess, Live

BODIES = {
    "/v1/completions": (CompletionRequest, {"prompt": "hello", "max_tokens": 2}),
    "/v1/chat/completions": (ChatRequest, {"messages": FRANCE, "max_completion_tokens": 2}),
    "/tokenize": (TokenizeRequest, {"prompt": "hello"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1, 2]}),
}
EDGES: list[Any] = [0, -1, 1, 2, 16, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e-9, 1e308, math.nan, math.inf]
EDGES += [
    True,
    None,
    "",
    "x",
    "\x00",
    "\ud83d",
    "é" * 300,
    [],
    {},
    [[]],
    [[1], ["a"]],
    [4095, 4096],
    [-1],
    [True],
]
EDGES += [
    {"1": 0.5},
    {"-1": 1},
    {"99999": 1},
    {"1": 1e308},
    {"role": "user"},
    {"type": "text"},
    [None],
    ["a", 1],
]
EDGES += [
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": 1}],
    [{"role": "tool", "tool_calls": [1]}],
]
EDGES += [
    {"include_usage": True},
    {"enable_thinking": "\x00"},
    {"continuous_usage_stats": True, "include_usage": 1},
]
values = st.sampled_from(EDGES) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def asked(draw: st.DrawFn) -> tuple[str, bytes]:
    path = draw(st.sampled_from(sorted(BODIES)))
    model, body = BODIES[path]
    names = st.sampled_from([*model.model_fields, *REFUSED, "unknown"])
    changed = draw(st.dictionaries(names, values, max_size=4))
    text = json.dumps({**body, **changed})
    cut = draw(st.none() | st.integers(0, len(text))) if draw(st.integers(0, 9)) == 0 else None
    return path, text[:cut].encode()


@given(asked())
@settings(
    derandomize=True,
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_body(live: Live, asked: tuple[str, bytes]) -> None:
    path, body = asked
    answer = live.post(path, content=body, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        assert answer.status_code in (400, 404, 501), (body, answer.text)
        error = answer.json()["error"]
        assert error["message"] and error["type"] and "0x" not in error["message"], (body, answer.text)


def test_the_engine_is_well_afterwards(live: Live, service: InProcess) -> None:
    answer = live.client().chat.completions.create(model="demo", messages=FRANCE, temperature=0)
    assert answer.choices[0].message.content == PARIS
    assert service.num_used_blocks() == 0
