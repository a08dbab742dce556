"""Where compiled kernels are kept: which folder, and that it can be written. By content, as Triton does it."""

import os
import stat
import tempfile
from pathlib import Path

from triton import knobs

from quire.log import logger, warn_once


def keep_kernels() -> Path:
    """Make sure that compiled kernels can be written, and return the folder.

    It is Triton's own (TRITON_CACHE_DIR, else below the home directory) unless that is read-only, as in many
    containers: then one of this user's among temporary files, because Triton would fail at the first kernel.
    """
    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        other = _temporary()
        warn_once(
            logger,
            f"{folder} cannot be written ({error.strerror}), so compiled kernels are kept in {other}; "
            "set TRITON_CACHE_DIR to a folder that lasts to start faster",
        )
    knobs.cache.dir = str(other)  # and in the environment, for processes to come
    return other


def _temporary() -> Path:
    """A folder that nobody else can write, since what lies there is run; the same at the next start if it can be."""
    folder = Path(tempfile.gettempdir(), f"quire-kernels-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if private else Path(tempfile.mkdtemp(prefix="quire-kernels-"))
