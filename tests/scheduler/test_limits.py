"""What is refused, and how it is said."""

from dataclasses import replace

import pytest

from quire.errors import ConfigError, InvalidRequest, PromptTooLong
from quire.scheduler.blocks import BlockPool
from quire.scheduler.limits import Limits
from quire.scheduler.scheduler import NewSequence, Scheduler
from quire.types import Coordinates
from tests.scheduler.device import SECRET


def scheduler(num_blocks: int = 4, max_length: int | None = None) -> Scheduler:
    pool = BlockPool(num_blocks, 4, secret=SECRET)
    return Scheduler(pool, Limits(max_batched_tokens=8, max_seqs=2, max_length=max_length))


def sequence(num_prompt: int, max_tokens: int) -> NewSequence:
    return NewSequence(id=0, prompt=(1,) * num_prompt, max_tokens=max_tokens)


def test_the_whole_cache_may_be_used_and_no_more() -> None:
    scheduler().add(sequence(14, 3), 0.0)  # 16 positions: the last token is never computed
    with pytest.raises(InvalidRequest, match=r"14 prompt tokens and 4 output .* holds 17; .* at most 3") as e:
        scheduler().add(sequence(14, 4), 0.0)
    assert e.value.param == "max_tokens"


def test_a_prompt_that_leaves_no_room_is_too_long() -> None:
    with pytest.raises(PromptTooLong, match="17 prompt tokens .* holds 17; shorten the prompt") as e:
        scheduler().add(sequence(17, 1), 0.0)
    assert (e.value.num_tokens, e.value.limit) == (17, 17)


def test_max_length_covers_prompt_and_output() -> None:
    scheduler(max_length=10).add(sequence(6, 4), 0.0)
    with pytest.raises(InvalidRequest, match=r"at most 10 tokens \(max_model_len\); .* at most 4"):
        scheduler(max_length=10).add(sequence(6, 5), 0.0)
    with pytest.raises(PromptTooLong, match="shorten the prompt"):
        scheduler(max_length=10).add(sequence(10, 1), 0.0)


def test_empty_requests_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no tokens") as e:
        scheduler().add(sequence(0, 3), 0.0)
    assert e.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="max_tokens is 0") as e:
        scheduler().add(sequence(3, 0), 0.0)
    assert e.value.param == "max_tokens"


@pytest.mark.parametrize("share", [0.0, -1.0, float("inf"), float("nan")])
def test_a_share_is_a_positive_number(share: float) -> None:
    with pytest.raises(InvalidRequest, match="above 0"):
        scheduler().add(NewSequence(id=0, prompt=(1,), max_tokens=1, share=share), 0.0)


def test_a_sequence_with_nothing_left_to_compute_is_refused() -> None:
    scheduler().add(NewSequence(id=0, prompt=(1,), max_tokens=3, output=(5, 5)), 0.0)
    with pytest.raises(InvalidRequest, match="has 3 output tokens already, and max_tokens is 3"):
        scheduler().add(NewSequence(id=0, prompt=(1,), max_tokens=3, output=(5, 5, 5)), 0.0)


def test_a_refused_sequence_leaves_nothing_behind() -> None:
    s = scheduler()
    with pytest.raises(InvalidRequest):
        s.add(sequence(17, 1), 0.0)
    assert s.idle and s.num_waiting == 0 and s.schedule(0.0).work == ()


def test_ids_are_unique() -> None:
    s = scheduler()
    s.add(sequence(3, 3), 0.0)
    with pytest.raises(InvalidRequest, match="id 0 is in use"):
        s.add(sequence(3, 3), 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batched_tokens": 3, "max_seqs": 4}, "max_batched_tokens 3 is below max_seqs 4"),
        ({"max_batched_tokens": 3, "max_seqs": 0}, "max_seqs is 0"),
        ({"max_batched_tokens": 3, "max_seqs": 1, "drafts": -1}, "drafts is -1"),
        ({"max_batched_tokens": 3, "max_seqs": 1, "min_prefill_tokens": 0}, "min_prefill_tokens is 0"),
        ({"max_batched_tokens": 3, "max_seqs": 1, "stages": 0}, "stages is 0"),
        ({"max_batched_tokens": 3, "max_seqs": 1, "max_gap_s": 0.0}, "max_gap_s is 0.0"),
        ({"max_batched_tokens": 3, "max_seqs": 1, "min_prefill_time": -0.1}, "min_prefill_time is -0.1"),
    ],
)
def test_impossible_limits_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limits(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("last", [[3, 3, 3], [3, 3, -1], [3, 3, 5], [3, 3]])
def test_positions_are_those_of_the_tokens_and_leave_room(last: list[int]) -> None:
    """The prompt's last token is at 3 in three rows, and six more may follow it."""
    rows = [[0, 1, 2, *last[i : i + 1]] for i in range(3)]
    new = replace(sequence(4, 6), coordinates=Coordinates(tuple(map(tuple, rows)), max(last) - 3))
    if last == [3, 3, 3]:
        scheduler(max_length=10).add(new, 0.0)
    else:
        with pytest.raises(InvalidRequest, match="positions must be 0 or more, 4 in a row") as e:
            scheduler(max_length=10).add(new, 0.0)
        assert e.value.param == "positions"
