"""Where states of recurrent layers are kept, and who finds them."""

from quire.scheduler.checkpoints import Checkpoints
from tests.scheduler.workload import Case, Machine, Run, run

FOREVER = frozenset[int]()
PROMPT = tuple(range(1, 42))  # ten blocks of four and a token
OTHER = tuple(range(50, 91))


def stateful(num_states: int = 40, **options: object) -> Machine:
    return Machine(num_states=num_states, **options)


def cached(done: Run) -> list[int]:
    return [stats.num_cached_tokens for stats in done.stats.values()]


def test_the_same_prompt_finds_all_but_its_last_token() -> None:
    todo = [Case(PROMPT, 2, 0, stops=FOREVER), Case(PROMPT, 2, 20, stops=FOREVER)]
    assert cached(run(todo, stateful())) == [0, 40]


def test_a_whole_number_of_blocks_leaves_one_to_compute() -> None:
    todo = [Case(PROMPT[:40], 1, 0, stops=FOREVER), Case(PROMPT[:40], 1, 20, stops=FOREVER)]
    assert cached(run(todo, stateful())) == [0, 36]


def test_who_is_waited_for_keeps_a_state_where_ways_part() -> None:
    todo = [Case(PROMPT, 2, 0, stops=FOREVER), Case((*PROMPT[:22], 0, 0, 0), 2, 0, stops=FOREVER)]
    assert cached(run(todo, stateful())) == [0, 20]


def test_nobody_waits_for_a_state_that_will_not_be_kept() -> None:
    """The first has all of its prompt planned when the second comes, and two plans are in flight."""
    todo = [Case(PROMPT, 2, 0, stops=FOREVER), Case((*PROMPT[:22], 0, 0, 0), 2, 1, stops=FOREVER)]
    done = Run(todo, stateful(depth=4))
    parked = [done.scheduler.num_parked for _ in done.steps()]
    assert not any(parked) and cached(done) == [0, 0]


def test_states_in_passing_leave_room_for_others() -> None:
    machine = stateful(3, max_seqs=1, spare_tokens=3)  # a block at a time
    todo = [
        Case(PROMPT, 1, 0, stops=FOREVER),
        Case(OTHER, 1, 30, stops=FOREVER),
        Case(PROMPT, 1, 60, stops=FOREVER),
    ]
    assert cached(run(todo, machine)) == [0, 0, 40]


def test_states_of_a_sequence_that_failed_are_not_found() -> None:
    done = run([Case(PROMPT, 9, 0, stops=FOREVER, fail_at=3)], stateful())
    assert done.scheduler.checkpoints is not None and not done.scheduler.checkpoints.by_key


def test_a_row_that_is_held_is_not_the_next_to_be_taken() -> None:
    kept = Checkpoints(range(2))
    row = kept.take()
    assert row == 0
    kept.publish(b"a", row)
    assert kept.hold(b"a") == 0
    kept.demote(b"a")
    assert [kept.take(), kept.take()] == [1, None]
