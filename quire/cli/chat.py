"""`quire chat`: a conversation in the terminal; or over a pipe, one line for each of the user's turns."""

import argparse
import sys
from collections.abc import Iterable, Iterator

from quire.cli.options import add_config_options, add_sampling_options, config_options, sampling_options
from quire.cli.starting import starting

MAX_TOKENS, REFUSED = 1024, 2
HELP = "/reset forgets the conversation, /quit ends it."


def add_options(parser: argparse.ArgumentParser, *, model: str | None = None) -> None:
    parser.epilog = HELP
    add_config_options(parser, model=model)
    parser.add_argument("--system", metavar="TEXT", help="What the model is told before the conversation.")
    add_sampling_options(parser, max_tokens=MAX_TOKENS)


def main(args: argparse.Namespace) -> int:
    return talk(args, listen(HELP))


def talk(args: argparse.Namespace, turns: Iterable[str]) -> int:
    """Answer each of the user's turns, with what was said before in mind; returns 2 if the last one was refused."""
    with starting():
        from rich.console import Console

        from quire.cli.terminal import write_stream
        from quire.errors import InvalidRequest
        from quire.llm import LLM

        llm = LLM(**{"disable_log_stats": True, **config_options(args)})
    screen = Console(stderr=True, highlight=False)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages, code = list(opening), 0
    with llm:
        for words in turns:
            if words == "/reset":
                messages = list(opening)
            if not words or words == "/reset":
                continue
            messages.append({"role": "user", "content": words})
            try:
                prompt = llm.engine.inputs.chat_prompt(messages, None, add_generation_prompt=True)
                answer, stats = write_stream(llm, prompt, sampling_options(args), chat=True)
            except InvalidRequest as error:  # a conversation that has become too long, for example
                messages.pop()
                screen.print(f"error: {error}", markup=False, style="red")
                code = REFUSED
                continue
            code = 0
            messages.append({"role": "assistant", "content": answer})
            sys.stdout.write("\n")
            sys.stdout.flush()
            screen.print(f"[dim]{stats}[/dim]")
    return code


def listen(greeting: str) -> Iterator[str]:
    """The user's turns, until there are no more; on a terminal `greeting` comes before the first."""
    from rich.console import Console

    screen = Console(stderr=True, highlight=False)
    if sys.stdin.isatty():
        screen.print(greeting, style="dim", markup=False)
    while True:
        try:
            words = screen.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if words.strip() == "/quit":
            return
        yield words.strip()
