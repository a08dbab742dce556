"""Where a request goes: accounts that come back to nothing, the least cost, and nobody who takes no requests."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from benchmarks.routing import Simulation, policies, workload
from quire.engine.router import (
    FAILURES,
    RETRY_RESERVE,
    RUNNING_TOKENS,
    TIE,
    TIE_TOKENS,
    TOKEN_S,
    Circuit,
    Index,
    Router,
    State,
    Ticket,
    chain_of,
)
from quire.errors import Overloaded

NAMES = ("a", "b", "c")
PIECE = 16
MANY_S = 1e9


def make(
    names: tuple[str, ...] = NAMES, *, capacity: int = 64, most_s: float = MANY_S, seed: int = 0
) -> Router:
    return Router(names, piece_tokens=PIECE, capacity=capacity, most_s=most_s, seed=seed)


class Routing(RuleBasedStateMachine):
    """Anything that may happen, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.now = make(capacity=8), 0.0
        self.open: list[Ticket] = []

    @rule(
        chain=st.lists(st.integers(0, 9), max_size=12),
        extra=st.integers(0, 40),
        out=st.sets(st.integers(0, 2)),
    )
    def route(self, chain: list[int], extra: int, out: set[int]) -> None:
        router, tokens = self.router, len(chain) * PIECE + extra
        able = {
            i
            for i, r in enumerate(router.replicas)
            if r.state is State.UP and r.circuit.allows(self.now) and i not in out
        }
        hits, speeds = router.index.hits(chain), [r.token_s for r in router.replicas if r.token_s]
        guess = sum(speeds) / len(speeds) if speeds else TOKEN_S
        costs = {
            i: (
                r.queued_tokens
                + r.others_tokens
                + max(tokens - hits[i] * PIECE, min(tokens, 1))
                + (r.num_running + r.others_running) * RUNNING_TOKENS
            )
            * (r.token_s or guess)
            for i, r in enumerate(router.replicas)
        }
        try:
            ticket = router.route(chain, tokens, self.now, without=out)
        except Overloaded as error:
            assert not able and error.reason == "no_replica" and error.retry_after_s >= 1
            return
        self.open.append(ticket)
        assert ticket.replica in able
        assert costs[ticket.replica] <= min(costs[i] for i in able) * TIE + TIE_TOKENS * TOKEN_S + 1e-9
        assert ticket.num_tokens + ticket.num_cached == tokens

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 99), how=st.sampled_from(["began", "ended", "failed", "succeeded"]))
    def happen(self, which: int, how: str) -> None:
        ticket = self.open[which % len(self.open)]
        match how:
            case "began":
                self.router.began(ticket, self.now)
            case "succeeded":
                self.router.succeeded(ticket)
            case "failed":
                self.router.failed(ticket, self.now)
                self.router.ended(ticket)
            case "ended":
                self.router.ended(ticket)
                self.router.ended(ticket)  # a second time does nothing
                self.router.began(ticket, self.now)  # nor does this, then
        self.open = [each for each in self.open if not each.ended]

    @rule(
        replica=st.integers(0, 2),
        tokens=st.integers(0, 500),
        running=st.integers(0, 9),
        pieces=st.integers(0, 9),
    )
    def report(self, replica: int, tokens: int, running: int, pieces: int) -> None:
        self.router.reported(replica, tokens, running, pieces)
        found = self.router.replicas[replica]
        assert found.queued_tokens + found.others_tokens >= tokens
        assert found.num_open + found.others_running >= running

    @rule(replica=st.integers(0, 2), state=st.sampled_from(State))
    def turn(self, replica: int, state: State) -> None:
        self.router.turned(replica, state)

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def accounts_are_of_what_is_open(self) -> None:
        for i, replica in enumerate(self.router.replicas):
            own = [ticket for ticket in self.open if ticket.replica == i]
            assert replica.num_open == len(own)
            assert replica.num_running == sum(ticket.begun for ticket in own)
            assert replica.queued_tokens == sum(ticket.num_tokens for ticket in own if not ticket.begun)

    @invariant()
    def index_agrees_with_itself(self) -> None:
        index, bits = self.router.index, Counter[object]()
        for i, kept in enumerate(index.kept):
            for piece in kept:
                bits[piece] += 1 << i
        assert bits == index.owners


TestRouting = Routing.TestCase
TestRouting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 5), max_size=6, unique=True)), max_size=20)
)
@settings(deadline=None)
def test_hits_are_those_of_each_replica_alone(puts: list[tuple[int, list[int]]]) -> None:
    index, alone = Index(3, 1000), [set[int]() for _ in range(3)]
    for replica, chain in puts:
        index.put(replica, chain)
        alone[replica] |= set(chain)
        for other in range(3):
            known = [piece in alone[other] for piece in chain]
            assert index.hits(chain)[other] == (known + [False]).index(False)


def test_the_latest_prompts_are_kept_and_their_heads_longest() -> None:
    index = Index(1, 4)
    index.put(0, [1, 2, 3])
    index.put(0, [4, 5])
    assert list(index.kept[0]) == [2, 1, 5, 4]
    assert index.hits([1, 2, 3]) == [2]
    index.forget(0)
    assert index.hits([4, 5]) == [0] and not index.owners


