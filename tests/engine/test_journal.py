"""The journal against a small engine that dies: nothing is lost or told twice, and a poison fails alone."""

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.events import Submission, TokenEvent
from quire.engine.journal import MAX_CRASHES, Journal
from quire.types import SamplingParams


def submission(name: str, *, n: int = 1, max_tokens: int = 8) -> Submission:
    params = SamplingParams(n=n, seed=1, max_tokens=max_tokens)
    return Submission(request_id=name, prompt_token_ids=(1, 2), params=params, max_tokens=max_tokens)


def token(name: str, index: int, position: int) -> int:
    """What an undisturbed run samples."""
    return (int(name) * 101 + index * 13 + position * 7) % 97


class Died(Exception):
    """The toy engine is gone; it had told `args[0]` before."""


@dataclass
class ToyEngine:
    """Computes at most `seats` requests at once; dies of a poison that has at least so many tokens."""

    poisons: dict[str, int]
    seats: int
    lag: bool  # a step's tokens are told after the next step has begun
    requests: dict[str, tuple[Submission, list[list[int] | None]]] = field(default_factory=dict)
    batch: list[str] = field(default_factory=list)
    late: list[TokenEvent] = field(default_factory=list)

    def add(self, new: Submission) -> None:
        assert new.request_id not in self.requests
        outputs = new.outputs or ((),) * new.params.n
        self.requests[new.request_id] = (new, [None if o is None else list(o) for o in outputs])

    def step(self, journal: Journal) -> list[TokenEvent]:
        batch = list(self.requests)[: self.seats]
        journal.changed([b for b in batch if b not in self.batch], [b for b in self.batch if b not in batch])
        self.batch, told, self.late = batch, self.late, []
        for name in batch:
            new, outputs = self.requests[name]
            for index, tokens in enumerate(outputs):
                if tokens is None:
                    continue
                if len(tokens) >= self.poisons.get(name, 10**9):
                    raise Died(told)
                position = len(tokens)
                tokens.append(token(name, index, position))
                finish = "length" if position + 1 == new.max_tokens else None
                outputs[index] = None if finish else tokens
                self.late.append(TokenEvent(request_id=name, index=index, token=tokens[-1], finish=finish))
            if all(tokens is None for tokens in outputs):
                del self.requests[name]
        if not self.lag:
            told, self.late = self.late, []
        return told


@dataclass
class Frontend:
    """What the remote engine does with a journal, without the rest."""

    poisons: dict[str, int]
    seats: int
    lag: bool
    journal: Journal = field(default_factory=Journal)
    got: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    num_restarts: int = 0

    def __post_init__(self) -> None:
        self.engine = ToyEngine(self.poisons, self.seats, self.lag)

    def add(self, new: Submission) -> None:
        self.journal.add(new)
        self.send()

    def send(self) -> None:
        for new in self.journal.due():
            self.engine.add(new)

    def step(self) -> None:
        try:
            for event in self.engine.step(self.journal):
                self.take(event)
        except Died as death:
            for event in death.args[0]:
                self.take(event)
            self.crash()
        self.send()

    def take(self, event: TokenEvent) -> None:
        if self.journal.record(event) is not None:
            assert event.token is not None
            self.got.setdefault((event.request_id, event.index), []).append(event.token)
            if event.request_id not in self.journal.entries:
                self.ended[event.request_id] += 1

    def abort(self, name: str, index: int | None) -> None:
        was_open = name in self.journal.entries
        self.journal.end(name, index)
        known = self.engine.requests.get(name)
        if known is not None:
            outputs = known[1]
            for i in range(len(outputs)) if index is None else (index,):
                outputs[i] = None
            if all(tokens is None for tokens in outputs):
                del self.engine.requests[name]
        if was_open and name not in self.journal.entries:
            self.ended[name] += 1
        self.send()

    def crash(self) -> None:
        self.num_restarts += 1
        for name in self.journal.crashed():
            self.failed.append(name)
            self.ended[name] += 1
        self.engine = ToyEngine(self.poisons, self.seats, self.lag)
        self.send()


def drain(frontend: Frontend, limit: int = 3_000) -> None:
    for _ in range(limit):
        if not frontend.journal.entries:
            return
        frontend.step()
    raise AssertionError("it does not come to an end")


SCRIPT = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 3), st.integers(1, 12)),
        st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.integers(-1, 2)),
        st.tuples(st.just("kill"), st.just(0), st.just(0)),
    ),
    max_size=40,
)
POISONS = st.dictionaries(st.integers(0, 12).map(str), st.integers(0, 8), max_size=3)


def check_tokens(frontend: Frontend) -> None:
    """Every sequence has the tokens of an undisturbed run, from the first on."""
    for (name, index), tokens in frontend.got.items():
        assert tokens == [token(name, index, position) for position in range(len(tokens))]


