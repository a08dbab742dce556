"""Recorded steps compute what others compute, to the bit, whatever was computed between."""

import gc
import random
import threading
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire.config import Config
from quire.engine.engine import Engine
from quire.engine.ranks import Team
from quire.kernels import ops
from quire.kernels.cpu import native
from quire.kernels.cpu.calls import Memory, SameMemory, Uneven, record, rehearse
from quire.parallel.axis import Axes
from quire.runner.chunks import ChunkKind, ChunkSteps
from quire.runner.fixed import DrawKind, FixedKind
from quire.runner.recordings import Recordings
from quire.runner.states import StatesLost
from quire.types import SamplingParams
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf
from tests.runner.test_fixed import run

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
RECORDED = (
    *("Llama-3.1", "Qwen3", "Gemma2", "Gemma3", "Phi3-long"),
    *("Mixtral", "Qwen2Moe", "Qwen3Moe", "Glm4Moe"),
    *("Helium", "Exaone4-global"),  # pairs that turn, sums without a norm
    *("Qwen3-wide", "Helium-wide"),  # heads and gates that products finish
)
LEFT_ALONE = (
    *("GPT2", "Cohere", "Exaone4", "Gemma4"),  # positions, layer norms, norms that do not turn, scalars
    *("Lfm2", "Qwen3Next", "Mamba2"),  # gates of layers that keep states
)
KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_p": 0.8, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.7, "repetition_penalty": 1.2, "min_tokens": 3},
    {"temperature": 0.0, "stop_token_ids": [*range(20, 60)], "ignore_eos": False},
)


def folder_of(name: str, folder: Path) -> str:
    build_hf(BY_NAME[name], folder)
    return str(folder)


def make_engine(folder: str, **options: object) -> Engine:
    base = {"dtype": "bfloat16", "device": "cpu", "skip_tokenizer_init": True, "max_model_len": 48}
    base |= {"max_num_seqs": 6, "max_num_batched_tokens": 40, "disable_log_stats": True}
    return Engine(Config.of(model=folder, **base | options), offline=True)


def unrecorded(engine: Engine) -> Engine:
    runner = engine.core.runner
    runner = runner.runner if isinstance(runner, Team) else runner
    runner.fixed = runner.mixed = None
    return engine


def recordings(engine: Engine) -> Recordings:
    fixed = engine.core.runner.fixed
    assert fixed is not None and isinstance(fixed.graphs, Recordings)
    return fixed.graphs


def of_any_size(found: Recordings) -> list[Any]:
    """Kinds of steps that are replayed with any number of rows."""
    return [kind for (kind, *_), step in found.rehearsed.items() if step is not None]


def workload(kinds: tuple, count: int = 14) -> list:
    chance, work = random.Random(0), []
    for i in range(count):
        prompt = chance.choices(range(3, VOCAB_SIZE), k=chance.randrange(1, 24))
        base = {"max_tokens": chance.randrange(3, 20), "ignore_eos": True, "seed": i}
        work.append((prompt, SamplingParams(**base | kinds[i % len(kinds)]), chance.randrange(25)))
    return work


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in (*RECORDED, *LEFT_ALONE)),
        *product(("Qwen3", "Qwen3-wide", "Qwen2Moe"), ({"quantization": "int8"}, {"quantization": "int4"})),
        *product(("Qwen3", "Qwen3-wide", "Gemma3"), ({"kv_cache_dtype": "int8"},)),
    ],
)
def test_recorded_steps_answer_as_others(name: str, options: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder, work = folder_of(name, tmp_path), workload(KINDS)
    one, other = make_engine(folder, **options), unrecorded(make_engine(folder, **options))
    assert run(one, work) == run(other, work)
    found = recordings(one)
    seen = {type(kind) for kind in of_any_size(found)}
    if name in RECORDED:
        assert seen >= {FixedKind, ChunkKind}
        assert all(kind.num_rows == 1 or isinstance(kind, DrawKind) for (kind, _) in found.steps)
    else:
        assert found.refused and seen <= {DrawKind}
        assert all(isinstance(kind, DrawKind) for (kind, _) in found.steps)


@pytest.mark.parametrize("name", ["Qwen3", pytest.param("Qwen2Moe", marks=pytest.mark.slow)])
def test_ranks_record_their_steps(name: str, tmp_path: Path) -> None:
    """What they exchange is in the recording, and the same bits if one of them has none."""
    folder, work = folder_of(name, tmp_path), workload(KINDS[:3])
    one, other = (make_engine(folder, tensor_parallel_size=2) for _ in range(2))
    try:
        assert run(one, work) == run(unrecorded(other), work)
        graphs = one.core.runner.runner.fixed.graphs
        assert any(isinstance(kind, FixedKind) and kind.num_rows == 1 for (kind, _) in graphs.steps)
        assert {type(kind) for kind in of_any_size(graphs)} == {FixedKind, ChunkKind, DrawKind}
    finally:
        one.close()
        other.close()


def test_only_what_torch_samples_is_not_recorded(tmp_path: Path) -> None:
    """The network of such steps is, without sampling."""
    engine = make_engine(folder_of("Qwen3", tmp_path))
    run(engine, workload(KINDS[:3]))
    assert not recordings(engine).refused
    run(engine, workload(KINDS[3:4]))
    run(engine, workload(KINDS[4:5]))
    found = recordings(engine)
    assert found.refused and all(kind.uses for (kind, _) in found.refused)
    assert any(isinstance(kind, FixedKind) and kind.uses is None for kind in of_any_size(found))


def test_more_rows_than_are_recorded_are_computed_otherwise(tmp_path: Path) -> None:
    """And other numbers of threads are other recordings."""
    folder = folder_of("Qwen3", tmp_path)
    work = [
        ([5, 6, 7 + i], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), 0) for i in range(70)
    ]
    options = {"max_num_seqs": 70, "max_num_batched_tokens": 256}
    engine = make_engine(folder, **options)
    want = run(unrecorded(make_engine(folder, **options)), work)
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert run(engine, work) == want
            assert run(engine, work[:2])
        found = recordings(engine)
        assert {threads for (kind, _, threads) in found.rehearsed if isinstance(kind, FixedKind)} == {1, 2}
        assert not found.steps
    finally:
        torch.set_num_threads(num_threads)


