"""Who may wait: limits that hold, counts that come back to nothing, and waits as long as they were said to be."""

import contextlib
import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.admission import Admission, Margin, TenantLimits
from quire.engine.metrics import StepStats
from quire.errors import Overloaded

MANY = 1_000_000


def admission(
    limits: dict[str, TenantLimits] | None = None,
    *,
    requests: int = MANY,
    tokens: int = MANY,
    seconds: float = MANY,
) -> Admission:
    return Admission(limits or {}, TenantLimits(), requests, tokens, seconds)


def stats(running: int, waiting: int, prefill: int = 0, hits: int = 0) -> StepStats:
    return StepStats(
        num_running=running,
        num_waiting=waiting,
        used_blocks=0,
        num_blocks=1,
        batched_tokens=prefill + running,
        num_preemptions=0,
        cache_queries=hits,
        cache_hits=hits,
        prefill_tokens=prefill,
    )


def refused(found: Admission, tenant: str = "", tokens: int = 1, now: float = 0.0) -> Overloaded:
    before = found.saturation(now)
    with pytest.raises(Overloaded) as caught:
        found.admit("refused", tenant, tokens, 1, now)
    assert found.saturation(now) == before and "refused" not in found.open, "a refusal changes nothing"
    assert type(caught.value.retry_after_s) is int and 1 <= caught.value.retry_after_s <= 120
    return caught.value


def test_requests_that_wait_are_bounded() -> None:
    found = admission(requests=2)
    for name in "ab":
        found.admit(name, "", 10, 1, 0.0)
    error = refused(found)
    assert (error.scope, error.reason) == ("server", "max_num_queued_reqs")
    found.entered("a", 0.0)
    found.admit("c", "", 10, 1, 0.0)
    found.left("b", 0.0)
    found.admit("d", "", 10, 1, 0.0)
    assert refused(found).reason == "max_num_queued_reqs"


def test_tokens_that_wait_are_bounded_and_a_long_prompt_may_wait_alone() -> None:
    found = admission(tokens=100)
    found.admit("long", "", 500, 1, 0.0)
    assert refused(found).reason == "max_num_queued_tokens"
    found.entered("long", 0.0)
    found.admit("a", "", 60, 1, 0.0)
    assert refused(found, tokens=41).reason == "max_num_queued_tokens"
    found.admit("b", "", 40, 1, 0.0)


def test_nobody_is_refused_for_time_before_it_was_measured() -> None:
    found = admission(seconds=0.001)
    for number in range(1000):
        found.admit(str(number), "", 1000, 1, 0.0)
    assert found.saturation(0.0).expected_wait_s == 0


def test_nobody_is_refused_where_nobody_waits() -> None:
    found = busy(admission(seconds=0.001))
    found.admit("first", "", 100_000, 1, 0.0)
    assert refused(found).reason == "max_queue_seconds"


def busy(found: Admission, per_s: int = 1000) -> Admission:
    """One that has measured so many prompt tokens a second."""
    found.entered("somebody", 0.0)
    found.computed(stats(1, 1, prefill=per_s), 1.0)
    found.computed(stats(0, 0), 1.0)
    return found


def test_the_wait_is_what_waits_over_the_measured_rate() -> None:
    found = busy(admission(seconds=30))
    for number in range(31):
        found.admit(str(number), "", 1000, 1, 0.0)
    assert found.saturation(0.0).expected_wait_s == pytest.approx(31)
    error = refused(found)
    assert (
        error.reason == "max_queue_seconds" and error.retry_after_s == 9
    )  # 31 s, less three quarters of 30 s
    assert "try again in 9 s" in str(error)


def test_what_the_cache_holds_takes_no_time() -> None:
    found = admission()
    found.entered("somebody", 0.0)
    found.computed(stats(1, 1, prefill=100, hits=900), 1.0)
    found.admit("a", "", 500, 1, 1.0)
    assert found.saturation(1.0).expected_wait_s == pytest.approx(0.5)