@settings(derandomize=True, deadline=None, max_examples=400)
@given(SCRIPT, POISONS, st.integers(1, 5), st.booleans())
def test_nothing_is_lost_or_told_twice(
    script: list[tuple[str, int, int]], poisons: dict[str, int], seats: int, lag: bool
) -> None:
    frontend, names, lengths = Frontend(poisons, seats, lag), [], {}
    for what, a, b in script:
        if what == "add":
            name = str(len(names))
            names.append(name)
            lengths[name] = (a, b)
            frontend.add(submission(name, n=a, max_tokens=b))
        elif what == "step":
            for _ in range(a):
                frontend.step()
        elif what == "abort" and str(a) in lengths:
            frontend.abort(str(a), None if b < 0 or b >= lengths[str(a)][0] else b)
        elif what == "kill":
            frontend.crash()
    aborted = {str(a) for what, a, _ in script if what == "abort"}
    drain(frontend)
    check_tokens(frontend)
    assert frontend.ended == Counter(names)
    for name in set(names) - aborted - set(frontend.failed):
        n, length = lengths[name]
        assert [len(frontend.got[name, index]) for index in range(n)] == [length] * n


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=13),
    POISONS,
    st.integers(1, 5),
    st.booleans(),
)
def test_only_poisons_fail_and_each_costs_few_restarts(
    sizes: list[tuple[int, int]], poisons: dict[str, int], seats: int, lag: bool
) -> None:
    frontend = Frontend(poisons, seats, lag)
    for number, (n, length) in enumerate(sizes):
        frontend.add(submission(str(number), n=n, max_tokens=length))
    drain(frontend)
    deadly = {p for p, at in poisons.items() if int(p) < len(sizes) and at < sizes[int(p)][1]}
    assert set(frontend.failed) == deadly
    assert frontend.num_restarts <= 3 * len(deadly)
    check_tokens(frontend)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.integers(3, 9), max_size=MAX_CRASHES - 1), st.integers(1, 6), st.booleans())
def test_crashes_that_are_nobodys_fault_fail_nobody(kills: list[int], seats: int, lag: bool) -> None:
    """As long as everybody gets on between them."""
    frontend = Frontend({}, seats, lag)
    for number in range(seats):
        frontend.add(submission(str(number), max_tokens=500))
    for steps in kills:
        for _ in range(steps):
            frontend.step()
        frontend.crash()
    drain(frontend)
    assert frontend.failed == []
    check_tokens(frontend)


def test_suspects_are_tried_alone_before_anybody_else_comes_back() -> None:
    journal = Journal()
    for name in "0123":
        journal.add(submission(name))
    assert [s.request_id for s in journal.due()] == ["0", "1", "2", "3"]
    for _ in range(2):
        journal.changed(["1", "2"], [])
        assert journal.crashed() == []
        again = journal.due()
    assert [(s.request_id, s.max_tokens) for s in again] == [("1", 2)]
    journal.add(submission("4"))
    journal.add(submission("5"))
    journal.end("5")  # its owner has left
    assert journal.due() == []  # the others wait until the trials are over
    for position, finish in enumerate((None, "length")):
        assert journal.due() == []
        told = journal.record(TokenEvent(request_id="1", index=0, token=position, finish=finish))
        assert told is not None and told.finish is None  # the cut is nobody's business
    assert [s.request_id for s in journal.due()] == ["2"]
    assert journal.crashed() == ["2"]
    resumed = {s.request_id: s for s in journal.due()}
    assert list(resumed) == ["0", "1", "3", "4"]
    assert resumed["1"].outputs == ((0, 1),) and resumed["0"].outputs == ()
    assert {s.max_tokens for s in resumed.values()} == {8}
    assert journal.num_replays == 4 + 2 + 3  # all after one crash; two trials; then 0, 1 and 3


def test_the_end_of_a_request_on_trial_is_its_end() -> None:
    journal = Journal()
    for name in "01":
        journal.add(submission(name, max_tokens=1))
    for _ in range(2):
        journal.due()
        journal.crashed()
    assert [s.request_id for s in journal.due()] == ["0"]
    told = journal.record(TokenEvent(request_id="0", index=0, token=1, finish="length"))
    assert told is not None and told.finish == "length" and "0" not in journal.entries
    assert [s.request_id for s in journal.due()] == ["1"]
    journal.end("1")
    journal.add(submission("2"))
    assert [s.request_id for s in journal.due()] == ["2"]


def test_a_crash_points_only_at_the_batch_of_its_own_engine() -> None:
    journal = Journal()
    for name in "01":
        journal.add(submission(name))
    for entered in (["1"], ["0"]):
        journal.due()
        journal.changed(["0", "1"], [])
        journal.changed([], [name for name in "01" if name not in entered])
        journal.crashed()
    assert [s.request_id for s in journal.due()] == ["0", "1"]  # one crash each: no suspects
    journal.crashed()
    journal.crashed()  # the second one before anything was sent
    assert [entry.strikes for entry in journal.entries.values()] == [2, 2]


