"""The life of a process that checks grammars for another one, which kills it when one takes too long.

It may have so much memory beyond what the tokenizer takes, and ends when its socket closes. Knows no requests.
"""

import json
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import IO, Any

import llguidance

from quire.errors import InvalidRequest
from quire.grammar.compiling import Vocabulary, masks, too_complex
from quire.grammar.source import grammar_of

MEMORY_BYTES = 512 * 2**20
TRY_TOKENS = 64  # as many steps are tried as most grammars need to show what they cost


def main(descriptor: str) -> None:
    """Lines of JSON in and out: the tokenizer first, then what is asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(descriptor)) as sock, sock.makefile("rw", encoding="utf-8") as lines:
        vocabulary: Vocabulary | None = None
        for line in lines:
            asked = json.loads(line)
            try:
                if vocabulary is None:
                    vocabulary = Vocabulary(asked["tokenizer"], asked["vocab_size"], asked["eos_token_ids"])
                    _limit_memory()
                    _say(lines, grammar="")
                else:
                    _say(lines, grammar=_checked(vocabulary, asked))
            except InvalidRequest as error:
                _say(lines, error=str(error), param=error.param)
            except MemoryError:
                _say(
                    lines, error="it takes too much memory to check; simplify it", param="structured_outputs"
                )


def _say(lines: IO[str], **answer: Any) -> None:
    lines.write(json.dumps(answer) + "\n")
    lines.flush()


def _checked(vocabulary: Vocabulary, asked: dict[str, Any]) -> str:
    """The grammar, of which a text has been begun as an engine would."""
    grammar = grammar_of(asked)
    matcher, executor = vocabulary.matcher(grammar), llguidance.LLExecutor(1)
    for _ in range(TRY_TOKENS):
        words = masks(executor, [matcher], vocabulary.num_words)
        if matcher.is_error():
            raise InvalidRequest(too_complex(matcher), param="structured_outputs")
        if matcher.is_stopped() or not words.any():
            break
        word = int(words[0].nonzero()[0][-1])
        bits = int(words[0, word]) & 0xFFFFFFFF
        matcher.consume_token(word * 32 + bits.bit_length() - 1)
    return grammar


def _limit_memory() -> None:
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