def test_seats_that_are_free_are_not_waited_for() -> None:
    found = admission()
    found.entered("somebody", 0.0)
    found.computed(stats(4, 2), 1.0)  # four seats, and nobody got one in a second
    for number in range(6):
        found.admit(str(number), "", 0, 1, 1.0)
    assert found.saturation(1.0).expected_wait_s == pytest.approx(6)
    found.computed(stats(1, 0), 1.0)
    assert found.saturation(1.0).expected_wait_s == pytest.approx(3), "three are free"


def test_a_restart_is_no_speed() -> None:
    found = busy(admission())
    found.admit("a", "", 1000, 1, 1.0)
    found.entered("a", 1.0)
    found.computed(stats(1, 3, prefill=1000), 2.0)
    found.restarted(2.5)
    found.entered("a", 60.0)  # sent again
    found.computed(stats(1, 3, prefill=1000), 61.0)
    found.admit("b", "", 1000, 1, 61.0)
    assert found.saturation(61.0).expected_wait_s == pytest.approx(1)


def test_a_tenants_requests_at_a_time() -> None:
    found = admission({"a": TenantLimits(max_concurrent=2)})
    for name in "xy":
        found.admit(name, "a", 1, 1, 0.0)
        found.entered(name, 0.0)
    error = refused(found, "a")
    assert (error.scope, error.reason, error.retry_after_s) == ("tenant", "tenant_concurrency", 1)
    found.admit("z", "b", 1, 1, 0.0)  # others have no such limit
    found.left("x", 20.0)
    found.admit("w", "a", 1, 1, 20.0)
    assert refused(found, "a", now=20.0).retry_after_s == 10  # two end in 20 s


def test_a_tenants_requests_a_minute() -> None:
    found = admission({"a": TenantLimits(requests_per_minute=6)})
    for number in range(6):
        found.admit(str(number), "a", 1, 1, 0.0)
        found.entered(str(number), 0.0)
        found.left(str(number), 0.0)
    error = refused(found, "a")
    assert (error.reason, error.retry_after_s) == ("tenant_requests", 10)
    assert refused(found, "a", now=9.5).retry_after_s == 1
    found.admit("later", "a", 1, 1, 10.0)
    assert refused(found, "a", now=10.0)


def test_a_tenants_tokens_a_minute() -> None:
    found = admission({"a": TenantLimits(tokens_per_minute=600)})
    found.admit("x", "a", 500, 1, 0.0)
    found.entered("x", 0.0)
    found.generated("x", 400)
    assert refused(found, "a", 300).retry_after_s == 60
    assert refused(found, "a", 300, now=59.0).retry_after_s == 1
    found.admit("y", "a", 300, 1, 60.0)
    found.left("x", 60.0)
    found.entered("y", 60.0)
    found.left("y", 60.0)
    found.admit("more than a minute's", "a", 5000, 1, 121.0)
    assert refused(found, "a", 1, now=121.0).retry_after_s == 120


def test_what_never_began_is_not_charged() -> None:
    found = admission({"a": TenantLimits(requests_per_minute=1, tokens_per_minute=10)})
    for number in range(5):
        found.admit(str(number), "a", 10, 1, 0.0)
        found.left(str(number), 0.0)
    found.admit("last", "a", 10, 1, 0.0)
    found.entered("last", 0.0)
    found.left("last", 0.0)
    assert refused(found, "a").scope == "tenant"


def test_shares() -> None:
    found = admission({"a": TenantLimits(share=3.0)})
    assert (found.share("a"), found.share("b")) == (3.0, 1.0)