def test_what_fails_while_it_is_recorded_is_computed_otherwise(tmp_path: Path) -> None:
    folder, work = folder_of("Qwen3", tmp_path), workload(KINDS[:1])
    engine, other = make_engine(folder), unrecorded(make_engine(folder))
    fixed = engine.core.runner.fixed
    assert fixed is not None
    sampler = fixed.sampler.sample_fixed
    calls = []

    def fail_at_first(*args: Any) -> Any:
        """When kinds are rehearsed, and when they are recorded."""
        calls.append(args)
        if len(calls) < 5:
            raise RuntimeError("no memory")
        return sampler(*args)

    fixed.sampler.sample_fixed = fail_at_first  # type: ignore[method-assign]
    assert run(engine, work) == run(other, work)
    assert [*recordings(engine).refused.values()] == ["RuntimeError"] * 3 and recordings(engine).steps


def test_what_fails_with_states_cannot_be_computed_again() -> None:
    def fail(kind: FixedKind) -> None:
        raise RuntimeError("no memory")

    kind = FixedKind(3, 48, None, shares=False)
    assert not Recordings(Axes()).run(kind, fail, 8)
    with pytest.raises(StatesLost):
        Recordings(Axes(), keeps_states=True).run(kind, fail, 8)


def test_what_torch_computes_is_refused() -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    with torch.inference_mode():
        for compute in (
            lambda: x + 1,
            lambda: x.t().contiguous(),
            lambda: x[:, :3].reshape(-1),
            x.clone,
            x.tolist,
        ):
            with record(Memory()) as step:
                compute()
            assert step.refused is not None
        to = torch.empty(2, 12, dtype=torch.bfloat16)
        with record(Memory()) as step:
            y = ops.rms_norm(x[:, :6].view(2, 2, 6).flatten(0, 1), None, 1e-6)
            y = ops.act(y.unflatten(1, (2, 3))[0:1].contiguous(), "silu")
            to[1, :6].copy_(y.flatten())
        assert step.refused is None and len(step.calls) == 3
        want = to.clone()
        to.zero_()
        step.replay()
        assert torch.equal(to[1, :6], want[1, :6])


def test_only_the_thread_that_records_is_recorded() -> None:
    x = torch.randn(4, 6)
    with record(Memory()) as step:
        other = threading.Thread(target=ops.rms_norm, args=(x, None, 1e-6))
        other.start()
        other.join()
    assert step.calls == []
    ops.rms_norm(x, None, 1e-6)
    assert step.calls == []


@pytest.mark.parametrize("name", ["Qwen3-wide", "Gemma3", "Qwen2Moe", "Helium"])
@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_a_few_sizes_tell_all_others(name: str, quantization: str, tmp_path: Path) -> None:
    """The calls of each, with every number and address in them, are those that are made when it is computed."""
    engine = make_engine(folder_of(name, tmp_path), quantization=quantization, max_num_batched_tokens=96)
    run(engine, workload(KINDS[:1]))
    chunks, found = engine.core.runner.mixed, recordings(engine)
    assert isinstance(chunks, ChunkSteps) and any(isinstance(kind, ChunkKind) for kind in of_any_size(found))

    def compute(sizes: tuple[int, ...]) -> None:
        chunks.compute(ChunkKind(*sizes))

    same = SameMemory(Memory())
    with torch.inference_mode():
        sized = rehearse((2, 2), (96, 6), compute, same)
        for sizes in product(range(2, 97), range(2, 7)):
            with record(same, is_rehearsal=True) as step:
                compute(sizes)
            same.again()
            assert np.array_equal(sized.args_of(sizes), step.args().view(np.int32))


def test_steps_that_are_other_calls_for_more_rows_are_uneven() -> None:
    x = torch.randn(9, 6)
    before = x.clone()

    def halves(num_rows: int) -> None:
        ops.rms_norm(x[: num_rows // 2 + 1], None, 1e-6)

    def other_calls(num_rows: int) -> None:
        ops.rms_norm(x[:num_rows], None, 1e-6) if num_rows < 5 else ops.act(x[:num_rows], "silu")

    def more_memory(num_rows: int) -> None:
        ops.rms_norm(x[:num_rows], None, 1e-6)
        torch.empty(1000 // num_rows)

    def by_torch(num_rows: int) -> None:
        x[:num_rows].add_(1)

    with torch.inference_mode():
        for compute in (halves, other_calls, more_memory, by_torch):
            with pytest.raises(Uneven):
                rehearse((2,), (9,), lambda sizes, compute=compute: compute(*sizes), SameMemory(Memory()))
    assert torch.equal(x, before)


def test_memory_is_used_again_when_nobody_sees_it() -> None:
    memory = Memory()
    first = memory.empty((3, 100), torch.float32)
    part, address = first[1, 2:5], first.data_ptr()
    del first
    gc.collect()
    second = memory.empty((4, 100), torch.bfloat16)
    assert second.data_ptr() != address  # `part` is still there
    del part
    gc.collect()
    again = memory.empty((300,), torch.float32)
    assert again.data_ptr() == address and again.shape == (300,)
    assert memory.empty((0, 5), torch.float32).shape == (0, 5)
