"""Settings of every test: no network, this checkout in the processes that tests start, Triton without a GPU."""

import os
import signal
from pathlib import Path

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # before torch: two processes with two threads each wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# A shell's background job ignores it, and so would the servers that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # its kernels run on the CPU; to be said before the first import of it
    )


@pytest.fixture(params=["shared memory", "gloo"])
def way(request: pytest.FixtureRequest) -> str:
    """How ranks on CPUs exchange tensors."""
    from quire.parallel import shared_memory
    from quire.parallel.mesh import Mesh

    if request.param == "shared memory" and (reason := shared_memory.why_not(Mesh(tp=2))):
        pytest.skip(reason)
    return str(request.param)
