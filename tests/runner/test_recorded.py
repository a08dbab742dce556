"""Recorded steps compute what the network computes, to the bit, whatever was computed between."""

import gc
import json
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quire.attention.base import ragged
from quire.attention.cpu import Cpu
from quire.attention.shapes import block_bytes
from quire.checkpoint.reader import Checkpoint
from quire.kernels import ops
from quire.kernels.cpu import native
from quire.kernels.cpu.calls import Memory, record
from quire.layers.decoder import Decoder
from quire.models.registry import decoder_spec
from quire.runner.recorded import MOST_ROWS, RecordedNetwork
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
NUM_BLOCKS, MAX_LENGTH = 24, 64
RECORDED = ("Llama-3.1", "Qwen3", "Gemma2", "Gemma3", "Phi3-long")
LEFT_ALONE = (
    "GPT2",
    "Mixtral",
    "Cohere",
    "Exaone4",
)  # positions, experts, pairs that turn, sums without a norm


def network(name: str, folder: Path, bits: int | None = None) -> tuple[Decoder, Cpu]:
    case = BY_NAME[name]
    if "intermediate_size" in case.values:  # a multiple of 32, as everywhere but in tests
        case = replace(case, values={**case.values, "intermediate_size": 192})
    build_hf(case, folder)
    spec, names = decoder_spec(json.loads((folder / "config.json").read_text()))
    backend = Cpu()
    model = Decoder(spec, backend=backend, dtype=torch.bfloat16, max_length=MAX_LENGTH, bits=bits)
    model.load(Checkpoint(folder, names))
    return model, backend


def caches_of(model: Decoder, backend: Cpu) -> list:
    size = block_bytes(model.spec, backend.block_size, 2)
    pool = torch.zeros(NUM_BLOCKS, size, dtype=torch.uint8)
    pool.view(torch.bfloat16).normal_(generator=torch.Generator().manual_seed(1))
    return model.caches(pool)


def steps(block_size: int) -> list[tuple]:
    """(token ids, step) of newest tokens of up to 6 sequences, and of two longer chunks."""
    chance, found = random.Random(0), []
    tables = [[4 * i + j for j in range(4)] for i in range(6)]
    for count in (1, 3, 2, 3, 1, 6, 3, 6, 1, 2):
        rows = chance.sample(range(6), count)
        starts = [chance.randrange(MAX_LENGTH - 1) for _ in rows]
        found.append((starts, [1] * count, [tables[row] for row in rows]))
    found[4:4] = [([0], [7], tables[:1])]
    found.append(([5, 9], [1, 4], tables[2:4]))
    return [
        (torch.randint(VOCAB_SIZE, (sum(counts),)), ragged(starts, counts, own, block_size))
        for starts, counts, own in found
    ]


@pytest.mark.parametrize(
    ("name", "bits"), [*((name, None) for name in (*RECORDED, *LEFT_ALONE)), ("Qwen3", 8), ("Qwen3", 4)]
)
def test_a_recorded_network_is_the_network(name: str, bits: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, backend = network(name, tmp_path, bits)
    plain, caches = caches_of(model, backend), caches_of(model, backend)
    recorded = RecordedNetwork(model, caches, MAX_LENGTH // backend.block_size)
    for token_ids, step in steps(backend.block_size):
        want = model(token_ids, step, plain)
        assert torch.equal(recorded(token_ids, step), want)
    assert all(torch.equal(a.k, b.k) and torch.equal(a.v, b.v) for a, b in zip(plain, caches, strict=True))
    if name in RECORDED:
        assert recorded.refused is None and {count for count, _ in recorded.steps} == {1, 2, 3, 6}
    else:
        assert recorded.refused is not None and recorded.refused.startswith("aten::") and not recorded.steps


def test_large_steps_and_other_numbers_of_threads_are_other_steps(tmp_path: Path) -> None:
    model, backend = network("Qwen3", tmp_path)
    recorded = RecordedNetwork(model, caches_of(model, backend), MAX_LENGTH // backend.block_size)
    many = MOST_ROWS + 1
    ids, table = torch.zeros(many, dtype=torch.int64), [[0, 1, 2]]
    recorded(ids, ragged([3] * many, [1] * many, table * many, backend.block_size))
    assert not recorded.steps
    num_threads, one = torch.get_num_threads(), ragged([3], [1], table, backend.block_size)
    try:
        found = []
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(recorded(ids[:1], one))
    finally:
        torch.set_num_threads(num_threads)
    assert {threads for _, threads in recorded.steps} == {1, 2}
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_torch_computes_is_refused() -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    with torch.inference_mode():
        for compute in (lambda: x + 1, lambda: x.t().contiguous(), lambda: x[:, :3].reshape(-1), x.clone):
            with record(Memory()) as step:
                compute()
            assert step.refused is not None
        with record(Memory()) as step:
            y = ops.rms_norm(x[:, :6].view(2, 2, 6).flatten(0, 1), None, 1e-6)
            ops.act(y.unflatten(1, (2, 3))[0:1].contiguous(), "silu")
        assert step.refused is None and len(step.calls) == 2


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
