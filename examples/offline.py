"""Completes a few prompts at once: `python examples/offline.py [MODEL]`."""

import sys

from quire import LLM, SamplingParams

PROMPTS = ["Once upon a time", "What is the capital of Japan?", "What is 20 + 7?"]


def main(model: str = "demo") -> None:
    with LLM(model) as llm:
        for output in llm.generate(PROMPTS, SamplingParams(temperature=0.8, max_tokens=32, seed=1)):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
