"""Copies through a ring of buffers equal plain ones, whatever is copied, and end when reading fails."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quire.checkpoint.upload import Upload, pieces

CPU = torch.device("cpu")
BYTES = 64  # of a buffer; smaller than most tensors here, and than their rows


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).mul(100).to(dtype)


SOURCES: dict[str, Callable[[], Tensor]] = {
    "one number": lambda: numbers(),
    "nothing": lambda: numbers(0, 5),
    "nothing in a row": lambda: numbers(5, 0),
    "a vector": lambda: numbers(1001),
    "a matrix": lambda: numbers(37, 5),
    "rows as long as a buffer": lambda: numbers(9, 16),
    "rows longer than a buffer": lambda: numbers(7, 99),
    "transposed": lambda: numbers(31, 47).t(),
    "transposed, long rows": lambda: numbers(99, 3).t(),
    "some rows": lambda: numbers(100, 8)[33:71],
    "every second column": lambda: numbers(20, 40)[:, ::2],
    "one row, expanded": lambda: numbers(1, 50).expand(12, 50),
    "three dimensions": lambda: numbers(3, 11, 13).transpose(0, 2),
}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.int64, torch.int32),
    (torch.uint8, torch.uint8),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", SOURCES)
def test_what_arrives_is_what_a_plain_copy_gives(case: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    source = SOURCES[case]().abs().to(dtypes[0])
    with Upload(CPU, staged=True, num_buffers=3, buffer_bytes=BYTES) as upload:
        for memory in (
            torch.empty(source.shape, dtype=dtypes[1]),
            torch.empty(*source.shape, 2, dtype=dtypes[1])[..., 0],  # strided
        ):
            upload.copy(memory, source)
            assert torch.equal(memory, source.to(dtypes[1]))


def test_only_the_slice_that_is_named_changes() -> None:
    whole, source = torch.zeros(30, 40), numbers(10, 40)
    with Upload(CPU, staged=True, num_buffers=2, buffer_bytes=BYTES) as upload:
        upload.copy(whole[10:20], source)
    assert torch.equal(whole[10:20], source)
    assert whole[:10].abs().sum() == 0 and whole[20:].abs().sum() == 0


def test_shapes_must_agree() -> None:
    with Upload(CPU) as upload, pytest.raises(ValueError, match="does not fit into"):
        upload.copy(torch.empty(3, 4), numbers(4))  # torch would repeat it


def test_one_buffer_is_enough() -> None:
    source = numbers(50, 50)
    with Upload(CPU, staged=True, num_buffers=1, buffer_bytes=BYTES) as upload:
        memory = torch.empty_like(source)
        upload.copy(memory, source)
    assert torch.equal(memory, source)


@pytest.mark.parametrize("case", SOURCES)
def test_pieces_fit_a_buffer_and_cover_everything_once(case: str) -> None:
    source = SOURCES[case]()
    counts = torch.zeros(source.shape)
    for target, piece in pieces(counts, source, BYTES):
        assert target.shape == piece.shape
        assert 0 < piece.numel() * piece.itemsize <= BYTES
        target += 1
    assert torch.equal(counts, torch.ones(source.shape))


def test_large_buffers_take_a_tensor_in_few_pieces() -> None:
    source = numbers(1000, 10)
    assert len(list(pieces(torch.empty_like(source), source, 8000))) == 5


def test_a_source_that_cannot_be_read_raises_and_the_ring_goes_on() -> None:
    no_memory = torch.empty(100, 100, device="meta")
    with Upload(CPU, staged=True, num_buffers=4, buffer_bytes=BYTES) as upload:
        memory, source = torch.empty(20, 50), numbers(20, 50)
        upload.copy(memory, source)
        ring = upload.ring
        assert ring is not None
        with pytest.raises(NotImplementedError, match="meta"):
            ring.copy(torch.empty(100, 100), no_memory)
        upload.copy(memory.zero_(), source)
        assert torch.equal(memory, source)


def test_ring_and_threads_go_with_the_load_and_come_back_with_the_next() -> None:
    upload, source, memory = Upload(CPU, staged=True), numbers(3, 3), torch.empty(3, 3)
    with upload:
        assert upload.ring is None  # until something is copied
        upload.copy(memory, source)
        ring = upload.ring
        assert ring is not None
    assert upload.ring is None
    with pytest.raises(RuntimeError, match="shutdown"):
        ring.threads.submit(int)
    with upload:
        upload.copy(memory.zero_(), source)
    assert torch.equal(memory, source)


def test_on_the_cpu_a_copy_is_torchs() -> None:
    with Upload(CPU) as upload:
        memory = torch.empty(3, 3)
        upload.copy(memory, numbers(3, 3))
        assert upload.ring is None
    assert torch.equal(memory, numbers(3, 3))
