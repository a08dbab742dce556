"""Has grammars checked by processes that are killed when one takes too long. Knows no sequence and no device.

What they let pass an engine compiles again beside its steps, and that is as cheap as it was for them.
"""

import json
import queue
import socket
import subprocess
import weakref
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from quire.engine.processes import command
from quire.errors import InvalidRequest, Overloaded
from quire.grammar.calls import LOOSE
from quire.log import logger
from quire.text.tokenizer import Tokenizer
from quire.types import CallRules, StructuredOutputsParams

CHECKER = "quire.grammar.checker"
MOST_PROCESSES = 2
START_S, CHECK_S, QUEUE_S = 60.0, 5.0, 15.0
KEPT_CHARS = 1 << 24  # of grammars that were checked and may be asked for again
FIELD = "structured_outputs"


class Checker:
    """One process."""

    def __init__(self, first: dict[str, Any]):
        """`first`: what it is told about the tokenizer.

        Raises:
            InvalidRequest: that tokenizer cannot be used.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                command(CHECKER, str(theirs.fileno())), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self.sock = ours
        self.lines = ours.makefile("rw", encoding="utf-8")
        self.close = weakref.finalize(self, _end, self.process, ours)
        try:
            self.ask(first, START_S)
        except InvalidRequest:
            self.close()
            raise

    def ask(self, asked: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Its answer, with the grammar. Where the process did not survive that, it is `close`d.

        Raises:
            InvalidRequest: it was refused, or took too long or too much.
        """
        self.sock.settimeout(timeout_s)
        try:
            self.lines.write(json.dumps(asked) + "\n")
            self.lines.flush()
            line = self.lines.readline()
        except TimeoutError:
            self.close()
            raise InvalidRequest(
                f"the grammar took more than {timeout_s:g} s to check; simplify it", param=FIELD
            ) from None
        except OSError:
            line = ""
        if not line.endswith("\n"):
            self.close()
            logger.warning("a grammar was refused, whose check ended a process made for that")
            raise InvalidRequest("the grammar takes too much memory to check; simplify it", param=FIELD)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise InvalidRequest(answer["error"], param=answer["param"] or FIELD)
        return answer


class GrammarChecks:
    """As many processes as are needed at once, few at most, the first one started by the first request."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]):
        self.tokenizer, self.vocab_size, self.eos_token_ids = tokenizer, vocab_size, sorted(eos_token_ids)
        self.idle: queue.LifoQueue[Checker | None] = queue.LifoQueue()
        for _ in range(MOST_PROCESSES):
            self.idle.put(None)
        self.known: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def check(self, params: StructuredOutputsParams) -> str:
        """The grammar that these parameters mean; call it off an event loop.

        Raises:
            InvalidRequest: they mean none, or one that is not supported or too complex; the message says why.
            Overloaded: too many are being checked.
        """
        return str(self._answer(_asked(params))["grammar"])

    def check_calls(
        self, rules: CallRules, form: str, start: str, text: StructuredOutputsParams | None
    ) -> tuple[str, tuple[str, ...]]:
        """The grammar of answers that call tools; and tools whose schemas cannot be obeyed, where no call is required.

        Args:
            form: the name of the format of calls.
            start: the state of that format in which the answer begins.
            text: what an answer must be that is no call.

        Raises:
            InvalidRequest, Overloaded: as `check`.
        """
        functions = [tool.get("function", tool) for tool in rules.tools]
        schemas = {function["name"]: function.get("parameters") for function in functions}
        asked: dict[str, Any] = {
            "format": form,
            "start": start,
            "required": rules.required,
            "single": rules.single,
            "tools": schemas,
            "text": None if text is None else _asked(text),
        }
        try:
            answer = self._answer(asked)
        except InvalidRequest:
            if rules.required:
                raise
            answer = self._answer({**asked, "tools": dict.fromkeys(schemas, LOOSE)})
            return str(answer["grammar"]), tuple(schemas)
        return str(answer["grammar"]), tuple(answer["loose"])

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps(asked)
        if (found := self.known.get(key)) is not None:
            return found
        try:
            checker = self.idle.get(timeout=QUEUE_S)
        except queue.Empty:
            raise Overloaded(
                f"other grammars are being checked; try again in {CHECK_S:g} s",
                retry_after_s=int(CHECK_S),
                scope="server",
                reason="grammars",
            ) from None
        try:
            checker = checker or Checker(self._first())
            found = checker.ask(asked, CHECK_S)
        finally:
            self.idle.put(checker if checker is not None and checker.close.alive else None)
        self._keep(key, found)
        return found

    def _first(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.to_json(),
            "vocab_size": self.vocab_size,
            "eos_token_ids": self.eos_token_ids,
        }

    def _keep(self, key: str, answer: dict[str, Any]) -> None:
        self.known[key] = answer
        while sum(len(k) + len(v["grammar"]) for k, v in self.known.copy().items()) > KEPT_CHARS:
            self.known.popitem(last=False)


def _asked(params: StructuredOutputsParams) -> dict[str, Any]:
    """What is not the default.

    Raises:
        InvalidRequest: it cannot be written as JSON.
    """
    given = {each.name: getattr(params, each.name) for each in fields(params)}
    try:
        asked = {name: value for name, value in given.items() if value not in (None, False)}
        json.dumps(asked).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{FIELD} cannot be written as JSON: {error}", param=FIELD) from None
    return asked


def _end(process: "subprocess.Popen[bytes]", sock: socket.socket) -> None:
    sock.close()
    process.kill()
    process.wait()
