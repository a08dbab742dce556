"""Loads the C++ kernels: one shared library with a plain C ABI, called through ctypes.

torch is imported first, so that the library shares torch's OpenMP runtime and its threads.
"""

import ctypes
import functools
import platform
from pathlib import Path

import torch  # noqa: F401  (before the library: see above)

from quire.log import logger

ABI = 20  # as quire_abi() in isa.cpp says: raise both when a function's arguments change or mean more
BASELINE = 0  # of `isa`: nothing that every machine has not
TESTED = ("x86_64", "AMD64")  # architectures; on others the portable kernels run


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why there is none."""
    files = sorted(Path(__file__).parent.glob("quire_cpu*.so"), key=lambda path: path.stat().st_mtime)
    if not files:
        return None, "the C++ kernels were not built; install a C++ compiler and reinstall quire"
    newest = files[-1]
    try:
        found = ctypes.CDLL(str(newest))
        abi = found.quire_abi()
    except (OSError, AttributeError) as error:
        return None, f"{newest.name} cannot be loaded ({error}); reinstall quire"
    if abi != ABI:
        return None, f"{newest.name} was built from another version of the sources; reinstall quire"
    return found, ""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None. What is lost then is logged, once, and so is where nobody has tested it."""
    found, reason = load()
    if found is None:
        logger.warning(
            "the CPU kernels are missing and plain torch runs instead, several times slower: %s", reason
        )
    elif (here := platform.machine()) not in TESTED:
        logger.warning(
            "the CPU kernels are the portable ones, which are untested on this architecture, %s", here
        )
    return found


@functools.cache
def isa() -> int:
    """The best instruction set here: 0 baseline, 1 AVX2, 2 AVX-512, 3 with bf16 and VNNI, 4 AMX (isa.h)."""
    found, _ = load()
    return 0 if found is None else found.quire_isa()
