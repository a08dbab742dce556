"""What a step and a sequence may be, and whether a sequence fits. Knows no state."""

from dataclasses import dataclass
from math import inf

from quire.errors import ConfigError, InvalidRequest, PromptTooLong
from quire.scheduler.sequence import NewSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A scheduler's settings.

    Raises:
        ConfigError: a limit that would keep some sequence waiting for ever.
    """

    max_batched_tokens: int  # positions in a step
    max_seqs: int  # sequences with a slot
    drafts: int = 0  # positions that verify drafts, for each sequence and step
    max_length: int | None = None  # prompt and output of a sequence
    max_gap_s: float | None = None  # between a sequence's tokens, as far as smaller prefills can help
    min_prefill_tokens: int = 16  # positions of prefill in a step, whatever the gap
    min_prefill_time: float = (
        0.0  # of prefill in a step, over that of its decoding sequences alone, whatever the gap
    )

    stages: int = 1  # steps that the device computes at the same time, each a part of its layers

    def __post_init__(self) -> None:
        numbers = (
            ("stages", self.stages, 1),
            ("max_seqs", self.max_seqs, 1),
            ("drafts", self.drafts, 0),
            ("min_prefill_tokens", self.min_prefill_tokens, 1),
        )
        for name, value, low in numbers:
            if value < low:
                raise ConfigError(f"{name} is {value}; it must be at least {low}")
        if not 0 <= self.min_prefill_time < inf:
            raise ConfigError(
                f"min_prefill_time is {self.min_prefill_time}; it must be 0 or more, and finite"
            )
        if self.max_batched_tokens < self.max_seqs:
            raise ConfigError(
                f"max_batched_tokens {self.max_batched_tokens} is below max_seqs {self.max_seqs}, so some "
                "sequences would have to skip steps; raise the first or lower the second"
            )
        if self.max_gap_s is not None and not self.max_gap_s > 0:
            raise ConfigError(f"max_gap_s is {self.max_gap_s}; it must be above 0, or None for no limit")

    @property
    def prefill_room(self) -> int:
        """Positions of a prompt that a step has room for, whoever else is in it."""
        spare = self.max_batched_tokens - self.max_seqs
        return spare + 1 - (spare // 2 if self.drafts else 0)

    def check(self, new: NewSequence, room: int | None) -> None:
        """Refuse a sequence that can never run; the cache has `room` for so many positions of one.

        Raises:
            InvalidRequest: it has no prompt or nothing left to compute, more tokens than are allowed or cached, or
                more that see each other than a step computes.
        """
        num_prompt, total = len(new.prompt), len(new.prompt) + new.max_tokens
        if not num_prompt:
            raise InvalidRequest("the prompt has no tokens; it must have at least 1", param="prompt")
        if new.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {new.max_tokens}; it must be at least 1", param="max_tokens")
        if not 0 < new.share < inf:
            raise InvalidRequest(f"share is {new.share}; it must be above 0, and finite", param="share")
        if (at := new.coordinates) is not None and (
            {*map(len, at.rows)} != {num_prompt}
            or min(map(min, at.rows)) < 0
            or total + at.offset > (self.max_length or inf)
        ):
            raise InvalidRequest(
                f"positions must be 0 or more, {num_prompt} in a row, and leave room for {new.max_tokens} output tokens"
                f" below {self.max_length} (max_model_len)",
                param="positions",
            )
        if len(new.output) >= new.max_tokens:
            raise InvalidRequest(
                f"it has {len(new.output)} output tokens already, and max_tokens is {new.max_tokens}; there is nothing"
                " left to compute",
                param="max_tokens",
            )
        longest = max((end - start for start, end in new.spans), default=0)
        if longest > self.prefill_room:
            raise InvalidRequest(
                f"{longest} tokens of the prompt see each other, so one step must compute them, and has room for"
                f" {self.prefill_room}: max_num_batched_tokens ({self.max_batched_tokens}) less one for each other of"
                f" max_num_seqs ({self.max_seqs}); send fewer of them, raise the first or lower the second",
                param="prompt",
            )
        for limit, what in (
            (self.max_length, "a sequence may have at most {0} tokens (max_model_len)"),
            (room and room + 1, "the KV cache holds {0}"),  # the last token is never computed
        ):
            if limit is not None and total > limit:
                rule = (
                    f"{num_prompt} prompt tokens and {new.max_tokens} output tokens, but {what.format(limit)}"
                )
                if num_prompt >= limit:
                    raise PromptTooLong(
                        f"the prompt is too long: {num_prompt} tokens > {limit - 1}; {rule}; shorten the prompt",
                        num_tokens=num_prompt,
                        limit=limit,
                    )
                raise InvalidRequest(
                    f"{rule}; shorten the prompt or ask for at most {limit - num_prompt}", param="max_tokens"
                )