def test_a_trial_lasts_until_every_sequence_is_cut_off() -> None:
    journal = Journal()
    journal.add(submission("0", n=2))
    journal.due()
    for index, token_id in ((0, 1), (0, 2), (0, 3), (1, 9)):
        journal.record(TokenEvent(request_id="0", index=index, token=token_id))
    journal.crashed()
    journal.due()
    journal.crashed()
    tried = journal.due()
    assert [(s.max_tokens, s.outputs) for s in tried] == [(5, ((1, 2, 3), (9,)))]
    for index, position in ((0, 3), (0, 4), (1, 1), (1, 2), (1, 3)):
        finish = "length" if position == 4 else None
        journal.record(TokenEvent(request_id="0", index=index, token=position, finish=finish))
        assert journal.due() == []
    journal.record(TokenEvent(request_id="0", index=1, token=4, finish="length"))
    assert [s.outputs for s in journal.due()] == [((1, 2, 3, 3, 4), (9, 1, 2, 3, 4))]


def test_a_stop_string_can_end_a_trial() -> None:
    journal = Journal()
    journal.add(submission("0", n=2))
    journal.add(submission("1"))
    for _ in range(2):
        journal.due()
        journal.changed(["0"], [])
        journal.crashed()
    journal.due()
    for finish in (None, "length"):
        journal.record(TokenEvent(request_id="0", index=0, token=1, finish=finish))
    assert journal.due() == []  # the other sequence is not beyond
    journal.end("0", 1)
    assert {s.request_id: s.outputs for s in journal.due()} == {"0": ((1, 1), None), "1": ()}


def test_nobody_is_spared_who_is_always_there() -> None:
    """A request that gets on between crashes is no suspect, but not for ever."""
    journal = Journal()
    journal.add(submission("0", max_tokens=1000))
    failed: list[str] = []
    for crash in range(MAX_CRASHES):
        journal.due()
        journal.changed(["0"], [])
        for position in range(5):
            journal.record(TokenEvent(request_id="0", index=0, token=position))
        failed = journal.crashed()
        assert failed == (["0"] if crash == MAX_CRASHES - 1 else [])
    assert not journal.entries


def test_a_crash_before_any_batch_points_at_all_that_were_sent() -> None:
    journal = Journal()
    journal.add(submission("0"))
    for _ in range(2):
        journal.due()
        assert journal.crashed() == []
    journal.add(submission("1"))
    assert [s.request_id for s in journal.due()] == ["0"]
    assert journal.crashed() == ["0"]
    assert [s.request_id for s in journal.due()] == ["1"]


def test_a_crash_while_nothing_was_sent_points_at_nobody() -> None:
    journal = Journal()
    journal.add(submission("0"))
    for _ in range(5):
        assert journal.crashed() == []
    assert [s.request_id for s in journal.due()] == ["0"]


def test_an_ended_sequence_is_not_asked_for_again() -> None:
    journal = Journal()
    journal.add(submission("0", n=3))
    journal.due()
    journal.record(TokenEvent(request_id="0", index=1, token=5, finish="stop"))
    journal.record(TokenEvent(request_id="0", index=2, token=6))
    assert journal.record(TokenEvent(request_id="0", index=1, token=7)) is None
    journal.end("0", 2)  # a stop string
    assert journal.record(TokenEvent(request_id="0", index=2, token=8)) is None
    journal.crashed()
    assert [s.outputs for s in journal.due()] == [((), None, None)]


def test_an_engine_that_is_ended_on_purpose_points_at_nobody() -> None:
    """However often that happens, and while a suspect is on trial too."""
    journal = Journal()
    journal.add(submission("0"), 7.0)
    for _ in range(MAX_CRASHES + 1):
        assert [s.request_id for s in journal.due()] == ["0"]
        journal.changed(["0"], [])
        assert journal.crashed(on_purpose=True) == []
    assert journal.entries["0"].strikes == journal.entries["0"].crashes == 0
    assert journal.entries["0"].added_s == 7.0
    for _ in range(2):
        journal.due()
        journal.changed(["0"], [])
        assert journal.crashed() == []
    assert [s.request_id for s in journal.due()] == ["0"] and journal.trial == "0"
    assert journal.crashed(on_purpose=True) == [] and journal.trial is None
    assert [s.request_id for s in journal.due()] == ["0"] and journal.trial == "0"
    assert journal.crashed() == ["0"]


def test_the_first_event_after_a_replay_says_so() -> None:
    journal = Journal()
    journal.add(submission("0"))
    told = []
    for lost in (False, True, True):
        if lost:
            journal.crashed(on_purpose=True)
        journal.due()
        for number in range(2):
            event = journal.record(TokenEvent(request_id="0", index=0, token=number))
            told.append(None if event is None else event.num_replays)
    assert told == [0, 0, 1, 0, 2, 0]
