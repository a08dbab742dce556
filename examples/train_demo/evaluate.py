"""Measures a demo model on held-out examples: `python -m examples.train_demo.evaluate demo` prints a table.

Quire answers them greedily. An answer is right if it is the one that the generator wrote: the same text, the same JSON
values, the same calls. It is well formed if it ends, thinks in one place or not at all, and obeys the system prompt.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import exp
from statistics import mean
from typing import Any

from examples.train_demo.data import document, template
from examples.train_demo.skills import SKILLS, WORLD, Example, Writer
from quire import LLM, RequestOutput, SamplingParams

CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
THOUGHT = re.compile(r"<think>\n[^<>]+\n</think>\n\n")
WORDS = re.compile(r"\w+")


def parsed(text: str) -> list[Any]:
    """The JSON values of the text or of the calls in it; none if one is malformed."""
    try:
        return [json.loads(value) for value in CALL.findall(text) or [text]]
    except json.JSONDecodeError:
        return []


def is_story(request: str, wanted: str, text: str) -> bool:
    """Five to seven different sentences, with everything in them that the user asked for."""
    sentences = re.split(r"(?<=[.!?]) ", text)
    asked = set(WORDS.findall(request)) - set(WORDS.findall(" ".join(["an", *WORLD["stories"]["requests"]])))
    return 5 <= len(sentences) == len(set(sentences)) <= 7 and asked & set(WORDS.findall(wanted)) <= set(
        WORDS.findall(text)
    )


def score(example: Example, text: str, ended: bool = True) -> tuple[bool, bool]:
    """Whether an answer is right, and whether it is well formed."""
    thought = THOUGHT.match(text) if example.thinking else None
    answer, final, style = text[thought.end() if thought else 0 :], example.messages[-1], example.style
    formed = ended and "think>" not in answer
    formed &= {
        "capitals": answer == answer.upper(),
        "lower case": answer == answer.lower(),
        "list": all(line.startswith("- ") for line in answer.splitlines()),
        "one word": len(answer.split()) == 1 or answer == final["content"],
    }.get(style, True)
    if calls := [call["function"] for call in final.get("tool_calls", [])]:
        made = parsed(answer) if answer.startswith("<tool_call>") else []
        return made == calls, formed and bool(made) and all(isinstance(c, dict) and "name" in c for c in made)
    if example.final == "extract":
        return parsed(answer) == parsed(final["content"]), formed and parsed(answer) != []
    if example.final == "unknown":
        return answer.lower().startswith("- i don't know" if style == "list" else "i don't know"), formed
    if example.final == "stories":
        return formed and (
            bool(style) or is_story(example.messages[-2]["content"], final["content"], answer)
        ), formed
    return answer == final["content"], formed


def prompts(examples: Sequence[Example]) -> Iterator[str]:
    form = template()
    for example in examples:
        yield "".join(text for text, _ in document(example, form)[:-1])


def answers(llm: LLM, examples: Sequence[Example]) -> list[RequestOutput]:
    return llm.generate(
        list(prompts(examples)), SamplingParams(temperature=0.0, max_tokens=512), use_tqdm=False
    )


def measure(llm: LLM, skill: str, count: int, verbose: bool = False) -> Iterator[float]:
    """Shares that are right and well formed when it may think, and the same when it may not."""
    writer = Writer(f"test {skill}", test=True)
    examples = [writer.example(skill) for _ in range(count)]
    for thinking in (True, False):
        asked = [replace(example, thinking=thinking) for example in examples]
        scores = []
        for example, output in zip(asked, answers(llm, asked), strict=True):
            text, reason = output.outputs[0].text, output.outputs[0].finish_reason
            scores.append(score(example, text, reason == "stop"))
            if verbose and scores[-1] != (True, True):
                sys.stderr.write(f"{output.prompt}\n--- {text!r}\n--- {example.messages[-1]}\n\n")
        yield from (mean(right for right, _ in scores), mean(formed for _, formed in scores))


def perplexity(llm: LLM, skill: str, count: int) -> float:
    """Of the tokens of the right answers."""
    writer, form, params = Writer(f"test {skill}", test=True), template(), SamplingParams(max_tokens=1)
    examples = [writer.example(skill) for _ in range(count)]
    whole = ["".join(text for text, _ in document(example, form)) for example in examples]
    asked = llm.generate(list(prompts(examples)), params, use_tqdm=False)
    scored = llm.generate(whole, replace(params, prompt_logprobs=0), use_tqdm=False)
    scores: list[float] = []
    for before, output in zip(asked, scored, strict=True):
        first, tokens = len(before.prompt_token_ids or ()), output.prompt_token_ids or ()
        steps = zip(tokens[first:], (output.prompt_logprobs or ())[first:], strict=True)
        scores += [step[token].logprob for token, step in steps if step]
    return exp(-mean(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a demo model on held-out examples.")
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=500, help="examples of each skill")
    parser.add_argument("--skills", nargs="+", default=list(SKILLS), choices=list(SKILLS))
    parser.add_argument("--quantization", default="auto", help="auto, int8 or int4")
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto or int8")
    parser.add_argument("--verbose", action="store_true", help="show what went wrong")
    args = parser.parse_args()
    print(
        "| skill | right | well formed | right at once | well formed at once | perplexity |\n|---|---|---|---|---|---|"
    )
    options = {"quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
    with LLM(args.model, **options, disable_log_stats=True) as llm:
        for skill in args.skills:
            shares = " | ".join(f"{share:.1%}" for share in measure(llm, skill, args.count, args.verbose))
            print(f"| {skill} | {shares} | {perplexity(llm, skill, args.count):.4f} |", flush=True)


if __name__ == "__main__":
    main()