def test_another_tenants_queue_is_ahead_only_as_far_as_its_turns() -> None:
    found = busy(admission(seconds=30))
    with contextlib.suppress(Overloaded):
        for number in range(1000):
            found.admit(f"a{number}", "a", 1000, 1, 0.0)
    assert found.saturation(0.0).num_queued_reqs == 31
    for number in range(15):
        found.admit(f"b{number}", "b", 1000, 1, 0.0)
    assert refused(found, "b", 1000).reason == "max_queue_seconds"
    assert refused(found, "a", 1000).reason == "max_queue_seconds"


def test_names_of_tenants_are_not_kept() -> None:
    found = admission()
    for number in range(1000):
        found.admit("x", f"visitor {number}", 1, 1, 0.0)
        found.left("x", 0.0)
    assert len(found.accounts) == 1


actions = st.lists(
    st.tuples(
        st.sampled_from(("admit", "admit", "admit", "entered", "left", "generated", "computed", "restarted")),
        st.integers(0, 8),
        st.sampled_from("ab"),
        st.integers(1, 60),
        st.sampled_from((0.0, 0.01, 1.0, 7.0)),
    ),
    max_size=60,
)
tenants = st.builds(
    TenantLimits,
    share=st.sampled_from((0.5, 1.0, 3.0)),
    max_concurrent=st.sampled_from((None, 1, 3)),
    requests_per_minute=st.sampled_from((None, 2, 10)),
    tokens_per_minute=st.sampled_from((None, 50, 500)),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(actions, tenants, st.integers(1, 5), st.integers(1, 120), st.sampled_from((0.5, 5.0)))
def test_counts_are_true_and_come_back_to_nothing(
    todo: list[tuple[str, int, str, int, float]],
    limits: TenantLimits,
    most_requests: int,
    most_tokens: int,
    most_s: float,
) -> None:
    found = Admission({"a": limits}, TenantLimits(), most_requests, most_tokens, most_s)
    queued: dict[str, int] = {}
    running: set[str] = set()
    tenant_of: dict[str, str] = {}
    now = 0.0
    for what, number, tenant, size, passed in todo:
        now, name = now + passed, str(number)
        if what == "admit" and name not in tenant_of:
            own = Counter(tenant_of.values())[tenant]
            alone = not queued
            try:
                found.admit(name, tenant, size, 1, now)
            except Overloaded as error:
                assert error.scope == "tenant" or not alone, "the first one is always taken"
                assert 1 <= error.retry_after_s <= 120
                assert error.reason != "max_num_queued_reqs" or len(queued) + 1 > most_requests
                assert error.reason != "max_num_queued_tokens" or sum(queued.values()) + size > most_tokens
            else:
                assert tenant == "b" or limits.max_concurrent is None or own < limits.max_concurrent
                if len({t for n, t in tenant_of.items() if n in queued} | {tenant}) == 1:
                    assert len(queued) < most_requests
                    assert not queued or sum(queued.values()) + size <= most_tokens
                queued[name], tenant_of[name] = size, tenant
        elif what == "entered":
            found.entered(name, now)
            if queued.pop(name, None) is not None:
                running.add(name)
        elif what == "left":
            found.left(name, now)
            tenant_of.pop(name, None)
            queued.pop(name, None)
            running.discard(name)
        elif what == "generated":
            found.generated(name, size)
        elif what == "computed":
            found.computed(stats(len(running), len(queued), prefill=size % 3 * size), now)
        elif what == "restarted":
            found.restarted(now)
        state = found.saturation(now)
        assert (state.num_queued_reqs, state.num_queued_tokens) == (len(queued), sum(queued.values()))
        assert state.expected_wait_s >= 0 and (queued or state.expected_wait_s == 0)
        for account in found.accounts.values():
            waiting = (account.queued.requests, account.queued.tokens, account.queued.sequences)
            assert min(account.num_open, *waiting, account.used_requests, account.used_tokens) >= 0
    for name in list(tenant_of):
        found.left(name, now)
    state = found.saturation(now)
    assert (state.num_queued_reqs, state.num_queued_tokens, state.expected_wait_s) == (0, 0, 0)
    assert not found.open and not any(a.num_open or a.queued.requests for a in found.accounts.values())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 3000), min_size=2, max_size=40),
    st.integers(1, 30),
    st.integers(1, 9000),
    st.integers(1, 9),
)
def test_the_longer_the_queue_the_later_one_is_told_to_come(
    prompts: list[int], most_requests: int, most_tokens: int, most_s: int
) -> None:
    found, told = busy(admission(), per_s=500), 0
    for number, size in enumerate(prompts):
        found.max_num_queued_reqs, found.max_num_queued_tokens = most_requests, most_tokens
        found.max_queue_seconds = most_s
        try:
            found.admit("probe", "", 100, 1, 0.0)
        except Overloaded as error:
            assert error.retry_after_s >= told
            told = error.retry_after_s
        else:
            assert not told, "a longer queue has no room where a shorter one had none"
            found.left("probe", 0.0)
        found.max_num_queued_reqs = found.max_num_queued_tokens = found.max_queue_seconds = MANY
        found.admit(str(number), "", size, 1, 0.0)


