"""Checkpoints with random weights for comparisons on a CPU, and the same networks as llama.cpp's GGUF files.

    python benchmarks/cpu/networks.py FOLDER [--networks Qwen3-0.6B Llama-3.2-1B]
    python benchmarks/cpu/networks.py FOLDER --llama-cpp SOURCE --build BUILD [--python PYTHON]

FOLDER gets a Hugging Face checkpoint for each network, 1.2 and 2.5 GB, with the demo model's tokenizer. Tokens that it
lacks, or that are not text, are all but never chosen, so that servers have text to stream. With --llama-cpp, GGUF files
come beside them, 2.6 and 5.4 GB, each made only if it is missing. SOURCE is llama.cpp's source: its repository, or
vendor/llama.cpp in the source distribution of the package llama-cpp-python. BUILD is where it was built:

    cmake -S SOURCE -B BUILD -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF
    cmake --build BUILD --target llama-bench llama-batched-bench llama-server llama-quantize

SOURCE/convert_hf_to_gguf.py is run by PYTHON, which needs torch, transformers and sentencepiece; this one if not given.
It knows tokenizers by a hash, and stops at others; here it is told that this one splits text as Qwen 2's does, which is
so.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.shapes import SHAPES  # noqa: E402

NETWORKS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": SHAPES["0.6B"],
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PAD, END = 0, 2  # of the demo model's tokenizer
FAINT = 0.01
GGUF_TYPES = ("bf16", "Q8_0", "Q4_0", "Q4_K_M")
CONVERT = """
import runpy, sys
source, *sys.argv = sys.argv[1:]
sys.path[:0] = [source, source + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write(folder: Path, network: str) -> None:
    """config.json, model.safetensors, and the tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    config = NETWORKS[network] | {"bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER:
        shutil.copy(ROOT / "quire" / "demo" / name, folder)
    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = (tokenizer.decode([token]) for token in range(config["vocab_size"]))
    silent = [i for i, text in enumerate(texts) if not (text.isascii() and any(map(str.isalpha, text)))]
    with torch.no_grad():
        model.get_input_embeddings().weight[silent] *= FAINT  # the head's, too: both networks tie them
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # keys that all readers know


def gguf(folder: Path, network: str, kind: str) -> Path:
    """Where a network's file of this type is, beside its checkpoint."""
    return folder / f"{network}-{kind}.gguf"


def convert(folder: Path, network: str, args: argparse.Namespace) -> None:
    """The checkpoint as it is, and from that what llama.cpp quantizes."""
    source, quantize = args.llama_cpp.resolve(), args.build.resolve() / "bin" / "llama-quantize"
    plain, *others = (gguf(folder, network, kind) for kind in GGUF_TYPES)
    if not plain.exists():
        script = source / "convert_hf_to_gguf.py"
        words = [args.python, "-c", CONVERT, source, script, folder / network, "--outtype", "bf16"]
        make(plain, [*words, "--outfile"])
    for kind, path in zip(GGUF_TYPES[1:], others, strict=True):
        if not path.exists():
            make(path, [quantize, plain], kind)


def make(path: Path, before: Sequence[str | Path], *after: str) -> None:
    """Run a command that writes the file named between these words; it appears at `path` when it is complete."""
    part = path.with_suffix(".part")
    command = [*before, part, *after]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        raise RuntimeError(f"{path.name} was not made: {ended.stdout[-2000:]}")
    part.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--llama-cpp", type=Path, metavar="SOURCE")
    parser.add_argument("--build", type=Path, metavar="BUILD")
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    if (args.llama_cpp is None) != (args.build is None):
        parser.error("GGUF files need both: --llama-cpp, which converts, and --build, which quantizes")
    for network in args.networks:
        if not (args.folder / network / "model.safetensors").exists():
            write(args.folder / network, network)
        if args.llama_cpp is not None:
            convert(args.folder, network, args)
        print(f"{args.folder / network} is ready", flush=True)


if __name__ == "__main__":
    main()