def test_a_prompt_goes_where_its_beginning_is_until_that_costs_more_than_computing_it() -> None:
    router = make()
    chain = chain_of([bytes([n]) * 4 for n in range(32)])
    first = router.route(chain, 32 * PIECE, 0.0)
    router.began(first, 0.0)
    router.ended(first)
    again = [router.route(chain, 32 * PIECE, 1.0) for _ in range(3)]
    assert {ticket.replica for ticket in again} == {first.replica}
    assert [ticket.num_cached for ticket in again] == [32 * PIECE - 1] * 3
    long = router.route(chain_of([b"other"]), 100_000, 1.0, without={0, 1, 2} - {first.replica})
    assert long.replica == first.replica
    assert router.route(chain, 32 * PIECE, 1.0).replica != first.replica


def test_chains_share_only_what_prompts_and_roots_share() -> None:
    one, two = chain_of([b"a", b"b", b"c"]), chain_of([b"a", b"b", b"d"])
    assert one[:2] == two[:2] and one[2] != two[2]
    assert not set(one) & set(chain_of([b"b", b"c"]))
    assert not set(one) & set(chain_of([b"a", b"b", b"c"], b"another tenant"))


def test_sessions_stay_and_move_only_from_replicas_that_go() -> None:
    def places(router: Router) -> list[int]:
        found = []
        for number in range(200):
            ticket = router.route([], 0, 0.0, session=f"session {number}")
            router.ended(ticket)
            found.append(ticket.replica)
        return found

    before = places(make(seed=1))
    assert before == places(make(seed=2)), "chance has no say"
    assert min(Counter(before).values()) > 30
    router = make()
    router.turned(1, State.DRAINING)
    after = places(router)
    assert [a for a, b in zip(after, before, strict=True) if b != 1] == [b for b in before if b != 1]
    assert 1 not in after


def test_ties_without_a_session_are_broken_by_a_seeded_chance() -> None:
    def places(seed: int) -> list[int]:
        router = make(seed=seed)
        return [router.route([], 0, 0.0).replica for _ in range(3)]

    assert places(1) == places(1)
    assert len({tuple(places(seed)) for seed in range(20)}) > 1


def test_a_circuit_opens_for_twice_as_long_each_time_and_lets_one_try() -> None:
    circuit, now = Circuit(), 0.0
    for out_s in (1.0, 2.0, 4.0):
        for _ in range(FAILURES if out_s == 1.0 else 1):
            assert circuit.allows(now)
            circuit.taken()
            circuit.failed(now)
        assert not circuit.allows(now + out_s - 0.01)
        now += out_s
    assert circuit.allows(now)
    circuit.taken()
    assert not circuit.allows(now), "one probe at a time"
    circuit.succeeded()
    assert circuit.allows(now)
    circuit.failed(now)
    assert circuit.allows(now), "it begins from nothing"


def test_failures_of_requests_that_began_before_do_not_keep_it_out_for_longer() -> None:
    circuit = Circuit()
    for _ in range(50):
        circuit.failed(0.0)
    assert circuit.allows(1.0)


def test_nobody_is_told_to_come_back_when_somebody_may_be_there() -> None:
    router = make(("a",))
    for _ in range(FAILURES):
        ticket = router.route([], 0, 10.0)
        router.failed(ticket, 10.0)
        router.ended(ticket)
    with pytest.raises(Overloaded) as caught:
        router.route([], 0, 10.2)
    assert (caught.value.reason, caught.value.retry_after_s) == ("no_replica", 1)
    assert router.route([], 0, 11.0).replica == 0


def test_what_would_wait_too_long_is_refused_unless_nothing_is_ahead() -> None:
    router = make(("a",), most_s=1.0)
    router.route([], 50_000, 0.0)
    with pytest.raises(Overloaded) as caught:
        router.route([], 1_000, 0.0)
    assert caught.value.reason == "max_queue_seconds"
    assert caught.value.retry_after_s == 4  # 51,000 tokens take 4.25 s


def test_a_tenth_may_be_tried_again() -> None:
    router, reserve = make(), int(RETRY_RESERVE)
    assert [router.may_retry() for _ in range(reserve + 1)] == [True] * reserve + [False]
    for _ in range(105):
        router.ended(router.route([], 0, 0.0))
    assert [router.may_retry() for _ in range(11)] == [True] * 10 + [False]


def test_slow_replicas_are_learned() -> None:
    router, slow, now = make(("slow", "fast")), 0, 0.0
    counts: Counter[int] = Counter()
    for number in range(300):
        ticket = router.route([], 1_000, now)
        counts[ticket.replica] += number >= 100
        now += 1.0
        router.began(ticket, now if ticket.replica == slow else now - 0.8)
        router.ended(ticket)
    assert counts[slow] < counts[1] / 5


@pytest.mark.parametrize("slownesses", [(1, 1, 1, 1), (1, 1, 1, 2)])
def test_more_is_cached_and_first_tokens_come_sooner_than_where_replicas_take_turns(
    slownesses: tuple[float, ...],
) -> None:
    """Of simulated replicas, by their own clock, which is the benchmark's."""
    found = {
        name: Simulation(slownesses, choose, router).run(workload(4.0))
        for name, choose, router in policies(len(slownesses))
        if name in {"round robin", "cost"}
    }
    turns, cost = found["round robin"], found["cost"]
    assert len(cost.first_s) == len(turns.first_s) > 500
    assert cost.num_hits > 1.1 * turns.num_hits
    assert cost.at(0.5) < turns.at(0.5) and cost.at(0.99) < 0.8 * turns.at(0.99)
