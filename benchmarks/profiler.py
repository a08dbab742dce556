"""Where a process's CPU time goes, by sampling: a signal after each millisecond of it. For benchmarks only."""

import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SAMPLE_S = 1e-3
SHOWN = 25


@contextmanager
def sampled(*, show: bool = True) -> Iterator[None]:
    """Prints, at the end, the functions that were seen most: themselves, and with all that they call."""
    if not show:
        yield
        return
    alone: Counter[str] = Counter()
    within: Counter[str] = Counter()

    def look(_: int, frame: FrameType | None) -> None:
        seen, first = set(), True
        while frame is not None:
            code = frame.f_code
            name = f"{Path(code.co_filename).stem}.{code.co_qualname}"
            if first:
                alone[f"{name}:{frame.f_lineno}"] += 1
                first = False
            seen.add(name)
            frame = frame.f_back
        within.update(seen)

    signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, SAMPLE_S, SAMPLE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        total = max(alone.total(), 1)
        lines = [f"{100 * count / total:5.1f} %  {name}" for name, count in within.most_common(SHOWN)]
        lines += ["", "by line, without what it calls in Python:"]
        lines += [f"{100 * count / total:5.1f} %  {name}" for name, count in alone.most_common(SHOWN)]
        sys.stdout.write("\n".join(["", "of the frontend's CPU time:", *lines, ""]))
