"""What it takes for all engine groups in lockstep to begin a step: microseconds, p50 / p99.

    python benchmarks/ticks.py [--groups 2 4 8]

Groups are forked processes that compute nothing. Either all of them have a step, or the leader alone has one, and asks.
"""

import argparse
import os
import socket
import time

from quire.engine.ticks import Follower, FromFollower, Leader, ToFollower
from quire.engine.wire import Channel, Stop

NUM_TICKS = 2000


def follow(line: Follower, *, busy: bool) -> None:
    """The life of a group: it has a step each time, or none."""
    while True:
        if busy and line.num_turns < NUM_TICKS:
            line.turn(1)
        elif isinstance(line.receive(None), Stop):
            return
        elif line.wanted:
            line.turn(0)


def measure(num_groups: int, *, busy: bool) -> tuple[float, float]:
    """(p50, p99) of the leader's ticks, after a tenth of them that do not count."""
    frontend, ours = socket.socketpair()
    others, pids = list[Channel](), list[int]()
    for _ in range(1, num_groups):
        mine, theirs = socket.socketpair()
        pids.append(os.fork())
        if not pids[-1]:
            follow(Follower(Channel(theirs, incoming=ToFollower)), busy=busy)
            os._exit(0)
        theirs.close()
        others.append(Channel(mine, incoming=FromFollower))
    line, times = Leader(Channel(ours), others, 0), []
    for _ in range(NUM_TICKS):
        start = time.perf_counter()
        line.turn(1)
        times.append((time.perf_counter() - start) * 1e6)
    Channel(frontend).send(Stop())
    line.receive(None)
    for pid in pids:
        os.waitpid(pid, 0)
    times = sorted(times[NUM_TICKS // 10 :])
    return times[len(times) // 2], times[len(times) * 99 // 100]


def main() -> None:
    """Print a row for each number of groups."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8])
    print("| groups | all have a step | the leader alone has one |\n|---|---|---|")
    for num_groups in parser.parse_args().groups:
        cells = [measure(num_groups, busy=busy) for busy in (True, False)]
        print(f"| {num_groups} | " + " | ".join(f"{p50:.0f} / {p99:.0f}" for p50, p99 in cells) + " |")


if __name__ == "__main__":
    main()
