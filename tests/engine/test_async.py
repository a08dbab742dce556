"""The asynchronous engine: many streams at once, aborts, and what happens when it dies."""

import argparse
import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from quire import LLM, AsyncEngine, AsyncEngineArgs, AsyncLLMEngine, SamplingParams
from quire.config import Config
from quire.errors import EngineDead, InvalidRequest
from quire.types import OutputKind, RequestOutput
from tests.engine.conftest import OPTIONS

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DELTA = replace(GREEDY, output_kind=OutputKind.DELTA)


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine.from_engine_args(AsyncEngineArgs(model=str(model_folder), **OPTIONS))
    yield engine
    engine.shutdown()


def run(work: Coroutine) -> object:
    return asyncio.run(asyncio.wait_for(work, 60))


async def collect(engine: AsyncEngine, *args: object, **kwargs: object) -> list[RequestOutput]:
    return [output async for output in engine.generate(*args, **kwargs)]


def test_concurrent_streams_equal_offline_generation(engine: AsyncEngine, llm: LLM) -> None:
    prompts = [f"prompt number {i}" for i in range(12)]

    async def all_at_once() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(collect(engine, p, DELTA, f"r{i}") for i, p in enumerate(prompts)))

    streams = run(all_at_once())
    want = llm.generate(prompts, GREEDY, use_tqdm=False)
    for stream, output in zip(streams, want, strict=True):
        assert sum((o.outputs[0].token_ids for o in stream), []) == output.outputs[0].token_ids
        assert "".join(o.outputs[0].text for o in stream) == output.outputs[0].text
        assert [o.finished for o in stream] == [False] * (len(stream) - 1) + [True]


def test_cumulative_outputs_grow(engine: AsyncEngine) -> None:
    outputs = run(collect(engine, "hello", GREEDY, "cumulative"))
    texts = [o.outputs[0].text for o in outputs]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert len(outputs[-1].outputs[0].token_ids) == 12


def test_abort_ends_the_stream_with_what_there_is(engine: AsyncEngine) -> None:
    async def abort_at_first() -> list[RequestOutput]:
        outputs = []
        async for output in engine.generate("hello", replace(GREEDY, max_tokens=40), "doomed"):
            outputs.append(output)
            await engine.abort("doomed")
        return outputs

    last = run(abort_at_first())[-1]
    assert last.finished and last.outputs[0].finish_reason in ("abort", "length")


def test_leaving_the_iterator_aborts(engine: AsyncEngine) -> None:
    async def leave() -> None:
        stream = engine.generate("hello", replace(GREEDY, max_tokens=40), "left")
        await anext(stream)
        await stream.aclose()
        await collect(engine, "after", GREEDY, "left")  # the id is free again

    run(leave())


def test_a_bad_request_hurts_nobody_else(engine: AsyncEngine) -> None:
    async def mixed() -> tuple[list[RequestOutput], BaseException, BaseException]:
        return await asyncio.gather(
            collect(engine, "hello", GREEDY, "good"),
            collect(engine, "", GREEDY, "bad"),
            collect(engine, [400], GREEDY, "worse"),
            return_exceptions=True,
        )

    good, bad, worse = run(mixed())
    assert good[-1].finished
    assert isinstance(bad, InvalidRequest) and isinstance(worse, InvalidRequest)


def test_an_id_in_use_is_refused(engine: AsyncEngine) -> None:
    async def twice() -> list[object]:
        long = replace(GREEDY, max_tokens=40)
        return await asyncio.gather(
            *(collect(engine, "hello", long, "same") for _ in range(2)), return_exceptions=True
        )

    results = run(twice())
    assert sum(isinstance(r, InvalidRequest) for r in results) == 1


def test_chat_and_names_kept_for_those_who_move(engine: AsyncEngine) -> None:
    assert AsyncLLMEngine is AsyncEngine and AsyncEngineArgs is Config

    async def chat() -> RequestOutput:
        return [o async for o in engine.chat([{"role": "user", "content": "hi"}], GREEDY)][-1]

    assert run(chat()).prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_engine_starts_from_a_command_line(model_folder: Path) -> None:
    namespace = argparse.Namespace(model=str(model_folder), command="serve", max_num_seqs=None, **OPTIONS)
    engine = AsyncEngine.from_cli_args(namespace)
    assert run(collect(engine, "hello", GREEDY, "r"))[-1].finished
    engine.shutdown()
    assert not engine.is_running


def test_a_dead_engine_says_so(model_folder: Path) -> None:
    engine = AsyncEngine(Config(model=str(model_folder), **OPTIONS))

    async def break_it() -> None:
        stream = engine.generate("hello", replace(GREEDY, max_tokens=40), "victim")
        await anext(stream)
        engine.engine.core.runner.launch = None  # the next step raises, whatever this one is at
        with pytest.raises(EngineDead):
            async for _ in stream:
                pass
        with pytest.raises(EngineDead):
            await engine.check_health()
        with pytest.raises(EngineDead):
            await collect(engine, "more", GREEDY, "later")

    run(break_it())
    assert engine.errored