@dataclass
class Engine:
    """A simulated engine: so many seats, so many prompt tokens a step, first come, first served."""

    found: Admission
    seats: int
    tokens_per_step: int
    outputs: int
    step_s: float = 0.01
    token_s: float = 0.0001
    now: float = 0.0
    waiting: deque[tuple[str, int]] = field(default_factory=deque)
    running: dict[str, list[int]] = field(default_factory=dict)  # prompt and output tokens to be computed
    begun_s: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, tokens: int) -> None:
        self.found.admit(name, "", tokens, 1, self.now)
        self.waiting.append((name, tokens))

    def step(self) -> None:
        room, entered = self.tokens_per_step, []
        ahead = sum(prompt for prompt, _ in self.running.values())
        while self.waiting and len(self.running) < self.seats and ahead < room:
            name, tokens = self.waiting.popleft()
            self.running[name] = [tokens, self.outputs]
            entered.append(name)
            ahead += tokens
        for name in entered:
            self.begun_s[name] = self.now
            self.found.entered(name, self.now)
        for name, left in list(self.running.items()):
            if not left[0]:
                left[1] -= 1
                if not left[1]:
                    del self.running[name]
                    self.found.left(name, self.now)
            else:
                done = min(left[0], room)
                left[0], room = left[0] - done, room - done
        prefill = self.tokens_per_step - room
        self.now += self.step_s + self.token_s * prefill
        self.found.computed(stats(len(self.running), len(self.waiting), prefill=prefill), self.now)


ENGINES = {
    "prefill": {"seats": 1000, "tokens_per_step": 512, "outputs": 3},
    "seats": {"seats": 4, "tokens_per_step": 512, "outputs": 50},
    "both": {"seats": 16, "tokens_per_step": 256, "outputs": 20},
}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("sizes", [(200,), (20, 900)])
def test_waits_are_as_long_as_expected(kind: str, sizes: tuple[int, ...]) -> None:
    engine, expected, came_s = Engine(admission(), **ENGINES[kind]), dict[str, float](), dict[str, float]()
    for number in range(200):
        engine.add(f"warm {number}", sizes[number % len(sizes)])
    while len(engine.waiting) > 40:
        engine.step()
    for number in range(100):
        name = str(number)
        expected[name], came_s[name] = engine.found.saturation(engine.now).expected_wait_s, engine.now
        engine.add(name, sizes[number % len(sizes)])
        if number % 3 == 0:
            engine.step()
    while engine.waiting:
        engine.step()
    for name, seconds in expected.items():
        assert engine.begun_s[name] - came_s[name] == pytest.approx(seconds, rel=0.25)


