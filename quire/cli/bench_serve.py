"""`quire bench serve`: a server measured from outside, over HTTP. Options, table and JSON as vLLM's.

Loads no torch. Works with any server of OpenAI's API.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.options import json_object, whole
from quire.errors import ConfigError, RequestFailed

if TYPE_CHECKING:
    import random

    from quire.cli.calls import Api, Question
    from quire.cli.client import Client
    from quire.cli.prompts import Maker
    from quire.cli.report import Timed

PATHS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
FILES = ("custom", "sharegpt")
DATASETS = ("random", "prefix_repetition", *FILES)
LEAST = {
    "num_prompts": 1,
    "max_concurrency": 1,
    "num_warmups": 0,
    "random_prefix_len": 0,
    "prefix_repetition_prefix_len": 1,
    "sharegpt_output_len": 1,
}
MAX_ERRORS_SHOWN = 5
MAX_FILES = 65_536
BUSY = 0.8  # of the time: above, the client itself may be what is measured


def add_options(parser: argparse.ArgumentParser) -> None:
    _add_server(parser.add_argument_group("server"))
    _add_prompts(parser.add_argument_group("prompts"))
    _add_load(parser.add_argument_group("load"))
    _add_report(parser.add_argument_group("report"))


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--backend", choices=PATHS, default="openai", help="Which API (%(default)s).")
    group.add_argument("--base-url", metavar="URL", help="Address, instead of host and port.")
    group.add_argument("--host", default="127.0.0.1", metavar="X", help="(%(default)s)")
    group.add_argument("--port", type=whole, default=8000, metavar="N", help="(%(default)s)")
    group.add_argument("--endpoint", metavar="PATH", help="Path; that of the API if not given.")
    group.add_argument("--model", metavar="NAME", help="As the server calls it; its first one if not given.")
    group.add_argument("--served-model-name", metavar="NAME", help="The same; wins over --model.")
    group.add_argument(
        "--tokenizer", metavar="MODEL", help="Counts tokens here, instead of the server: a folder or a name."
    )
    group.add_argument(
        "--header",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="Sent with each request.",
    )
    group.add_argument("--extra-body", type=json_object, default={}, metavar="JSON", help="Fields to add.")
    for name in SAMPLING:
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=whole if name == "top_k" else float,
            metavar="N",
            help="Sent if given.",
        )
    group.add_argument("--ignore-eos", action="store_true", help="Do not end before all tokens are made.")


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset-name", choices=DATASETS, default="random", help="(%(default)s)")
    group.add_argument(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help='custom: {"prompt": ...} in each line; sharegpt: its JSON.',
    )
    group.add_argument("--num-prompts", type=whole, default=1000, metavar="N", help="(%(default)s)")
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="Of all chance (%(default)s).")
    for name, default, help in (
        ("random-input-len", 1024, "Tokens of a prompt"),
        ("random-output-len", 128, "Tokens to ask for"),
        ("random-prefix-len", 0, "Tokens before these that all prompts have in common"),
        ("prefix-repetition-prefix-len", 256, "Tokens in common"),
        ("prefix-repetition-suffix-len", 256, "Tokens after these"),
        ("prefix-repetition-num-prefixes", 10, "Different beginnings"),
        ("prefix-repetition-output-len", 128, "Tokens to ask for"),
        ("custom-output-len", 256, "Tokens to ask for; -1: output_tokens of each line"),
    ):
        group.add_argument(
            f"--{name}", type=whole, default=default, metavar="N", help=f"{help} (%(default)s)."
        )
    group.add_argument(
        "--sharegpt-output-len", type=whole, metavar="N", help="As long as the answers, if not given."
    )
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="Lengths are uniform from (1 - R) to (1 + R) times the given ones (%(default)s).",
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="R",
        help="Per second; inf: all at once (inf).",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="Gaps are gamma distributed with this shape: 1 Poisson, below in bursts (%(default)s).",
    )
    group.add_argument("--max-concurrency", type=whole, metavar="N", help="Requests at once; others wait.")
    group.add_argument("--num-warmups", type=whole, default=0, metavar="N", help="Before, unmeasured (0).")
    group.add_argument("--ramp-up-strategy", metavar="linear|exponential", help="The rate changes from")
    group.add_argument("--ramp-up-start-rps", type=float, default=0.0, metavar="R", help="this")
    group.add_argument("--ramp-up-end-rps", type=float, default=0.0, metavar="R", help="to this.")


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--goodput",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="Count requests within ttft, tpot and e2el of these milliseconds.",
    )
    group.add_argument(
        "--percentile-metrics",
        default="ttft,tpot,itl",
        metavar="NAMES",
        help="Of ttft, tpot, itl, e2el, client_queue_time (%(default)s).",
    )
    group.add_argument("--metric-percentiles", default="99", metavar="P,P", help="(%(default)s)")
    group.add_argument("--save-result", action="store_true", help="Write JSON.")
    group.add_argument("--save-detailed", action="store_true", help="With an entry for each request.")
    group.add_argument("--append-result", action="store_true", help="Add a line to the file.")
    group.add_argument("--result-dir", type=Path, default=Path(), metavar="FOLDER", help="Where to.")
    group.add_argument(
        "--result-filename", metavar="NAME", help="Of backend, rate, model and date if not given."
    )
    group.add_argument("--label", metavar="NAME", help="In the file and its name, instead of the backend.")
    group.add_argument(
        "--metadata", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="Added to the JSON."
    )
    group.add_argument("--disable-tqdm", action="store_true", help="No progress bar.")


def main(args: argparse.Namespace) -> int:
    """1 if no request was completed."""
    import uvloop

    _allow_many_connections()
    return uvloop.run(_main(args))


async def _main(args: argparse.Namespace) -> int:
    import random

    from quire.cli.client import Client
    from quire.cli.drive import Driver
    from quire.cli.load import Load
    from quire.cli.report import figures, parse_goodput, parse_metrics, parse_percentiles, table

    load = Load(
        rate=args.request_rate,
        burstiness=args.burstiness,
        ramp=args.ramp_up_strategy,
        start=args.ramp_up_start_rps,
        end=args.ramp_up_end_rps,
    )
    metrics, percents = parse_metrics(args.percentile_metrics), parse_percentiles(args.metric_percentiles)
    goodput, metadata = parse_goodput(args.goodput), _pairs("metadata", args.metadata)
    _check(args)
    chance, limit = random.Random(args.seed), args.max_concurrency
    async with Client(_address(args), _pairs("header", args.header)) as client:
        api = await _api(args, client)
        questions = await _questions(args, _maker(args, client, api), chance)
        driver = Driver(client=client, api=api, max_concurrency=limit, keep_text=args.save_detailed)
        await driver.warm_up(questions[0], args.num_warmups)
        with _progress(len(questions), show=not args.disable_tqdm) as advance:
            run = await driver.measure(questions, load.arrivals(len(questions), chance), advance)
    found = figures(
        run.requests,
        begin=run.begin,
        duration=run.duration,
        metrics=metrics,
        percents=percents,
        goodput=goodput,
    )
    rows = table(found, metrics=metrics, percents=percents, max_concurrency=limit, request_rate=load.rate)
    if run.busy > BUSY:
        rows.append(
            f"This client was busy for {100 * run.busy:.0f} % of the time: the figures may be its own"
        )
    _say([*rows, *_errors(run.requests)])
    if args.save_result or args.append_result:
        _save(args, _described(args, api.model, len(questions)) | metadata | found, run.requests)
    return 0 if found["completed"] else 1


def _check(args: argparse.Namespace) -> None:
    for name, least in LEAST.items():
        value = vars(args)[name]
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")
    if (args.dataset_path is None) == (args.dataset_name in FILES):
        takes = "has prompts of its own; leave dataset_path out"
        needs = "needs a file; pass it as --dataset-path"
        raise ConfigError(f"dataset {args.dataset_name} {needs if args.dataset_name in FILES else takes}")


def _pairs(option: str, words: Sequence[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{option} has {word!r}; write NAME=VALUE")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _address(args: argparse.Namespace) -> str:
    host = f"[{args.host}]" if ":" in args.host else args.host
    return args.base_url or f"http://{host}:{args.port}"


async def _api(args: argparse.Namespace, client: "Client") -> "Api":
    from quire.cli.calls import Api

    sampling = {name: value for name in SAMPLING if (value := vars(args)[name]) is not None}
    return Api(
        chat=args.backend == "openai-chat",
        path=args.endpoint or PATHS[args.backend],
        model=args.served_model_name or args.model or await _first_model(client),
        ignore_eos=args.ignore_eos,
        extra=sampling | args.extra_body,
    )


async def _first_model(client: "Client") -> str:
    answer = await client.json("/v1/models")
    try:
        return str(answer["data"][0]["id"])
    except (TypeError, LookupError):
        raise RequestFailed(f"{client.base_url}/v1/models names no model; pass --model") from None


def _maker(args: argparse.Namespace, client: "Client", api: "Api") -> "Maker":
    from quire.cli.prompts import LocalTokens, Maker, ServerTokens, Tokens

    tokens: Tokens
    if args.tokenizer:
        from quire.checkpoint.source import resolve
        from quire.text.tokenizer import Tokenizer

        tokens = LocalTokens(Tokenizer.load(resolve(args.tokenizer, weights=False).folder))
    else:
        tokens = ServerTokens(client, api.model)
    return Maker(tokens, special=not api.chat)  # a chat's template brings its own


async def _questions(args: argparse.Namespace, maker: "Maker", chance: "random.Random") -> list["Question"]:
    from quire.cli.workload import Shape

    if args.dataset_name == "custom":
        return maker.of_file(args.dataset_path, args.num_prompts, args.custom_output_len, chance)
    if args.dataset_name == "sharegpt":
        return await maker.of_sharegpt(args.dataset_path, args.num_prompts, args.sharegpt_output_len, chance)
    if args.dataset_name == "prefix_repetition":
        shape = Shape(
            input_len=args.prefix_repetition_suffix_len,
            output_len=args.prefix_repetition_output_len,
            num_prompts=args.num_prompts,
        )
        length, count = args.prefix_repetition_prefix_len, args.prefix_repetition_num_prefixes
        return await maker.sharing(shape, length, count, chance)
    shape = Shape(
        input_len=args.random_input_len,
        output_len=args.random_output_len,
        num_prompts=args.num_prompts,
        range_ratio=args.random_range_ratio,
    )
    return await maker.fresh(shape, args.random_prefix_len, chance)


@contextmanager
def _progress(total: int, *, show: bool) -> Iterator[Callable[[], None]]:
    """What to call as each request ends. On standard error, so that piped output stays clean."""
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("Requests", total=total)
        yield lambda: bar.advance(task)


def _errors(requests: Iterable["Timed"]) -> list[str]:
    kinds = Counter((request.refused, request.error) for request in requests if request.error)
    lines = [
        f"{'Refused' if refused else 'Failed'}, {count} x: {error}"
        for (refused, error), count in kinds.most_common(MAX_ERRORS_SHOWN)
    ]
    hidden = len(kinds) - len(lines)
    return [*lines, f"... and {hidden} other kinds of failure"] if hidden else lines


def _described(args: argparse.Namespace, model: str, num_prompts: int) -> dict[str, Any]:
    """What was measured, in vLLM's keys."""
    described = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": model,
        "tokenizer_id": args.tokenizer or model,
        "num_prompts": num_prompts,
        "request_rate": args.request_rate if math.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
    }
    if args.ramp_up_strategy:
        described |= {
            "ramp_up_strategy": args.ramp_up_strategy,
            "ramp_up_start_rps": args.ramp_up_start_rps,
            "ramp_up_end_rps": args.ramp_up_end_rps,
        }
    return described


def _save(args: argparse.Namespace, found: dict[str, Any], requests: Sequence["Timed"]) -> None:
    from quire.cli.report import details

    if args.save_detailed:
        found |= details(requests)
    name = args.result_filename
    if not name:
        limit = "" if args.max_concurrency is None else f"-concurrency{args.max_concurrency}"
        model = found["model_id"].split("/")[-1]
        name = f"{args.label or args.backend}-{args.request_rate}qps{limit}-{model}-{found['date']}.json"
    path = args.result_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if args.append_result else "w", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
    _say([f"Results are in {path}"])


def _allow_many_connections() -> None:
    """Each request is a file; the usual soft limit is 1024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < hard:
        with suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (min(hard, MAX_FILES) if hard > 0 else MAX_FILES, hard)
            )


def _say(lines: Iterable[str]) -> None:
    sys.stdout.write("".join(line + "\n" for line in lines))
    sys.stdout.flush()
