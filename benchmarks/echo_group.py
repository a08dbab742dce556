"""An engine group that computes nothing: every step it sends each stream one more token. For benchmarks only.

A request's `priority` is its tokens per second; 0 for as many as the frontend takes. Tokens tell the time: each is
the word for the tick of the machine's clock at which it was sent, so that whoever reads it knows how long it took.
"""

import dataclasses
import signal
import socket
import time
from dataclasses import dataclass

from quire.checkpoint.source import resolve
from quire.config import Config
from quire.engine.events import Submission, TokenEvent
from quire.engine.metrics import StepStats
from quire.engine.wire import Abort, Add, Batch, Channel, Events, Facts, Launch, Ping, Pong, Ready, Stop
from quire.errors import EngineDead
from quire.text.tokenizer import Tokenizer
from quire.types import FinishReason

TICK_S = 1e-4
MAX_LEN = 1 << 20
LENGTH = FinishReason.LENGTH.value


def clock_words(model: str) -> dict[str, int]:
    """Words and their tokens, one for each tick: a space and letters, so that they part where they are joined."""
    tokenizer = Tokenizer.load(resolve(model, weights=False).folder)
    texts = {tokenizer.token_text(token): token for token in range(tokenizer.vocab_size)}
    return {text: token for text, token in texts.items() if text[:1] == " " and text[1:].isalpha()}


@dataclass(slots=True)
class Echo:
    """One open sequence."""

    name: str
    index: int
    left: int
    gap_s: float
    due: float


class Echoes:
    """Obeys a frontend as an engine does, and answers at once."""

    def __init__(self, channel: Channel, tokens: list[int]):
        self.channel, self.tokens = channel, tokens
        self.open: list[Echo] = []
        self.num_tokens = 0

    def run(self) -> None:
        while self.obey():
            now = time.monotonic()
            due = [echo for echo in self.open if echo.due <= now]
            if due:
                self.step(due, now)
            elif self.open:
                time.sleep(min(1e-3, max(0.0, min(echo.due for echo in self.open) - now)))

    def obey(self) -> bool:
        while (message := self.channel.receive(0.0 if self.open else None)) is not None:
            match message:
                case Add(submission):
                    self.add(submission)
                case Abort(name, index):
                    self.open = [e for e in self.open if e.name != name or index not in (None, e.index)]
                case Ping(number):
                    self.channel.send(Pong(number))
                case Stop():
                    return False
        return True

    def add(self, submission: Submission) -> None:
        gap_s = 1 / submission.priority if submission.priority > 0 else 0.0
        due = (
            (time.monotonic() // gap_s + 1) * gap_s if gap_s else 0.0
        )  # with all others, as in a step of an engine
        name = submission.request_id
        self.open += [Echo(name, i, submission.max_tokens, gap_s, due) for i in range(submission.params.n)]
        self.channel.send(Batch([name], []))

    def step(self, due: list[Echo], now: float) -> None:
        token = self.tokens[int(now / TICK_S) % len(self.tokens)]
        events = []
        for echo in due:
            echo.left -= 1
            skipped = (now - echo.due) // echo.gap_s if echo.gap_s else 0.0  # too late for these
            echo.due += (skipped + 1) * echo.gap_s
            finish = None if echo.left else LENGTH
            events.append(
                TokenEvent(request_id=echo.name, index=echo.index, token=token, finish=finish, seated_s=now)
            )
        self.num_tokens += len(events)
        fields = {f.name: 0 for f in dataclasses.fields(StepStats)}
        running = {"num_running": len(self.open), "num_blocks": 1, "batched_tokens": len(events)}
        self.channel.send(Events(events, StepStats(**{**fields, **running})))
        ended = [echo.name for echo in due if not echo.left]
        if ended:
            self.open = [echo for echo in self.open if echo.left]
            self.channel.send(Batch([], ended))


def main(sock: socket.socket) -> None:
    """A group's life, see `quire.engine.group`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(sock)
    launch = channel.receive(None)
    assert isinstance(launch, Launch)
    config = Config(**launch.options)
    tokens = list(clock_words(config.model).values())
    facts = Facts(
        options=launch.options,
        reasons={},
        vocab_size=max(tokens) + 1,
        max_model_len=MAX_LEN,
        num_blocks=1,
        block_size=1,
        summary="an echo",
        start_s=0.0,
    )
    try:
        channel.send(Ready(facts))
        Echoes(channel, tokens).run()
    except EngineDead:
        pass
