"""`quire bench kernels`: products of few rows with a network's weights on this GPU, beside cuBLAS; `--tune` them.

Of a network with experts, these: any number of rows, and no cuBLAS, which has no such product.
"""

import argparse
import functools
import importlib.util
import sys
from typing import TYPE_CHECKING, NamedTuple

from quire.cli.options import whole
from quire.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from quire.kernels.triton.tuner import Case
    from quire.models.spec import Attention, Decoder

DTYPES = ("bfloat16", "float16", "float32")


class Sizes(NamedTuple):
    """Of a layer, and of the head. Without heads, attention is of another kind, whose products are left out."""

    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    num_experts: int = 0
    top_k: int = 0  # experts of a token


SIZES = {
    "llama-8b": Sizes(4096, 14336, 32, 8, 128, 128256),
    "qwen3-0.6b": Sizes(1024, 3072, 16, 8, 128, 151936),
    "qwen3-30b-a3b": Sizes(2048, 768, 32, 4, 128, 151936, 128, 8),
    "mixtral-8x7b": Sizes(4096, 14336, 32, 8, 128, 32000, 8, 2),
    "deepseek-v3": Sizes(7168, 2048, 0, 0, 0, 129280, 256, 8),
}
MOST_ROWS, MOST_MIXTURE_ROWS = 64, 16384


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="llama-8b",
        help=f"Folder or Hugging Face id, or the sizes of {', '.join(SIZES)} (%(default)s).",
    )
    parser.add_argument("--revision", metavar="X", help="Branch, tag or commit of Hugging Face ids.")
    parser.add_argument(
        "--rows",
        type=whole,
        nargs="+",
        default=[1, 8, 16, 32, 64],
        metavar="N",
        help="Rows to multiply, 64 at most unless experts share them (1 8 16 32 64).",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(%(default)s)")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="Time all tiles and keep the fastest, in the package's own table.",
    )


def main(args: argparse.Namespace) -> int:
    _check(args)
    import torch

    from quire.kernels.triton.tuner import read_bytes_per_s

    speed = read_bytes_per_s()
    found = torch.cuda.get_device_name()
    _say(f"{args.model} in {args.dtype} on {found}, which reads {speed / 1e12:.2f} TB/s")
    sizes = SIZES.get(args.model) or _sizes(args)
    most = MOST_MIXTURE_ROWS if sizes.num_experts else MOST_ROWS
    if not all(1 <= rows <= most for rows in args.rows):
        raise ConfigError(f"--rows is {args.rows}; for {args.model} they must be from 1 to {most}")
    few = [rows for rows in args.rows if rows <= MOST_ROWS]
    _dense(args, cases_of(sizes), few, speed)
    if sizes.num_experts:
        _mixture(args, sizes, speed)
    return 0


def _dense(args: argparse.Namespace, cases: "list[Case]", few: list[int], speed: float) -> None:
    """Products of few rows, each beside cuBLAS's."""
    import torch

    from quire.kernels.triton.tuner import Bench

    dtype = getattr(torch, args.dtype)
    if args.tune:
        _tune(cases, few, dtype)
    _say(
        f"{'':10}{'outputs':>8} {'inputs':>7} {'rows':>5} {'us':>8} {'TB/s':>6} {'of read':>8} {'cuBLAS us':>10}"
    )
    for case in cases:
        for rows in few:
            bench = Bench(case, rows, dtype, torch.device("cuda"))
            ours, cublas = bench.ours(), bench.cublas()
            rate = case.num_weights * dtype.itemsize / ours
            _say(
                f"{case.name:10}{case.outputs:8} {case.inputs:7} {rows:5} {ours * 1e6:8.2f} {rate / 1e12:6.2f}"
                f" {rate / speed:8.1%} {cublas * 1e6:10.2f}"
            )
            del bench


