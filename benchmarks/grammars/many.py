"""Generations with random structured outputs: how many are not what was asked for. None should be.

    python -m benchmarks.grammars.many [MODEL] [--load-format dummy] [--count 10000]

Each case is asked for several times, with other parameters and other company: temperatures 0 to 2, filters, penalties,
stop strings, several outputs, reasoning. What ends is checked by other libraries than the one that guided it. What was
cut, by max_tokens or a stop string, is counted apart, and some of it gone on with: if it ends, and is valid, so was its
beginning.
"""

import argparse
import dataclasses
import random
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.grammars.cases import Case, draw_case
from quire import LLM, SamplingParams
from quire.errors import InvalidRequest
from quire.text.tokenizer import Tokenizer
from quire.types import CompletionOutput, Request, StructuredOutputsParams, Turn

QUESTION = [{"role": "user", "content": "Tell me about it, please."}]
REPEATS = 8  # of a case
MAX_TOKENS, MORE_TOKENS = 40, 200
GONE_ON_WITH = 0.04  # of those which were cut
SHOWN = 20


@dataclasses.dataclass
class Tally:
    """What came of them; `bad` are shown."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    bad: list[str] = dataclasses.field(default_factory=list)

    def fail(self, what: str, case: Case, text: str) -> None:
        self.counts["bad"] += 1
        self.bad.append(f"{what}: {case.kind} {case.asked} got {text!r}")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, and where in its outputs' texts the form begins."""

    case: Case
    request: Request
    thinks: bool

    def answer(self, text: str) -> str | None:
        """What is after the thoughts; None if they have not ended."""
        if not self.thinks or not text.startswith("<think>"):
            return text
        _, close, rest = text.partition("</think>")
        return rest if close else None


def bias_of(tokenizer: Tokenizer, case: Case, thinks: bool) -> dict[int, float]:
    """Makes likely what a model seldom says."""
    wanted = {token: 6.0 for text in case.likely for token in tokenizer.encode(text)[:1]}
    if thinks:
        open_, close = (tokenizer.token_id(text) for text in ("<think>", "</think>"))
        wanted |= {token: size for token, size in ((open_, 6.0), (close, 8.0)) if token is not None}
    return wanted


def draw_params(chance: random.Random, case: Case, bias: dict[int, float]) -> SamplingParams:
    num_outputs = chance.choice([1, 1, 2, 4, 8])
    return SamplingParams(
        max_tokens=MAX_TOKENS,
        n=num_outputs,
        temperature=chance.choice([0, 0.3, 0.7, 1, 1.5, 2] if num_outputs == 1 else [0.5, 1, 2]),
        top_p=chance.choice([1, 1, 0.9, 0.5]),
        top_k=chance.choice([0, 0, 1, 40]),
        min_p=chance.choice([0, 0, 0.05]),
        presence_penalty=chance.choice([0, 0, 1]),
        repetition_penalty=chance.choice([1, 1, 1.2]),
        seed=chance.randrange(2**31),
        logprobs=chance.choice([None, None, 2]),
        stop=chance.choice([None] * 6 + [[","], ["e", "1"]]),
        logit_bias=bias or None,
        structured_outputs=StructuredOutputsParams(**case.asked),
    )


class Many:
    """Asks one engine, so many cases at once. `number` tells requests apart."""

    def __init__(self, llm: LLM, seed: int, batch: int = 64):
        self.llm, self.chance, self.batch = llm, random.Random(seed), batch
        self.number, self.tally = 0, Tally()

    def run(self, count: int) -> Tally:
        """At least `count` outputs."""
        while sum(self.tally.counts[kind] for kind in ("ended", "cut", "bad")) < count:
            self._round()
        return self.tally

    def _round(self) -> None:
        asked = []
        for case in [draw_case(self.chance) for _ in range(self.batch)]:
            try:
                asked += [self._ask(case) for _ in range(REPEATS)]
            except InvalidRequest as error:
                self.tally.counts["refused"] += 1
                self.tally.counts[f"refused: {str(error)[:150]}"] += 1
        found = self._finish([each.request for each in asked])
        outputs = [(each, output) for each in asked for output in found[each.request.id]]
        cut = [each for each in outputs if self._look(*each)]
        self._go_on([each for each in cut if self.chance.random() < GONE_ON_WITH])

    def _ask(self, case: Case) -> Asked:
        inputs, self.number = self.llm.engine.inputs, self.number + 1
        thinks = inputs.template is not None and self.chance.random() < 0.25
        bias = bias_of(self.llm.get_tokenizer(), case, thinks)
        prompt = inputs.chat_prompt(QUESTION, None) if thinks else f"Number {self.number % 50}:"
        params = draw_params(self.chance, case, bias)
        turn = Turn() if thinks else None
        request = inputs.request(prompt, params, request_id=str(self.number), turn=turn)
        return Asked(case, request, thinks)

    def _finish(self, requests: Sequence[Request]) -> dict[str, list[CompletionOutput]]:
        engine, found = self.llm.engine, {}
        for request in requests:
            engine.add(request)
        while not engine.idle:
            for output in engine.step():
                found[output.request_id] = list(output.outputs)
        return found

    def _look(self, asked: Asked, output: CompletionOutput) -> bool:
        """Count an output; whether it was cut."""
        self.tally.counts[f"of {asked.case.kind}"] += 1
        text = asked.answer(output.text)
        if output.finish_reason == "error":
            self.tally.fail("error", asked.case, output.text)
        elif text is not None and not asked.case.ends and asked.case.is_valid(text):
            self.tally.counts["ended"] += 1
        elif output.finish_reason == "length" or output.stop_reason is not None or text is None:
            self.tally.counts["cut"] += 1
            return True
        elif asked.case.is_valid(text):
            self.tally.counts["ended"] += 1
            self.tally.counts["after thoughts"] += text != output.text
        else:
            self.tally.fail("not valid", asked.case, output.text)
        return False

    def _go_on(self, cut: Sequence[tuple[Asked, CompletionOutput]]) -> None:
        inputs, again = self.llm.engine.inputs, {}
        for asked, output in cut:
            self.number += 1
            params = asked.request.params
            params = dataclasses.replace(
                params,
                n=1,
                stop=(),
                max_tokens=MORE_TOKENS,
                temperature=1.0,
                seed=self.number,
                top_k=0,
                top_p=1.0,
            )
            request = dataclasses.replace(asked.request, id=str(self.number), params=params)
            whole = inputs.resumed(request, (tuple(output.token_ids),), frozenset())
            again[whole.id] = whole, asked, output
        found = self._finish([whole for whole, _, _ in again.values()])
        for name, (_, asked, output) in again.items():
            (longer,) = found[name]
            text = asked.answer(longer.text)
            if longer.finish_reason != "stop" or text is None:
                self.tally.counts["gone on with, and cut again"] += 1
            elif asked.case.is_valid(text) and longer.text.startswith(output.text.rstrip("\ufffd")):
                self.tally.counts["gone on with, and valid"] += 1
            else:
                self.tally.fail("cut", asked.case, f"{output.text!r}, and then {longer.text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = {"max_num_seqs": 128, "kv_cache_memory_bytes": 1 << 28, "disable_log_stats": True}
    with LLM(args.model, device="cpu", max_model_len=2048, load_format=args.load_format, **options) as llm:
        began = time.monotonic()
        tally = Many(llm, args.seed).run(args.count)
        print(f"{time.monotonic() - began:.0f} s")
    for name, number in sorted(tally.counts.items()):
        print(f"{number:8,} {name}")
    print(*tally.bad[:SHOWN], sep="\n")


if __name__ == "__main__":
    main()
