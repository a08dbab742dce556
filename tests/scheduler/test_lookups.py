"""Why a prompt's tokens were not found. (The oracle of misses.py looks at every run.)"""

from dataclasses import replace

from quire.types import CacheMisses
from tests.scheduler.workload import Case, Machine, Run, run

FOREVER = frozenset[int]()
PROMPT = tuple(range(1, 42))  # ten blocks of four and a token
CHANGED = (*PROMPT[:22], 0, *PROMPT[23:])  # five blocks are the same


def misses(done: Run) -> list[dict[str, int]]:
    return [done.misses_of(id).by_reason() for id in done.stats]


def test_what_is_told_adds_up_and_leaves_out_what_did_not_happen() -> None:
    assert CacheMisses().by_reason() == {}
    both = CacheMisses(new=3, tail=1) + CacheMisses(evicted=2, tail=4)
    assert both == CacheMisses(new=3, evicted=2, tail=5)
    assert both.by_reason() == {"new": 3, "evicted": 2, "tail": 5}


def test_a_changed_prompt_is_new_from_the_block_that_differs() -> None:
    done = run([Case(PROMPT, 1, 0), Case(CHANGED, 1, 9), Case(PROMPT, 1, 18)], Machine())
    assert misses(done) == [{"new": 40, "tail": 1}, {"new": 20, "tail": 1}, {"tail": 1}]


def test_the_last_block_of_whole_ones_is_a_tail() -> None:
    done = run([Case(PROMPT[:40], 1, 0), Case(PROMPT[:40], 1, 9)], Machine())
    assert misses(done) == [{"new": 36, "tail": 4}, {"tail": 4}]


def test_what_had_to_make_room_was_evicted() -> None:
    others = [Case(tuple(range(50 * i, 50 * i + 41)), 1, 9 * i) for i in (1, 2)]
    done = run(
        [Case(PROMPT, 1, 0), *others, Case(PROMPT, 1, 40), Case(CHANGED, 1, 60)], Machine(num_blocks=16)
    )
    assert misses(done)[3] == {"evicted": 40, "tail": 1}
    assert misses(done)[4] == {"new": 20, "tail": 1}


def test_what_cannot_be_waited_for_is_unfinished() -> None:
    low, urgent = Case(PROMPT, 2, 0, priority=1), Case(PROMPT, 2, 2)
    done = run([low, urgent], Machine(spare_tokens=8))
    assert done.stats[1].num_cached_tokens == 24, "two steps of twelve tokens"
    assert misses(done) == [{"new": 40, "tail": 1}, {"unfinished": 16, "tail": 1}]


def test_blocks_without_a_state_are_stateless() -> None:
    """The first was over before anybody wanted its state after five blocks; the third finds the second's."""
    todo = [Case(PROMPT, 1, 0), Case(CHANGED, 1, 20), Case((*CHANGED[:26], 0), 1, 40)]
    done = run([replace(case, stops=FOREVER) for case in todo], Machine(num_states=40, spare_tokens=100))
    assert misses(done)[1] == {"new": 20, "stateless": 20, "tail": 1}
    assert done.stats[2].num_cached_tokens == 20 and misses(done)[2] == {"stateless": 4, "tail": 3}


def test_a_cache_that_is_off_or_not_to_be_read_is_unread() -> None:
    done = run([Case(PROMPT, 6, 0, n=2, stops=FOREVER)], Machine(caching=False))
    assert misses(done) == [{"unread": 41}, {"unread": 1}], "siblings share all the same"
    done = run([Case(PROMPT, 1, 0), Case(PROMPT, 1, 9, read_cache=False)], Machine())
    assert misses(done)[1] == {"unread": 41}
