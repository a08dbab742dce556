"""Settings of every test: no network, this checkout in the processes that tests start, Triton without a GPU."""

import os
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # its kernels run on the CPU; to be said before the first import of it
    )
