"""What it takes to go on after an engine died: each request, the tokens it has, and whom crashes point at. Pure.

A crash counts against the requests that were in the batch, until they get beyond where they were. Those that two
crashes point at are suspects. Before anybody else comes back, each of them is put on trial: it runs alone until it is
beyond, and then waits for the others. If the engine dies at that, this request fails, and the others go on.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from quire.engine.events import Submission, TokenEvent
from quire.types import FinishReason

SUSPECT = 2  # crashes without getting beyond
BEYOND = 2  # tokens; one may have been computed before the crash and arrived after it
MAX_CRASHES = 20  # of one request, whatever it got between them


@dataclass(slots=True)
class Entry:
    """One open request."""

    submission: Submission
    outputs: list[list[int] | None]  # by index; None: ended
    sent: bool = False  # the engine that runs now knows it
    num_sent: int = 0
    num_told: int = 1  # the same, as its owner knows it
    strikes: int = 0
    crashes: int = 0
    added_s: float = 0.0
    marks: list[int] = field(default_factory=list)  # by index: with so many tokens it is beyond

    @property
    def is_beyond(self) -> bool:
        """Every sequence got further than where the last crash hit it, or ended."""
        pairs = zip(self.outputs, self.marks, strict=True)
        return all(tokens is None or len(tokens) >= mark for tokens, mark in pairs)

    def resumed(self) -> Submission:
        """The request as it goes on from here."""
        if not any(tokens is None or tokens for tokens in self.outputs):
            return self.submission
        outputs = tuple(None if tokens is None else tuple(tokens) for tokens in self.outputs)
        return dataclasses.replace(self.submission, outputs=outputs)


class Journal:
    """Open requests by id, in order of arrival."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.unsent: dict[str, None] = {}
        self.batch: set[str] = set()
        self.trial: str | None = None  # the suspect that the engine has, and nothing else
        self.num_replays = 0

    def add(self, submission: Submission, now: float = 0.0) -> None:
        """Take in a request; it fails only if its id is open, which the caller checks."""
        had = submission.outputs or ((),) * submission.params.n
        outputs = [None if tokens is None else list(tokens) for tokens in had]
        self.entries[submission.request_id] = Entry(submission, outputs, added_s=now)
        self.unsent[submission.request_id] = None

    def due(self) -> list[Submission]:
        """What the engine must be sent now, given that it is ready; each is told once."""
        if self.trial is not None or not self.unsent:
            return []
        suspects = [name for name in self.unsent if self.entries[name].strikes >= SUSPECT]
        if suspects:
            return [self._try(suspects[0])]
        return [self._send(name) for name in list(self.unsent)]

    def changed(self, entered: Iterable[str], left: Iterable[str]) -> None:
        """Who is in the batch of the step to come."""
        self.batch.difference_update(left)
        self.batch.update(entered)

    def record(self, event: TokenEvent) -> TokenEvent | None:
        """Take in what a sequence got; returns what it means to the request's owner, None if nothing."""
        entry = self.entries.get(event.request_id)
        tokens = entry.outputs[event.index] if entry is not None else None
        if entry is None or tokens is None:
            return None
        if event.token is not None:
            tokens.append(event.token)
        cut = event.request_id == self.trial and event.finish == FinishReason.LENGTH.value
        if cut and len(tokens) < entry.submission.max_tokens:
            event = msgspec.structs.replace(event, finish=None)
        if entry.num_sent > entry.num_told:
            entry.num_told = entry.num_sent
            event = msgspec.structs.replace(event, num_replays=entry.num_sent - 1)
        if event.finish is not None:
            self.end(event.request_id, event.index)
        elif entry.strikes:
            self._pardon(event.request_id, entry)
        return event

    def end(self, request_id: str, index: int | None = None) -> None:
        """A request is over, or one of its sequences; unknown ids are ignored."""
        entry = self.entries.get(request_id)
        if entry is None:
            return
        for i in range(len(entry.outputs)) if index is None else (index,):
            entry.outputs[i] = None
        if all(tokens is None for tokens in entry.outputs):
            del self.entries[request_id]
            self.unsent.pop(request_id, None)
            if self.trial == request_id:
                self.trial = None
        elif entry.strikes:
            self._pardon(request_id, entry)

    def crashed(self, *, on_purpose: bool = False) -> list[str]:
        """The engine died: note whom that points at; return the ids of requests that fail of it.

        All others are due again, once there is an engine. If somebody ended it `on_purpose`, nobody is to blame.
        """
        sent = [name for name, entry in self.entries.items() if entry.sent]
        blamed = [name for name in sent if name in self.batch] or sent
        if on_purpose:
            self.trial, failed = None, []
        elif self.trial is not None:
            failed = [self.trial]
        else:
            for name in blamed:
                self._strike(self.entries[name])
            failed = [name for name in blamed if self.entries[name].crashes >= MAX_CRASHES]
        for name in failed:
            self.end(name)
        self.batch.clear()
        for entry in self.entries.values():
            entry.sent = False
        self.unsent = dict.fromkeys(self.entries)
        return failed

    def surrender(self) -> list[Submission]:
        """Let go of all requests; as somebody else can go on with them."""
        found = [entry.resumed() for entry in self.entries.values()]
        for submission in found:
            self.end(submission.request_id)
        return found

    def _send(self, name: str) -> Submission:
        entry = self.entries[name]
        del self.unsent[name]
        self.num_replays += entry.num_sent > 0
        entry.sent, entry.num_sent = True, entry.num_sent + 1
        return entry.resumed()

    def _try(self, name: str) -> Submission:
        """Cut off where it is beyond: so the engine lets go of it by itself, and nothing of it is on its way then."""
        self.trial, entry, submission = name, self.entries[name], self._send(name)
        have = max((len(tokens) for tokens in entry.outputs if tokens), default=0)
        cut = min(submission.max_tokens, have + BEYOND)
        entry.marks = [cut] * len(entry.outputs)
        return dataclasses.replace(submission, max_tokens=cut)

    def _strike(self, entry: Entry) -> None:
        entry.strikes, entry.crashes = entry.strikes + 1, entry.crashes + 1
        entry.marks = [0 if tokens is None else len(tokens) + BEYOND for tokens in entry.outputs]

    def _pardon(self, name: str, entry: Entry) -> None:
        """A request that got beyond every crash is no suspect any more."""
        if not entry.is_beyond:
            return
        entry.strikes = 0
        if self.trial == name:  # the engine has ended it by now
            self.trial, entry.sent = None, False
            self.unsent[name] = None
