"""Types of fields, and what bodies of every protocol may say. Knows no protocol."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr

from quire.server.errors import bad_request, not_supported
from quire.server.limits import MAX_MESSAGES
from quire.server.resume import Resume

MOST = (1 << 31) - 1

# Lists stop at their first mistake, so that a million wrong items do not make a million messages.
Int = Annotated[int, Field(ge=-MOST - 1, le=MOST)]
Cap = Annotated[int, AfterValidator(lambda value: max(-1, min(value, MOST)))]  # no cap is too high
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
Tokens = Annotated[list[StrictInt], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_MESSAGES)]


def unless_null(default: bool | int) -> BeforeValidator:
    """Clients write null where they have nothing to say."""
    return BeforeValidator(
        lambda value: default if value is None else value, json_schema_input_type=type(default) | None
    )


def between(low: float, high: float | None = None) -> dict[str, Any]:
    """A range for the OpenAPI document; `SamplingParams` keeps it."""
    return {"minimum": low} if high is None else {"minimum": low, "maximum": high}


def example(**body: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [body]})


Off = Annotated[bool, unless_null(False)]
On = Annotated[bool, unless_null(True)]
NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
LATER = "this server cannot do it yet"


class Ask(BaseModel):
    """What every body may say.

    Attributes:
        refused: fields that change the answer and cannot be obeyed -> why. A value that asks for nothing is accepted.
        clients_fault: those of them that no server could obey.
        neutral: values of them, beside None, [] and the like, that ask for nothing.
        without_effect: fields of the protocol that change no answer here.
        silent: those of them that are not worth a warning.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    refused: ClassVar[Mapping[str, str]] = {}
    clients_fault: ClassVar[Collection[str]] = ()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    without_effect: ClassVar[Collection[str]] = ()
    silent: ClassVar[Collection[str]] = ()

    model: str | None = Field(None, description="A name from /v1/models; without it the first.")

    def unknown(self) -> list[str]:
        """Refuse what cannot be done; returns a warning for each other field that is not known.

        Raises:
            ApiError: names the field.
        """
        warnings = []
        for name, value in (self.model_extra or {}).items():
            if name in self.silent:
                continue
            nothing = value in NOTHING or value in self.neutral.get(name, ())
            if name in self.without_effect:
                if not nothing:
                    warnings.append(f"{name!r} has no effect on this server")
            elif name not in self.refused:
                warnings.append(f"{name[:100]!r} is not a known field; it had no effect")
            elif not nothing:
                raise (
                    bad_request(f"{name}: {self.refused[name]}", name)
                    if name in self.clients_fault
                    else not_supported(name, self.refused[name])
                )
        return warnings


class CallAsk(Ask):
    """What every request for generated text may say."""

    model_config = ConfigDict(frozen=True)

    temperature: float | None = Field(
        None, description="0: the likeliest token always.", json_schema_extra=between(0, 2)
    )
    top_p: float | None = Field(
        None, description="Only the likeliest tokens of that much together.", json_schema_extra=between(0, 1)
    )
    top_k: Int | None = Field(
        None, description="Only so many tokens; 0 or -1: all.", json_schema_extra=between(-1)
    )
    stream: Off = Field(False, description="Server-sent events.")
    priority: Annotated[Int, unless_null(0)] = Field(0, description="Lower first.")
    cache_salt: str | None = Field(
        None, description="Prompts are found in the cache only under the same salt; up to 128 characters."
    )
    request_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._:-]{1,128}$",
        description="Part of the answer's id, unless the header X-Request-Id is there.",
    )
    return_timing: Off = Field(False, description="How long the parts of the call took, as `timing`.")
    resume: Resume | None = Field(
        None, description="Of a stream that broke off: where it goes on. For routers (docs/router.md)."
    )

    def check(self) -> list[str]:
        """Refuse what cannot be done; returns a warning for each field that is not known.

        Raises:
            ApiError: names the field.
        """
        if self.resume is not None and not self.stream:
            raise bad_request("only streams go on; set stream to true, or leave resume out", "resume")
        return self.unknown()
