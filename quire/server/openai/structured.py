"""What a request says about the form of its text, by the names of OpenAI, vLLM, and older ones of vLLM's."""

from collections.abc import Mapping
from typing import Any

from quire.server.errors import bad_request
from quire.server.openai.protocol import GenerationRequest
from quire.types import StructuredOutputsParams

OLDER = ("json", "regex", "choice", "grammar", "json_object")  # after guided_
FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def structured(ask: GenerationRequest) -> StructuredOutputsParams | None:
    """None if any text will do.

    Raises:
        ApiError: a field is not what it should be, or several say what the text should be.
        InvalidRequest: what is asked for is nothing, or several things.
    """
    found: dict[str, dict[str, Any]] = {}
    if ask.response_format is not None and (fields := form_of(ask.response_format, "response_format")):
        found["response_format"] = fields
    if ask.structured_outputs is not None:
        found["structured_outputs"] = dict(ask.structured_outputs)
    older = {name: value for name in OLDER if (value := getattr(ask, f"guided_{name}")) is not None}
    if older:
        found["guided_" + next(iter(older))] = older
    if not found:
        return None
    if len(found) > 1:
        raise bad_request(f"{' and '.join(found)} are both set; leave one out", next(iter(found)))
    name, fields = next(iter(found.items()))
    if ask.guided_whitespace_pattern is not None:
        fields["whitespace_pattern"] = ask.guided_whitespace_pattern
    known = StructuredOutputsParams.__dataclass_fields__.keys()
    if unknown := sorted(str(key) for key in fields.keys() - known):
        raise bad_request(f"{name} has unknown fields {unknown}; known are {sorted(known)}", name)
    return StructuredOutputsParams(**fields)


def form_of(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """OpenAI's response_format, or text.format of a response, as fields of `StructuredOutputsParams`.

    Raises:
        ApiError: it is not what it should be; `name` names it.
    """
    kind = given.get("type")
    match kind:
        case "text":
            return {}
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            named = given.get("json_schema", given)  # in text.format the schema is in no object of its own
            if not isinstance(named, Mapping) or not isinstance(named.get("schema"), Mapping):
                raise bad_request(f"{name}: json_schema must have a schema, which is an object", name)
            return {"json": named["schema"]}
        case "structural_tag":
            return {"structural_tag": given}
    raise bad_request(f"{name}.type is {str(kind)[:100]!r}; it must be one of {', '.join(FORMATS)}", name)
