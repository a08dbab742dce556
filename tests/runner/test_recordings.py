"""Recorded steps compute what others compute, to the bit, whatever was computed between."""

import gc
import random
import threading
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.config import Config
from quire.engine.engine import Engine
from quire.kernels import ops
from quire.kernels.cpu import native
from quire.kernels.cpu.calls import Memory, record
from quire.parallel.axis import Axes
from quire.runner.fixed import DrawKind
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


def recordings(engine: Engine) -> Recordings:
    fixed = engine.core.runner.fixed
    assert fixed is not None and isinstance(fixed.graphs, Recordings)
    return fixed.graphs


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
    one, other = (make_engine(folder, **options) for _ in range(2))
    other.core.runner.fixed = None
    assert run(one, work) == run(other, work)
    found = recordings(one)
    if name in RECORDED:
        assert len({kind.num_rows for (kind, _) in found.steps}) > 3
    else:
        assert found.refused and all(isinstance(kind, DrawKind) for (kind, _) in found.steps)


@pytest.mark.parametrize("name", ["Qwen3", pytest.param("Qwen2Moe", marks=pytest.mark.slow)])
def test_ranks_record_their_steps(name: str, tmp_path: Path) -> None:
    """What they exchange is in the recording, and the same bits if one of them has none."""
    folder, work = folder_of(name, tmp_path), workload(KINDS[:3])
    one, other = (make_engine(folder, tensor_parallel_size=2) for _ in range(2))
    try:
        runner = other.core.runner.runner
        runner.fixed = None
        assert run(one, work) == run(other, work)
        fixed = one.core.runner.runner.fixed
        assert {kind.num_rows for (kind, _) in fixed.graphs.steps if kind.uses is not None} >= {1, 2, 3}
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
    assert any(kind.uses is None for (kind, _) in found.steps)


def test_more_rows_than_are_recorded_are_computed_otherwise(tmp_path: Path) -> None:
    """And other numbers of threads are other recordings."""
    folder = folder_of("Qwen3", tmp_path)
    work = [
        ([5, 6, 7 + i], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), 0) for i in range(70)
    ]
    options = {"max_num_seqs": 70, "max_num_batched_tokens": 256}
    engine = make_engine(folder, **options)
    other = make_engine(folder, **options)
    other.core.runner.fixed = None
    want = run(other, work)
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert run(engine, work) == want
            assert run(engine, work[:2])
        assert {(kind.num_rows, threads) for (kind, threads) in recordings(engine).steps} == {(2, 1), (2, 2)}
    finally:
        torch.set_num_threads(num_threads)


def test_what_fails_while_it_is_recorded_is_computed_otherwise(tmp_path: Path) -> None:
    folder, work = folder_of("Qwen3", tmp_path), workload(KINDS[:1])
    engine, other = make_engine(folder), make_engine(folder)
    other.core.runner.fixed = None
    fixed = engine.core.runner.fixed
    assert fixed is not None
    sampler = fixed.sampler.sample_fixed
    calls = []

    def fail_twice(*args: Any) -> Any:
        calls.append(args)
        if len(calls) < 3:
            raise RuntimeError("no memory")
        return sampler(*args)

    fixed.sampler.sample_fixed = fail_twice  # type: ignore[method-assign]
    assert run(engine, work) == run(other, work)
    assert [*recordings(engine).refused.values()] == ["RuntimeError"] * 2 and recordings(engine).steps


def test_what_fails_with_states_cannot_be_computed_again() -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    assert not Recordings(Axes()).run("a kind", fail)
    with pytest.raises(StatesLost):
        Recordings(Axes(), keeps_states=True).run("a kind", fail)


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