def _mixture(args: argparse.Namespace, sizes: Sizes, speed: float) -> None:
    """A layer's experts, from routes to the sum and its norm, and each of their products with `--tune`."""
    import torch

    from quire.kernels.triton.expert_tiles import read_expert_table, write_expert_table
    from quire.kernels.triton.expert_tuner import ExpertBench, Mixture
    from quire.kernels.triton.tuner import compile_all

    mixture = Mixture(sizes.dim, sizes.hidden, sizes.num_experts, sizes.top_k)
    dtype = getattr(torch, args.dtype)
    if args.tune:
        compile_all([functools.partial(ExpertBench, mixture, rows, dtype) for rows in args.rows])
    lines = []
    for rows in args.rows:
        bench = ExpertBench(mixture, rows, dtype, torch.device("cuda"))
        for product in bench.products() if args.tune else ():
            tile, best, before = bench.best(product)
            # Each one is written, so that nothing measured is lost.
            write_expert_table(dict(read_expert_table()) | {product: tile})
            name = "up" if product.gated else "down"
            _say(f"{name:10}{rows:5} rows: {tuple(tile)} {best * 1e6:.2f} us, before {before * 1e6:.2f}")
        spent, touched = bench.whole(), bench.touched_bytes()
        rate = touched / spent
        lines.append(
            f"{rows:6} {bench.rows:9} {touched / 1e6:9.1f} {spent * 1e6:9.2f} {rate / 1e12:6.2f} {rate / speed:8.1%}"
        )
        del bench
    _say(f"{'rows':>6} {'of a tile':>9} {'MB':>9} {'us':>9} {'TB/s':>6} {'of read':>8}")
    for line in lines:
        _say(line)


def cases_of(sizes: Sizes) -> "list[Case]":
    """A layer's products but those of experts, and the head's."""
    from quire.kernels.triton.tuner import Case

    dim, width = sizes.dim, sizes.heads * sizes.head_dim
    cases = []
    if sizes.heads:
        cases = [Case("qkv", width + 2 * sizes.kv_heads * sizes.head_dim, dim, "normed")]
        cases.append(Case("out", dim, width, "added"))
    if sizes.num_experts:
        cases.append(Case("router", sizes.num_experts, dim, "normed"))
    else:
        cases += [Case("gate, up", sizes.hidden, dim, "gated"), Case("down", dim, sizes.hidden, "added")]
    return [*cases, Case("head", sizes.vocab, dim, "logits")]


def _check(args: argparse.Namespace) -> None:
    import torch

    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "bench kernels measures Triton's kernels, and triton is missing; pip install triton"
        )
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise ConfigError("bench kernels measures a GPU, and torch finds no CUDA GPU here")


def _sizes(args: argparse.Namespace) -> Sizes:
    """Those of the first layer that is dense; else of the first with experts."""
    from quire.checkpoint.files import read_config
    from quire.checkpoint.source import resolve
    from quire.models.registry import decoder_spec
    from quire.models.spec import MLP, Attention, MoE

    spec: Decoder = decoder_spec(read_config(resolve(args.model, args.revision, weights=False).folder))[0]
    for block in spec.blocks:
        if isinstance(block.mixer, Attention) and isinstance(block.mlp, MLP) and block.mlp.gated:
            return Sizes(spec.dim, block.mlp.hidden, *_heads(block.mixer), spec.vocab_size)
    for block in spec.blocks:
        if isinstance(block.mlp, MoE) and block.mlp.expert.gated:
            heads = _heads(block.mixer) if isinstance(block.mixer, Attention) else (0, 0, 0)
            experts = (block.mlp.num_experts, block.mlp.top_k)
            return Sizes(spec.dim, block.mlp.expert.hidden, *heads, spec.vocab_size, *experts)
    raise ConfigError(f"{args.model} has no layer with gates, whose products these kernels are for")


def _heads(mixer: "Attention") -> tuple[int, int, int]:
    return mixer.num_heads, mixer.num_kv_heads, mixer.head_dim


def _tune(cases: "list[Case]", few: list[int], dtype: "torch.dtype") -> None:
    import torch

    from quire.kernels.triton.tiles import read_table, write_table
    from quire.kernels.triton.tuner import Bench, compile_all

    table = dict(read_table())
    compile_all([functools.partial(Bench, case, rows, dtype) for case in cases for rows in few])
    for case in cases:
        for rows in few:
            bench = Bench(case, rows, dtype, torch.device("cuda"))
            tile, best, before = bench.best()
            table[bench.product] = tile
            write_table(table)  # each one, so that nothing measured is lost
            _say(f"{case.name:10}{rows:5} rows: {tuple(tile)} {best * 1e6:.2f} us, before {before * 1e6:.2f}")
            del bench


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
