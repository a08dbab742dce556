"""`quire bench throughput|latency|serve|kernels`: how fast, and how near to what the machine could do.

Names as in vLLM.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli import bench_kernels, bench_serve
from quire.cli.options import add_config_options, config_options, whole
from quire.cli.starting import starting

if TYPE_CHECKING:
    import random

    from quire.cli.bound import Speed
    from quire.cli.workload import Backend, Shape, Workload

PERCENTILES = (10, 25, 50, 75, 90, 99)
WARMUP_LEN = 16


def add_options(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    throughput = kinds.add_parser("throughput", help="All requests at once.", allow_abbrev=False)
    _add_lengths(throughput, input_len=512, output_len=128)
    throughput.add_argument(
        "--num-prompts", type=whole, default=100, metavar="N", help="Requests (%(default)s)."
    )
    throughput.add_argument(
        "--n", type=whole, default=1, metavar="N", help="Outputs for each request (%(default)s)."
    )
    throughput.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="Lengths are uniform from (1 - R) to (1 + R) times the given ones (%(default)s).",
    )
    latency = kinds.add_parser("latency", help="One batch at a time.", allow_abbrev=False)
    _add_lengths(latency, input_len=32, output_len=128)
    latency.add_argument(
        "--batch-size", type=whole, default=8, metavar="N", help="Requests of a batch (%(default)s)."
    )
    latency.add_argument(
        "--num-iters", type=whole, default=30, metavar="N", help="Batches measured (%(default)s)."
    )
    latency.add_argument(
        "--num-iters-warmup", type=whole, default=10, metavar="N", help="Batches before these (%(default)s)."
    )
    serve = kinds.add_parser("serve", help="A server, over HTTP.", allow_abbrev=False)
    bench_serve.add_options(serve)
    kernels = kinds.add_parser("kernels", help="Products of few rows on a GPU.", allow_abbrev=False)
    bench_kernels.add_options(kernels)


def _add_lengths(parser: argparse.ArgumentParser, *, input_len: int, output_len: int) -> None:
    add_config_options(parser)
    parser.add_argument(
        "--backend",
        choices=("quire", "hf"),
        default="quire",
        help="hf: Transformers' generate, greedy, in padded batches, for comparison (%(default)s).",
    )
    parser.add_argument(
        "--hf-max-batch-size", type=whole, metavar="N", help="Requests of a padded batch; all if not given."
    )
    parser.add_argument(
        "--input-len", type=whole, default=input_len, metavar="N", help="Tokens of a prompt (%(default)s)."
    )
    parser.add_argument(
        "--output-len",
        type=whole,
        default=output_len,
        metavar="N",
        help="Tokens to generate for each (%(default)s).",
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="Write the results here, too.")


def main(args: argparse.Namespace) -> int:
    if args.kind == "serve":
        return bench_serve.main(args)
    if args.kind == "kernels":
        return bench_kernels.main(args)
    import random

    from quire.cli.workload import Shape

    shape = Shape(
        input_len=args.input_len,
        output_len=args.output_len,
        num_prompts=args.num_prompts if args.kind == "throughput" else args.batch_size,
        n=args.n if args.kind == "throughput" else 1,
        range_ratio=args.random_range_ratio if args.kind == "throughput" else 0.0,
    )
    chance = random.Random(args.seed if "seed" in args else 0)
    with _backend(args) as backend:
        from quire.cli.bound import measure_ranks  # loads torch

        speed = measure_ranks(backend.config)
        warmup = Shape(input_len=WARMUP_LEN, output_len=WARMUP_LEN, num_prompts=1)
        backend.run(warmup.draw(chance, backend.spec.vocab_size), show=False)
        run = _throughput if args.kind == "throughput" else _latency
        work, seconds, found = run(args, backend, shape, chance)
        speed = speed.best_of(measure_ranks(backend.config))
        found |= _compare(backend, work, seconds, speed)
    if args.output_json:
        args.output_json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


@starting()
def _backend(args: argparse.Namespace) -> "Backend":
    options = {"disable_log_stats": True, **config_options(args)}
    if args.backend == "hf":
        from quire.cli.hf import Transformers

        return Transformers(options, args.hf_max_batch_size)
    from quire.cli.workload import Quire

    return Quire(options)


def _throughput(
    args: argparse.Namespace, backend: "Backend", shape: "Shape", chance: "random.Random"
) -> tuple["Workload", float, dict[str, Any]]:
    work = shape.draw(chance, backend.spec.vocab_size)
    seconds = backend.run(work, show=True)
    requests, tokens, outputs = shape.num_prompts, work.num_tokens, work.num_output_tokens
    _say(
        f"Throughput: {requests / seconds:.2f} requests/s, {tokens / seconds:.2f} total tokens/s,"
        f" {outputs / seconds:.2f} output tokens/s"
    )
    _say(f"Total num prompt tokens:  {sum(work.input_lens)}")
    _say(f"Total num output tokens:  {outputs}")
    return (
        work,
        seconds,
        {
            "elapsed_time": seconds,
            "num_requests": requests,
            "total_num_tokens": tokens,
            "requests_per_second": requests / seconds,
            "tokens_per_second": tokens / seconds,
            "output_tokens_per_second": outputs / seconds,
        },
    )


def _latency(
    args: argparse.Namespace, backend: "Backend", shape: "Shape", chance: "random.Random"
) -> tuple["Workload", float, dict[str, Any]]:
    import numpy as np

    def draw() -> "Workload":  # new prompts each time: nothing is found in the prefix cache
        return shape.draw(chance, backend.spec.vocab_size)

    for _ in range(args.num_iters_warmup):
        backend.run(draw(), show=False)
    latencies = [backend.run(draw(), show=False) for _ in range(args.num_iters)]
    average = float(np.mean(latencies))
    percentiles = dict(
        zip(map(str, PERCENTILES), np.percentile(latencies, PERCENTILES).tolist(), strict=True)
    )
    _say(f"Avg latency: {average:.4f} seconds")
    for percent, seconds in percentiles.items():
        _say(f"{percent}% percentile latency: {seconds:.4f} seconds")
    return draw(), average, {"avg_latency": average, "latencies": latencies, "percentiles": percentiles}


def _compare(backend: "Backend", work: "Workload", seconds: float, speed: "Speed") -> dict[str, Any]:
    from quire.cli.bound import Needs, bound_s
    from quire.models.spec import Foreign
    from quire.resolve import ITEM_BYTES

    config = backend.config
    found: dict[str, Any] = {
        "backend": type(backend).__name__,
        "model": config.model,
        "dtype": config.dtype,
    }
    if config.block_size:
        waste = found["cache_waste_percent"] = 100 * work.cache_waste(config.block_size)
        _say(f"KV cache waste: {waste:.1f} % (the ends of last blocks of {config.block_size} tokens)")
    if config.quantization != "auto":
        _say(f"No bound is known for {config.quantization}: how fast this machine multiplies is not measured")
        return found
    if config.kv_cache_dtype != "auto":
        _say(
            f"No bound is known for a cache of {config.kv_cache_dtype}: how fast it can be read is not measured"
        )
        return found
    if isinstance(backend.spec, Foreign):
        _say(
            "No bound is known for Transformers' modules: what they multiply for a token is their own business"
        )
        return found
    needs = Needs(backend.spec, ITEM_BYTES[config.dtype])
    least = bound_s(speed, needs, work.input_lens, work.output_lens, work.n)
    found |= {
        "bytes_per_second": speed.bytes_per_s,
        "flops_per_second": speed.flops_per_s,
        "bound_time": least,
        "bound_percent": 100 * least / seconds,
    }
    _say(
        f"This machine reads {speed.bytes_per_s / 1e9:.1f} GB/s and computes"
        f" {speed.flops_per_s / 1e12:.2f} TFLOP/s in {config.dtype}. At best this takes {least:.3g} s;"
        f" {100 * least / seconds:.1f} % of that was reached"
    )
    return found


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
