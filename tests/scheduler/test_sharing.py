"""One computes what several need; the others wait for it, and never for ever."""

from dataclasses import replace

import pytest

from tests.scheduler.device import EOS
from tests.scheduler.workload import Case, Machine, Run, run

FOREVER = frozenset[int]()
PROMPT = tuple(range(1, 42))  # ten blocks of four and a token


def rows(done: Run) -> int:
    """Positions computed in all."""
    return sum(w.count for plan in done.device.plans for w in plan.work)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_siblings_share_their_prompt(caching: bool, depth: int) -> None:
    done = Run([Case(PROMPT, 6, 0, n=4, stops=FOREVER)], Machine(caching=caching, depth=depth))
    most = max(done.pool.num_used for _ in done.steps())
    assert 10 + 4 <= most <= 10 + 4 * 2, "ten blocks of prompt once, and up to two blocks for each"
    assert rows(done) == len(PROMPT) + 3 * 1 + 4 * 5
    assert [done.stats[i].num_cached_tokens for i in range(4)] == [0, 40, 40, 40]
    assert done.scheduler.lookups.queries == 4 * 41 and done.scheduler.lookups.hits == 3 * 40


def test_requests_share_what_they_have_in_common() -> None:
    todo = [Case(PROMPT, 2, 0, stops=FOREVER), Case((*PROMPT[:22], 0, 0, 0), 2, 0, stops=FOREVER)]
    done = run(todo, Machine())
    assert done.stats[1].num_cached_tokens == 20


def test_without_caching_requests_do_not_share() -> None:
    todo = [Case(PROMPT, 2, 0), Case(PROMPT, 2, 0), Case(PROMPT, 2, 9)]
    done = run(todo, Machine(caching=False))
    assert [s.num_cached_tokens for s in done.stats.values()] == [0, 0, 0]


def test_without_caching_siblings_find_nothing_when_the_last_has_ended() -> None:
    done = run([Case(PROMPT, 2, 0, n=2, stops=FOREVER)], Machine(caching=False))
    assert not done.pool.by_key


def test_a_later_request_finds_prompt_and_output() -> None:
    model = Run([], Machine()).model
    first = Run([Case(PROMPT, 12, 0, stops=FOREVER)], Machine())
    outputs = model.answer(first.sequences[0], 0)[0]
    todo = [Case(PROMPT, 12, 0, stops=FOREVER), Case((*PROMPT, *outputs, 3), 1, 20)]
    done = run(todo, Machine())
    assert done.stats[1].num_cached_tokens == 52, "41 + 12 tokens, of which the last is not computed"


def test_an_interrupted_sequence_finds_prompt_and_output() -> None:
    case = Case(PROMPT, 20, 0, stops=FOREVER, had=16, abort_after=1)
    done = Run([case, case], Machine())
    done.sequences[1] = replace(done.sequences[0], id=1)  # the same again, when the first has gone
    done.seeds[1], done.arrivals[5], done.arrivals[0] = 0, [1], [0]
    for _ in done.steps():
        pass
    assert done.stats[1].num_cached_tokens == 41, "all of the prompt, and nothing is said of the outputs"
    assert rows(done) == 41 + 16 + 4, "of 57 tokens only the last is computed again, and then three more"


def test_a_sequence_may_refuse_to_read_the_cache() -> None:
    done = run([Case(PROMPT, 2, 0), Case(PROMPT, 2, 5, read_cache=False), Case(PROMPT, 2, 5)], Machine())
    assert [s.num_cached_tokens for s in done.stats.values()] == [0, 0, 40]


def test_others_pass_the_one_that_waits() -> None:
    todo = [Case(PROMPT, 2, 0), Case(PROMPT, 2, 0), Case((9, 9), 2, 0)]
    done = Run(todo, Machine(spare_tokens=10))  # three steps of prefill
    for _ in done.steps():
        pass
    first = {w.seq: plan.step for plan in reversed(done.device.plans) for w in plan.work}
    assert first[2] < first[1]


@pytest.mark.parametrize("how", ["abort", "error"])
def test_the_next_takes_over_when_the_one_that_computes_is_gone(how: str) -> None:
    gone = Case(PROMPT, 8, 0, abort_after=2) if how == "abort" else Case(PROMPT, 8, 0, fail_at=1)
    done = run([gone, Case(PROMPT, 8, 0), Case(PROMPT, 8, 0)], Machine(spare_tokens=10, depth=2))
    assert done.stats[1].num_cached_tokens < 40, "not all of it was findable"
    assert done.stats[2].num_cached_tokens == 40, "it waited for the second"


def test_a_failed_sequence_leaves_nothing_to_find() -> None:
    done = run([Case(PROMPT, 8, 0, fail_at=3), Case(PROMPT, 2, 9)], Machine())
    assert done.stats[1].num_cached_tokens == 0


def test_the_next_takes_over_when_the_one_that_computes_is_preempted() -> None:
    slow = Case(PROMPT, 2, 0, priority=1)
    todo = [slow, slow, Case((7, 7), 8, 1, stops=FOREVER)]
    done = run(todo, Machine(spare_tokens=4, max_seqs=1))
    assert done.stats[0].num_preemptions == 1


def test_nobody_waits_for_lower_priority() -> None:
    low, urgent = Case(PROMPT, 2, 0, priority=1), Case(PROMPT, 2, 1)
    done = run([low, urgent], Machine(spare_tokens=4))
    first = {w.seq: plan.step for plan in reversed(done.device.plans) for w in plan.work}
    assert first[1] == 2


def test_the_last_token_is_always_computed() -> None:
    done = run([Case(PROMPT[:40], 1, 0), Case(PROMPT[:40], 1, 5)], Machine())
    assert done.stats[1].num_cached_tokens == 36


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    machine = Machine(max_seqs=1, num_blocks=40)
    todo = [Case(PROMPT, 12, 0, priority=1, stops=FOREVER), Case((5, 5), 2, 6, stops=FOREVER)]
    done = run(todo, machine)
    assert done.stats[0].num_preemptions == 1 and done.stats[0].num_cached_tokens == 0
    assert rows(done) < len(PROMPT) + 12 + 4 + 8


def test_end_tokens_count_from_min_tokens_on() -> None:
    for prompt in range(40):
        done = run([Case((prompt,), 12, 0, stops=frozenset({EOS}), min_tokens=4)], Machine())
        tokens = [e.token for e in done.got[0]]
        assert len(tokens) >= 4 and EOS not in tokens[3:-1]


def test_a_promise_ends_only_with_the_one_who_made_it() -> None:
    """The second computes the same without having promised it; its end must not wake who waits for the first."""
    todo = [Case(PROMPT, 2, 0), Case(PROMPT, 2, 0, read_cache=False, abort_after=1), Case(PROMPT, 2, 0)]
    done = run(todo, Machine(depth=3))
    assert done.stats[2].num_cached_tokens == 40
