"""One contestant in a process of its own: a line of JSON on standard input is work, and is answered with one.

contestants.py runs this with the Python that has the contestant. It imports nothing else of these benchmarks, and a
contestant's package only in its own function.

    {"num": 8, "input_len": 128, "output_len": 33, "seed": 1}
    {"seconds": 2.1, "decode_tokens": 256, "decode_s": 1.6}

Prompts are random tokens, outputs greedy and of the full length. Decoding is what is done while every sequence does it:
from when the last has its first token until the first has its last.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NUM_TOKENS = 4000  # ids that have text in the tokenizer
MAX_LENGTH = 1024
CACHE_BYTES = 2 * 2**30  # 18,000 tokens of Qwen3 0.6B
Prompts = Sequence[list[int]]


class Timing(NamedTuple):
    seconds: float
    decode_tokens: int
    decode_s: float


Run = Callable[[Prompts, int], Timing]


def quire(folder: str, threads: int, options: dict[str, str]) -> Run:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from quire import LLM, SamplingParams
    from quire.types import OutputKind

    llm = LLM(
        folder,
        num_threads=threads,
        max_model_len=MAX_LENGTH,
        kv_cache_memory_bytes=CACHE_BYTES,
        disable_log_stats=True,
        **options,
    )
    engine = llm.engine

    def add(name: str, prompt: list[int], output_len: int) -> None:
        kind = OutputKind.DELTA
        params = SamplingParams(
            temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False, output_kind=kind
        )
        engine.add(engine.inputs.request({"prompt_token_ids": prompt}, params, request_id=name))

    return stepped(add, engine.step)


def vllm(folder: str, threads: int, options: dict[str, str]) -> Run:
    """Threads are bound by VLLM_CPU_OMP_THREADS_BIND, which contestants.py sets."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    engine = LLM(folder, max_model_len=MAX_LENGTH, kv_cache_memory_bytes=CACHE_BYTES, **options).llm_engine

    def add(name: str, prompt: list[int], output_len: int) -> None:
        kind = RequestOutputKind.DELTA
        params = SamplingParams(
            temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False, output_kind=kind
        )
        engine.add_request(name, {"prompt_token_ids": prompt}, params)

    return stepped(add, engine.step)


def stepped(add: Callable[[str, list[int], int], None], step: Callable[[], Any]) -> Run:
    """For engines whose steps say which tokens are new; vLLM's and Quire's outputs have the same names."""

    def run(prompts: Prompts, output_len: int) -> Timing:
        start = begin = end = time.perf_counter()
        names = [f"{start}-{i}" for i in range(len(prompts))]  # unlike those of other runs
        for name, prompt in zip(names, prompts, strict=True):
            add(name, prompt, output_len)
        made, before, after = dict.fromkeys(names, 0), 0, 0
        while min(made.values()) < output_len:
            all_decode = min(made.values()) > 0 and max(made.values()) < output_len
            for output in step():
                made[output.request_id] += len(output.outputs[0].token_ids)
            if all_decode:
                end, after = time.perf_counter(), sum(made.values())
            elif min(made.values()) > 0 and not before:
                begin = end = time.perf_counter()
                before = after = sum(made.values())
        return Timing(time.perf_counter() - start, after - before, end - begin)

    return run


def transformers(folder: str, threads: int, options: dict[str, str]) -> Run:
    """`generate` with all prompts as one batch and its default cache."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options["dtype"])).eval()

    class Clock(StoppingCriteria):
        """Asked after each token; stops nothing."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    @torch.inference_mode()
    def run(prompts: Prompts, output_len: int) -> Timing:
        tokens, clock = torch.tensor(prompts), Clock()
        plain = GenerationConfig(
            do_sample=False, max_new_tokens=output_len, min_new_tokens=output_len, pad_token_id=0
        )
        start = time.perf_counter()
        model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=plain,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        seconds = time.perf_counter() - start
        return Timing(seconds, len(prompts) * (output_len - 1), clock.times[-1] - clock.times[0])

    return run


def main() -> None:
    """Arguments: contestant, folder of the checkpoint, threads, options as JSON."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    kinds = {"quire": quire, "vllm": vllm, "transformers": transformers}
    kind, folder, threads, options = sys.argv[1:]
    run = kinds[kind](folder, int(threads), json.loads(options))
    run([[1, 2, 3]], 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        chance = random.Random(work["seed"])
        prompts = [chance.choices(range(NUM_TOKENS), k=work["input_len"]) for _ in range(work["num"])]
        print(json.dumps(run(prompts, work["output_len"])._asdict()), file=answers, flush=True)


if __name__ == "__main__":
    main()
