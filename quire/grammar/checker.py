"""The life of a process that checks grammars for another one, which kills it when one takes too long.

It may have so much memory beyond what the tokenizer takes, and ends when its socket closes. Knows no requests.
"""

import json
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import llguidance

from quire.errors import InvalidRequest
from quire.grammar.calls import LOOSE, CallGrammar, either
from quire.grammar.compiling import Vocabulary, masks, special_tokens, too_complex
from quire.grammar.source import grammar_of, read_schema, within
from quire.text.tools.registry import tool_format

MEMORY_BYTES = 512 * 2**20
NO_SCHEMA = (TypeError, AttributeError, ValueError, KeyError, RecursionError)  # what reading one may end in
TRY_TOKENS = 64  # as many steps are tried as most grammars need to show what they cost


def main(descriptor: str) -> None:
    """Lines of JSON in and out: the tokenizer first, then what is asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(descriptor)) as sock, sock.makefile("rw", encoding="utf-8") as lines:
        vocabulary: Vocabulary | None = None
        specials: Mapping[str, int | None] = {}
        for line in lines:
            asked = json.loads(line)
            try:
                if vocabulary is None:
                    vocabulary = Vocabulary(asked["tokenizer"], asked["vocab_size"], asked["eos_token_ids"])
                    _limit_memory()
                    specials = special_tokens(vocabulary, asked["tokenizer"])
                    _say(lines, grammar="")
                elif "format" in asked:
                    _say(lines, **_calls(vocabulary, specials, asked))
                else:
                    _say(lines, grammar=_tried(vocabulary, grammar_of(asked)))
            except InvalidRequest as error:
                _say(lines, error=str(error), param=error.param)
            except MemoryError:
                _say(
                    lines, error="it takes too much memory to check; simplify it", param="structured_outputs"
                )


def _say(lines: IO[str], **answer: Any) -> None:
    lines.write(json.dumps(answer) + "\n")
    lines.flush()


def _calls(
    vocabulary: Vocabulary, specials: Mapping[str, int | None], asked: dict[str, Any]
) -> dict[str, Any]:
    """The grammar of answers that call tools, each of which is tried by itself, to know whose schema is at fault."""
    form = tool_format(asked["format"], ())
    if form is None:
        raise InvalidRequest("this model's calls are of no known format", param="tools")
    tools, loose = dict[str, Any](), list[str]()
    for name, given in asked["tools"].items():
        try:
            tools[name] = read_schema(given)
            one = CallGrammar(form, {name: tools[name]}, specials, required=True, single=True)
            _tried(vocabulary, one.source("start"))
        except (InvalidRequest, MemoryError, *NO_SCHEMA) as error:
            if asked["required"]:
                says = (
                    str(error) if isinstance(error, InvalidRequest) else f"no schema: {type(error).__name__}"
                )
                raise InvalidRequest(f"parameters of {name[:100]!r}: {says}", param="tools") from None
            tools[name] = LOOSE
            loose.append(name)
    required = asked["required"] or asked["text"] is not None
    rules = CallGrammar(form, tools, specials, required=required, single=asked["single"])
    grammar = within(rules.source(asked["start"]), "tools")
    if asked["text"] is not None and not asked["required"]:
        grammar = either(grammar, grammar_of(asked["text"]), form)
    return {"grammar": _tried(vocabulary, grammar), "loose": loose}


def _tried(vocabulary: Vocabulary, grammar: str) -> str:
    """The same, of which a text has been begun as an engine would."""
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
