"""One logger, one format, to stderr. `QUIRE_LOG_LEVEL` sets the level; an application's own set-up wins."""

import functools
import logging
import os
from typing import Final

FORMAT = "%(levelname).1s %(asctime)s %(message)s"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def _configured() -> logging.Logger:
    level = os.environ.get("QUIRE_LOG_LEVEL", "INFO").upper()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, "%H:%M:%S"))
    handler.addFilter(lambda record: not logging.getLogger().handlers)  # else each line would come twice
    log = logging.getLogger("quire")
    log.setLevel(level if level in LEVELS else "INFO")
    log.addHandler(handler)
    if level not in LEVELS:  # errors are reported through here, so this one is not raised
        log.warning("QUIRE_LOG_LEVEL is %r; it must be one of %s; INFO is used", level, ", ".join(LEVELS))
    return log


logger: Final = _configured()


@functools.lru_cache(maxsize=1024)  # bounded, because messages may hold values that users send
def warn_once(log: logging.Logger, message: str) -> None:
    """Warns the first time this message comes."""
    log.warning(message)
