"""Many streams of one engine in an asyncio program: `python examples/streams.py [MODEL]`."""

import asyncio
import sys

from quire import AsyncEngine, Config, OutputKind, SamplingParams

PROMPTS = ["Once upon a time", "What is the capital of Japan?", "What is 20 + 7?"]


async def stream(engine: AsyncEngine, prompt: str) -> str:
    params = SamplingParams(temperature=0.8, max_tokens=32, seed=1, output_kind=OutputKind.DELTA)
    pieces = [output.outputs[0].text async for output in engine.generate(prompt, params)]
    return f"{prompt!r} -> {''.join(pieces)!r} in {len(pieces)} pieces"


async def main(model: str = "demo") -> None:
    engine = AsyncEngine(Config(model=model))
    try:
        for line in await asyncio.gather(*(stream(engine, prompt) for prompt in PROMPTS)):
            print(line)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
