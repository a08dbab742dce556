"""`quire replay`: runs a recorded schedule again, and checks that every plan comes out the same."""

import argparse
import sys
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", type=Path, help="File that --trace-file wrote.")


def main(args: argparse.Namespace) -> int:
    from quire.scheduler.trace import replay

    sys.stdout.write(f"{replay(args.trace)} steps checked\n")
    return 0
