"""`quire demo`: `quire chat` with the small model that comes with Quire; or one question, answered."""

import argparse

from quire.cli import chat

ABOUT = """\
A small model that comes with Quire. It says so when it does not know. Ask it:
  What is the capital of France?    What is 47 + 38?    Spell the word garden.
  Tell me a story about a fox.      My name is Ada. (Then: What is my name?)"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="Answer this, and end.")
    chat.add_options(parser, model="demo")


def main(args: argparse.Namespace) -> int:
    return chat.talk(args, [args.question] if args.question else chat.listen(f"{ABOUT}\n{chat.HELP}"))
