"""This engine beside Transformers' `generate`, on this machine, in alternating rounds: one row for each workload.

    python benchmarks/against_transformers.py --rounds 3

Both run the same network with random weights in bfloat16. Transformers gets all requests as one padded batch, which
runs until the longest output is done; output tokens count only where they were asked for.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

SHAPE = {  # 0.6 billion parameters, as Qwen3-0.6B
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}


def requests(num: int, mean: int, spread: float = 0.0) -> list[str]:
    """Prompts and outputs of `mean` tokens on average, uniform within `spread` of it."""
    lengths = ["--input-len", str(mean), "--output-len", str(mean), "--random-range-ratio", str(spread)]
    return ["--num-prompts", str(num), *lengths]


WORKLOADS = {  # prompt and output lengths alike
    "1 x 64": requests(1, 64),
    "8 x 64": requests(8, 64),
    "32 x 16-240": requests(32, 128, 0.875),
    "32 x 32-480": requests(32, 256, 0.875),
    "64 x 16-240": requests(64, 128, 0.875),
}


def run(folder: Path, backend: str, workload: list[str]) -> dict[str, float]:
    """One process, so that neither backend inherits the other's memory or threads."""
    result = folder / "result.json"
    command = [
        sys.executable,
        "-m",
        "quire.cli.main",
        "bench",
        "throughput",
        str(folder),
        "--backend",
        backend,
    ]
    options = ["--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "2048"]
    subprocess.run(
        [*command, *options, *workload, "--output-json", str(result)], check=True, capture_output=True
    )
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="Workloads whose name begins so.")
    args = parser.parse_args()
    table = Table(
        "workload", "Transformers tok/s", "Quire tok/s", "ratio", "of the bound", "KV waste", title="Output"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SHAPE))
        for title, workload in WORKLOADS.items():
            if not title.startswith(args.only):
                continue
            rounds = [{b: run(folder, b, workload) for b in ("hf", "quire")} for _ in range(args.rounds)]
            speed = {b: [r[b]["output_tokens_per_second"] for r in rounds] for b in ("hf", "quire")}
            ratio = statistics.median(q / h for q, h in zip(speed["quire"], speed["hf"], strict=True))
            last = rounds[-1]["quire"]
            table.add_row(
                title,
                *(f"{statistics.median(s):.1f} ({min(s):.1f}-{max(s):.1f})" for s in speed.values()),
                f"{ratio:.2f}x",
                *(f"{last[key]:.1f} %" for key in ("bound_percent", "cache_waste_percent")),
            )
    Console().print(table)


if __name__ == "__main__":
    main()
