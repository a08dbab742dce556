"""How many tokens a step of speculative decoding would give with the demo model's companions.

`python -m benchmarks.draft_acceptance` lets Quire answer held-out prompts greedily, and then asks the plain networks
what each companion would have proposed at every place. Proposals are right or wrong as they would be in a decoder that
verifies k of them at a time, because up to the first wrong one all see the text that was really written.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from examples.networks import DRAFT, MAIN, load_model
from examples.train_demo.evaluate import answers
from examples.train_demo.skills import SKILLS, Writer
from quire import LLM, RequestOutput
from quire.checkpoint.source import resolve


def num_steps(right: Tensor, first: int) -> int:
    """Steps that it takes to write a text after place `first`.

    Args:
        right: [k, length], whether the j-th proposal of a step is right if it is for this place.
    """
    place, count, length = first, 0, right.shape[1]
    while place < length - 1:
        ahead = [place + 1 + j < length - 1 and bool(row[place + 1 + j]) for j, row in enumerate(right)]
        place, count = place + 1 + [*ahead, False].index(False), count + 1
    return count


class Drafters:
    """The main model, its draft model and its draft head, as plain networks in float32."""

    def __init__(self, main: Path, draft: Path, eagle: Path):
        self.main, self.draft, self.eagle = (
            load_model(MAIN, main),
            load_model(DRAFT, draft),
            load_model(MAIN, eagle),
        )

    @torch.inference_mode()
    def right(self, tokens: Tensor, k: int) -> dict[str, Tensor]:
        """Of each drafter, [k, length], as `num_steps` takes it. tokens: [1, length]."""
        documents, embed = torch.zeros_like(tokens), self.main.model.embed_tokens
        alone = self.draft.logits(self.draft(tokens, documents)[0]).argmax(-1).roll(1)
        _, taps = self.main(tokens, documents)
        ids = self.eagle.d2t + torch.arange(len(self.eagle.d2t))
        heads = self.eagle(embed(tokens.roll(-1)), taps, documents, k)
        ahead = torch.cat([ids[self.eagle.logits(head).argmax(-1)].roll(2) for head in heads])
        return {"draft model": (alone == tokens).expand(k, -1), "draft head": ahead == tokens}


def tokens_per_step(drafters: Drafters, outputs: list[RequestOutput], k: int) -> dict[str, float]:
    """Tokens after the first one of each answer, by the steps that they take."""
    total, steps = 0, dict.fromkeys(("draft model", "draft head"), 0)
    for output in outputs:
        first = len(output.prompt_token_ids)
        tokens = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        total += tokens.shape[1] - 1 - first
        for name, right in drafters.right(tokens, k).items():
            steps[name] += num_steps(right, first)
    return {name: total / count for name, count in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per step with the demo model's companions.")
    parser.add_argument("-k", type=int, default=4, help="proposals in a step")
    parser.add_argument("--count", type=int, default=100, help="prompts of each skill")
    args = parser.parse_args()
    drafters = Drafters(*(resolve(name).folder for name in ("demo", "demo-draft", "demo-eagle3")))
    print(f"| skill | draft model, k = {args.k} | draft head, k = {args.k} |\n|---|---|---|")
    with LLM("demo", disable_log_stats=True) as llm:
        for skill in SKILLS:
            writer = Writer(f"test {skill}", test=True)
            outputs = answers(llm, [writer.example(skill) for _ in range(args.count)])
            found = tokens_per_step(drafters, outputs, args.k)
            print(f"| {skill} |", " | ".join(f"{value:.2f}" for value in found.values()), "|", flush=True)


if __name__ == "__main__":
    main()
