"""What the OpenAPI document says is what the server does, for whatever requests can be made from it."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks as specs

from quire.server.schema import ANSWERS
from tests.server.served import Served
from tests.server.wild import BODIES, JSON

CHECKS = (
    specs.status_code_conformance,
    specs.content_type_conformance,
    specs.response_headers_conformance,
    specs.response_schema_conformance,
    specs.unsupported_method,
)
NOT_FAULTS = (501, 503, 504)  # cannot yet, cannot now, took too long


def explore(operation: Any) -> set[int]:
    """Ask it whatever the document allows; returns the statuses."""
    statuses = set()

    @given(operation.as_strategy())
    @settings(
        derandomize=True,
        deadline=None,
        max_examples=100,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        answer = case.call(timeout=60)
        statuses.add(answer.status_code)
        assert answer.status_code < 500 or answer.status_code in NOT_FAULTS, (case.body, answer.text)
        case.validate_response(answer, checks=CHECKS)

    ask()
    return statuses


@pytest.mark.parametrize("path", sorted(path for path, shapes in ANSWERS.items() if len(shapes) > 1))
def test_streams_are_of_events_as_documented(served: Served, path: str) -> None:
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    case = document[path]["POST"].Case(body={**BODIES[path][1], "stream": True}, media_type=JSON)
    answer = case.call(timeout=60)
    assert answer.status_code == 200 and "text/event-stream" in answer.headers["content-type"][0]
    case.validate_response(answer, checks=CHECKS)
    answer.content = answer.content.replace(b'"id":', b'"ID":')
    answer.clear_cache()
    with pytest.raises(FailureGroup):
        case.validate_response(answer, checks=CHECKS)


@pytest.mark.slow
def test_every_operation(served: Served) -> None:
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    statuses = {operation.label: explore(operation) for operation in operations}
    assert len(statuses) >= 15
    assert {label: found for label, found in statuses.items() if 200 not in found} == {
        "GET /v1/models/{name}": {404},
        "GET /v1/responses/{response_id}": {404},  # none is kept
        "DELETE /v1/responses/{response_id}": {404},
        "POST /v1/responses/{response_id}/cancel": {404},
        "GET /v1/responses/{response_id}/input_items": {404},
    }
