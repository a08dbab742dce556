"""Measures the demo model on what it was never trained on, and writes its model card.

`python -m examples.train_demo.evaluate FOLDER` answers held-out examples with Quire, greedily.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.train_demo.model import DRAFT, MAIN, Batch, load_eagle, load_model
from examples.train_demo.skills import SKILLS, Example, Writer
from quire import LLM, RequestOutput, SamplingParams

CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Score:
    right: bool
    formed: bool


def split(text: str) -> tuple[str, str]:
    """Thought and answer."""
    thought, mark, answer = text.rpartition("</think>")
    return thought + mark, answer.strip()


def parsed(text: str) -> Any:
    """The JSON values of the text, in order; None where one is malformed."""
    try:
        return [json.loads(value) for value in CALL.findall(text) or [text]]
    except json.JSONDecodeError:
        return None


def wanted(example: Example) -> Any:
    final = example.messages[-1]
    calls = [call["function"] for call in final.get("tool_calls", ())]
    return calls or final["content"]


def score(example: Example, output: RequestOutput) -> Score:
    """Right: the same answer, calls or JSON values. Formed: it ends, thinks in one place, and obeys the style."""
    thought, answer = split(output.outputs[0].text)
    want, got, style = wanted(example), answer, example.style
    formed = output.outputs[0].finish_reason == "stop"
    formed &= not thought or example.thinking and bool(re.fullmatch(r"<think>\n[^<>]+\n</think>", thought))
    formed &= style != "capitals" or answer == answer.upper()
    formed &= style != "lower case" or answer == answer.lower()
    formed &= style != "list" or all(line.startswith("- ") for line in answer.splitlines())
    formed &= style != "one word" or len(answer.split()) == 1 or answer == want
    if isinstance(want, list) or example.skill == "extract" and not style:
        got = parsed(answer)
        formed &= got is not None and (isinstance(want, str) or "<tool_call>" in answer)
        want = want if isinstance(want, list) else [json.loads(want)]
    if example.skill == "stories" and not style:
        return Score(formed and is_story(example, answer), formed)
    return Score(got == want, formed)


def is_story(example: Example, text: str) -> bool:
    """Five to seven different sentences, with what the user asked for in them."""
    sentences = re.split(r"(?<=[.!?]) ", text)
    asked = {w for w in re.findall(r"\w{4,}", example.messages[-2]["content"]) if w in wanted(example)}
    return 5 <= len(sentences) == len(set(sentences)) <= 7 and all(word in text for word in asked)


def rounds(right: Tensor, first: int) -> int:
    """How many steps it takes to write a text from place `first` on; [drafts, N], whether draft j is right at a place."""
    place, count, length = first, 0, right.shape[1]
    while place < length - 1:
        ahead = [j < length - 1 - place and bool(right[j, place + 1 + j]) for j in range(len(right))]
        place, count = place + 1 + [*ahead, False].index(False), count + 1
    return count


def proposals(folder: Path, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each text, whether draft j of the draft model, and of the draft head, is right at a place: [DRAFTS, N]."""
    main, draft = load_model(MAIN, folder), load_model(DRAFT, folder / "draft")
    eagle = load_eagle(MAIN, folder / "eagle3")
    ids = eagle.d2t + torch.arange(len(eagle.d2t))
    for sequence in sequences:
        tokens = torch.tensor(sequence)
        batch = Batch(tokens, tokens, ((0, 1, len(tokens)),))
        said = draft.logits(draft(batch)[0]).argmax(-1).roll(1)
        _, taps = main(batch)
        embeddings = main.model.embed_tokens(tokens.roll(-1))
        ahead = [ids[eagle.logits(h).argmax(-1)].roll(2) for h in eagle(embeddings, taps, batch, DRAFTS)]
        yield (said == tokens).expand(DRAFTS, -1), torch.stack(ahead) == tokens


def answer(llm: LLM, examples: Sequence[Example], thinking: bool) -> list[RequestOutput]:
    form = template()
    prompts = ["".join(text for text, _ in document(replace(e, thinking=thinking), form)[:-1]) for e in examples]
    return llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=512))


def measure(folder: Path, count: int) -> Iterator[tuple[str, list[float]]]:
    """For each skill: right and formed with and without thinking, tokens a step with the draft model and the head."""
    with LLM(str(folder)) as llm:
        for skill in SKILLS:
            writer = Writer(f"test {skill}", test=True)
            examples, row = [writer.example(skill) for _ in range(count)], []
            for thinking in (True, False):
                outputs = answer(llm, examples, thinking)
                scores = [score(replace(e, thinking=thinking), o) for e, o in zip(examples, outputs, strict=True)]
                row += [mean(s.right for s in scores), mean(s.formed for s in scores)]
                for example, output, s in zip(examples, outputs, scores, strict=True):
                    if not (s.right and s.formed):
                        logging.debug("%s: %r wants %r, got %r", skill, output.prompt, wanted(example), output.outputs[0].text)
