"""Which of several engine groups has which request: it goes where it is expected to begin first. Knows no processes."""

import array
import math
import time
from collections.abc import Callable

from quire.engine.events import Submission
from quire.engine.router import Router, Ticket, chain_of

PIECE_TOKENS = 64


class Division:
    """The requests that are open, and a router (router.py) of what groups have cached and have to do."""

    def __init__(self, num_groups: int, seed: int, clock: Callable[[], float] = time.monotonic):
        names = [f"group-{number}" for number in range(num_groups)]
        self.router = Router(
            names, piece_tokens=PIECE_TOKENS, capacity=1, most_s=math.inf, waits=True, seed=seed
        )
        self.clock = clock
        self.tickets: dict[str, Ticket] = {}  # by the name of an open request

    def holds(self, number: int, num_tokens: int) -> None:
        """How much a group's cache does."""
        self.router.index.capacities[number] = max(num_tokens // PIECE_TOKENS, 1)

    def forget(self) -> None:
        """Nothing is cached any more."""
        for number in range(len(self.router.replicas)):
            self.router.index.forget(number)

    def route(self, submission: Submission) -> int:
        """The group for a request."""
        chain, num_tokens = _chain(submission), len(submission.prompt_token_ids)
        ticket = self.tickets[submission.request_id] = self.router.route(chain, num_tokens, self.clock())
        return ticket.replica

    def began(self, name: str) -> None:
        """A request has its first token."""
        ticket = self.tickets.get(name)
        if ticket is not None and not ticket.begun:
            self.router.began(ticket, self.clock())

    def ended(self, name: str) -> None:
        """A request is over."""
        ticket = self.tickets.pop(name, None)
        if ticket is not None:
            self.router.ended(ticket)


def _chain(submission: Submission) -> list[int]:
    """Names of its prompt's pieces, each of all up to its end; see `chain_of`."""
    tokens = submission.prompt_token_ids
    root = f"{submission.tenant}\0{submission.cache_salt}".encode("utf-8", "surrogatepass")
    ends = range(PIECE_TOKENS, len(tokens) + 1, PIECE_TOKENS)
    return chain_of((array.array("q", tokens[end - PIECE_TOKENS : end]).tobytes() for end in ends), root)