def overload(engine: Engine, seconds: float) -> Iterator[tuple[str, Overloaded | None]]:
    """Ten times what it can do, for so long; in the beginning it does not know how much that is."""
    number, owed = 0, 0.0
    while engine.now < seconds:
        owed += (engine.step_s + engine.token_s * engine.tokens_per_step) * 10 * 50
        while owed >= 1:
            number, owed = number + 1, owed - 1
            try:
                engine.add(str(number), 100)
            except Overloaded as error:
                yield str(number), error
            else:
                yield str(number), None
        engine.step()


@pytest.mark.parametrize("kind", ENGINES)
def test_overload_keeps_what_is_admitted_in_time_and_the_engine_busy(kind: str) -> None:
    found = admission(seconds=2.0)
    engine, came_s = Engine(found, **ENGINES[kind]), dict[str, float]()
    num_refused = 0
    for name, error in overload(engine, 40.0):
        if error is None:
            came_s[name] = engine.now
        else:
            num_refused += 1
            assert error.reason == "max_queue_seconds" and (error.retry_after_s <= 2 or engine.now < 10)
        assert engine.waiting or engine.now < 1
    while engine.waiting:
        engine.step()
    waits = sorted(engine.begun_s[name] - came for name, came in came_s.items() if came > 10)
    assert num_refused > len(came_s) > 50
    assert waits[-1] < 2.0 * 1.5 and waits[0] > 2.0 * 0.5


def test_a_burst_on_an_idle_engine_is_no_overload() -> None:
    """What an engine could do was never asked of it while it got one small prompt after another."""
    engine = Engine(admission(seconds=2.0), seats=256, tokens_per_step=2048, outputs=4)
    for number in range(200):
        engine.add(f"small {number}", 5)
        engine.step()
    for number in range(60):
        engine.add(f"burst {number}", 200)


def test_one_that_comes_back_as_told_finds_room() -> None:
    engine = Engine(admission(seconds=5.0), **ENGINES["prefill"])
    error = None
    for number in range(10_000):
        try:
            engine.add(str(number), 300)
        except Overloaded as found:
            error = found
            break
        if number % 20 == 0:
            engine.step()
    assert error is not None
    back_s = engine.now + error.retry_after_s
    while engine.now < back_s:
        engine.step()
    engine.add("back", 300)


def test_the_margin_is_what_nearly_all_stay_within() -> None:
    margin, chance = Margin(10.0), random.Random(0)
    for _ in range(2000):
        margin.learn(1.0, chance.uniform(0.5, 3.5))
    assert margin.seconds == pytest.approx(2.35, abs=0.3)  # 95 of 100 are below
    for _ in range(400):
        margin.learn(1.0, 0.9)
    assert margin.seconds == 0.0, "those that wait less than expected take it back"
    for _ in range(1000):
        margin.learn(1.0, 1000.0)
    assert margin.seconds == 5.0, "half of the limit is left"


def test_where_requests_wait_longer_than_expected_fewer_may() -> None:
    def room(found: Admission) -> int:
        """How many get in, of a second each."""
        for number in range(40):
            try:
                found.admit(str(number), "", 1000, 1, 0.0)
            except Overloaded:
                return number
        pytest.fail("there is no end")

    assert room(busy(admission(seconds=30))) == 31
    late = busy(admission(seconds=30))
    for _ in range(40):
        late.admit("ahead", "", 1000, 1, 0.0)
        late.admit("behind", "", 1000, 1, 0.0)
        late.entered("ahead", 0.0)
        late.entered("behind", 11.0)  # ten seconds more
        late.left("ahead", 11.0)
        late.left("behind", 11.0)
    assert 20 <= room(late) <= 22


def test_what_a_restart_adds_to_a_wait_was_not_expected_of_it() -> None:
    found = busy(admission())
    for name in "ab":
        found.admit(name, "", 1000, 1, 0.0)
    found.restarted(1.0)
    found.entered("a", 100.0)
    found.entered("b", 200.0)
    assert found.margin.seconds == 0.0
