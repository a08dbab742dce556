"""How fast a model is ready on a GPU: weights from the page cache in GB/s, and seconds to the first token.

    python benchmarks/gpu/start.py [--models 8B 0.6B] [--rounds 2]

Random weights in the shapes of a published network are written to a temporary folder (16 GB for 8B) and
loaded from the page cache. Seconds to the first token are those of a fresh interpreter (import, LLM(...),
one token), with dummy weights and with the checkpoint, each with an empty folder of compiled kernels and with the one
that this leaves behind.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.shapes import SHAPES  # noqa: E402
from quire.attention.triton.backend import Triton  # noqa: E402
from quire.checkpoint.dummy import DummyCheckpoint  # noqa: E402
from quire.checkpoint.reader import Checkpoint  # noqa: E402
from quire.layers.decoder import Decoder  # noqa: E402
from quire.models.names import Names  # noqa: E402
from quire.models.parameters import parameter_shapes  # noqa: E402
from quire.models.registry import decoder_spec  # noqa: E402
from quire.models.spec import Decoder as DecoderSpec  # noqa: E402

SHARD_BYTES = 4 * 2**30
FIRST_TOKEN = """
import sys, time
from quire import LLM, SamplingParams
from benchmarks.gpu.shapes import kernels_compiled
with LLM(sys.argv[1], load_format=sys.argv[2], device="cuda", skip_tokenizer_init=True, max_model_len=4096) as llm:
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    print(time.time())
    kernels_compiled()  # for the next start
"""


def write(folder: Path, spec: DecoderSpec) -> int:
    """Our own names, in files of about 4 GiB; returns the bytes."""
    dummy, shard, size, total, number = DummyCheckpoint(0), {}, 0, 0, 0
    for name, shape in parameter_shapes(spec):
        shard[name] = dummy.tensor(name, shape=shape)
        size += shard[name].nbytes
        if size > SHARD_BYTES:
            save_file(shard, folder / f"{number:03}.safetensors")
            shard, total, size, number = {}, total + size, 0, number + 1
    save_file(shard, folder / f"{number:03}.safetensors")
    return total + size


def load_s(folder: Path, spec: DecoderSpec) -> float:
    """Seconds from open files to weights on the device."""
    model = Decoder(spec, backend=Triton(), dtype=torch.bfloat16, device="cuda", max_length=4096)
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.load(Checkpoint(folder, Names()))
    torch.cuda.synchronize()
    return time.perf_counter() - start


def first_token_s(folder: Path, load_format: str, kernels: str) -> float:
    """Seconds of a fresh interpreter until it has one token; it stays until all kernels are compiled."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.time()
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_TOKEN, str(folder), load_format],
        env={**os.environ, "TRITON_CACHE_DIR": kernels, "PYTHONPATH": path},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(ended.stdout.split()[-1]) - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["8B"])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    for model in args.models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            spec, _ = decoder_spec(SHAPES[model])
            num_bytes = write(folder, spec)
            (folder / "config.json").write_text(json.dumps(SHAPES[model]))
            for _ in range(args.rounds):
                seconds = load_s(folder, spec)
                rate = num_bytes / seconds / 1e9
                print(f"{model}: {num_bytes / 1e9:.2f} GB in {seconds:.2f} s = {rate:.1f} GB/s", flush=True)
            torch.cuda.empty_cache()
            for load_format in ("dummy", "auto"):
                with tempfile.TemporaryDirectory() as kernels:
                    for cache in ("empty", *["warm"] * args.rounds):
                        seconds = first_token_s(folder, load_format, kernels)
                        print(f"{model}, {load_format} weights, {cache} kernels: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
