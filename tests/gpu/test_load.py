"""Weights reach the GPU through pinned memory, and are the same there as on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.checkpoint.dummy import PERIOD, DummyCheckpoint
from quire.checkpoint.reader import Checkpoint
from quire.checkpoint.upload import BUFFER_BYTES, Upload
from quire.models.names import Names
from tests.checkpoint.folders import save
from tests.checkpoint.test_upload import DTYPES, SOURCES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", SOURCES)
def test_what_arrives_is_what_a_plain_copy_gives(case: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    source = SOURCES[case]().abs().to(dtypes[0])
    with Upload(GPU, num_buffers=3, buffer_bytes=64) as upload:
        for memory in (
            torch.empty(source.shape, dtype=dtypes[1], device=GPU),
            torch.empty(*source.shape, 2, dtype=dtypes[1], device=GPU)[..., 0],  # strided
        ):
            upload.copy(memory, source)
            assert torch.equal(memory.cpu(), source.to(dtypes[1]))


def test_buffers_are_pinned_and_not_reused_before_the_device_has_read_them() -> None:
    sources = [torch.full((3 * BUFFER_BYTES // 4 + 7,), float(i)) for i in range(40)]
    busy = torch.randn(4096, 4096, device=GPU)
    with Upload(GPU) as upload:
        found: list[Tensor] = []
        for source in sources:
            busy = torch.tanh(busy @ busy)  # transfers wait for it, while threads go on reading
            memory = torch.empty(source.shape, device=GPU)
            upload.copy(memory, source)
            found.append(memory)
        assert upload.ring is not None
        assert all(buffer.memory.is_pinned() for buffer in upload.ring.buffers)
    for i, memory in enumerate(found):
        assert (memory == i).all()


def test_a_checkpoint_on_disk(tmp_path: Path) -> None:
    want = torch.randn(3000, 2048).bfloat16()  # three buffers
    save(tmp_path, {"a.weight": want, "b.weight": want.t()})
    checkpoint = Checkpoint(tmp_path, Names())
    memory = torch.zeros(4000, 2048, dtype=torch.bfloat16, device=GPU)
    with Upload(GPU) as upload:
        upload.copy(memory[500:3500], checkpoint.tensor("a.weight", shape=(3000, 2048)))
        turned = torch.empty(3000, 2048, device=GPU)
        upload.copy(turned, checkpoint.tensor("b.weight", shape=(2048, 3000)).t())
    assert torch.equal(memory[500:3500].cpu(), want) and torch.equal(turned.cpu(), want.float())
    assert not memory[:500].any() and not memory[3500:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dummy_weights_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    host, device = DummyCheckpoint(5, dtype), DummyCheckpoint(5, dtype, GPU)
    for name, shape in {
        "a.weight": (2 * PERIOD // 1000, 1001),
        "attn_norm.weight": (4096,),
        "scale": (),
    }.items():
        found = device.tensor(name, shape=shape)
        assert found.is_cuda
        assert torch.equal(found.cpu(), host.tensor(name, shape=shape))
