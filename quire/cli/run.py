"""`quire run`: one prompt, completed as it streams."""

import argparse
import sys
import time

from quire.cli.options import add_config_options, add_sampling_options, config_options, sampling_options
from quire.cli.starting import starting

MAX_TOKENS = 256


def add_options(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    parser.add_argument(
        "prompt", metavar="PROMPT", help='Text to complete; "-" reads it from standard input.'
    )
    add_sampling_options(parser, max_tokens=MAX_TOKENS)


def main(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with starting():
        from quire.cli.terminal import write_stream
        from quire.llm import LLM

        llm = LLM(**{"disable_log_stats": True, **config_options(args)})
    with llm:
        ready = time.perf_counter()
        text, stats = write_stream(llm, prompt, sampling_options(args))
        sys.stdout.write("" if text.endswith("\n") else "\n")
        sys.stdout.flush()
        sys.stderr.write(f"{stats}, ready after {ready - start:.2f} s\n")
    return 0
