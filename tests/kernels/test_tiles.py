"""Tiles of real networks' products: they exist, fit and can be written."""

from pathlib import Path

import pytest

from quire.kernels.triton import tiles
from quire.kernels.triton.tiles import (
    ROWS,
    Product,
    Tile,
    bucket,
    fitted,
    read_table,
    rule,
    tile_for,
    write_table,
)

PROCESSORS = 132
SMALL_BYTES = 99 * 1024  # of desktops
NETWORKS = {  # dim, hidden, outputs of q, k, v, inputs of the output, vocabulary
    "Qwen 0.5B": (896, 4864, 1152, 896, 151936),
    "Gemma 2B": (2304, 9216, 4096, 2048, 256000),
    "Llama 8B": (4096, 14336, 6144, 4096, 128256),
    "Llama 70B": (8192, 28672, 10240, 8192, 128256),
    "Llama 70B / 8": (8192, 3584, 1280, 1024, 16032),
    "odd": (33, 7, 50, 100, 999),
}


def products(
    dim: int, hidden: int, qkv: int, out: int, vocab: int, rows: int, itemsize: int
) -> list[Product]:
    shapes = (
        (qkv, dim, False),
        (dim, out, False),
        (hidden, dim, True),
        (dim, hidden, False),
        (vocab, dim, False),
    )
    return [Product(a, b, rows, gated, itemsize) for a, b, gated in shapes]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_rule_fits_any_network(name: str, rows: int, itemsize: int) -> None:
    for product in products(*NETWORKS[name], rows, itemsize):
        for shared_bytes in (tiles.SHARED_BYTES, SMALL_BYTES):
            tile = fitted(rule(product, PROCESSORS), product, shared_bytes)
            assert all(
                value & (value - 1) == 0 for value in (tile.rows, tile.step, tile.split, tile.warps)
            ), tile
            assert tile.step >= 16 and tile.stages >= 1 and (rows > 1 or tile.split == 1)
            numbers = (tile.rows * (1 + product.gated) + rows) * tile.step * itemsize * tile.stages
            assert rows == 1 or numbers <= shared_bytes, tile
            padded = -(-product.inputs // tile.step) * tile.step
            assert padded <= 1.35 * product.inputs or product.inputs < 512, (product, tile)
            assert -(-product.inputs // (tile.split * tile.step)) >= 2 or tile.split == 1


def test_rows_are_rounded_up_to_those_with_tiles() -> None:
    assert [bucket(n) for n in (1, 2, 8, 9, 16, 17, 33, 64)] == [1, 8, 8, 16, 16, 32, 64, 64]


def test_measured_tiles_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(p.rows in ROWS and p.inputs % t.step == 0 for p, t in read_table().items())
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    known, other = Product(640, 512, 16), Product(640, 512, 32)
    write_table({other: Tile(64, 64, 1, 2, 4), known: Tile(32, 64, 2, 3, 4)})
    try:
        assert tile_for(known, PROCESSORS) == Tile(32, 64, 2, 3, 4)
        assert tile_for(Product(640, 512, 8), PROCESSORS) == fitted(
            rule(Product(640, 512, 8), PROCESSORS), Product(640, 512, 8)
        )
        assert list(read_table()) == [known, other]
    finally:
        tiles.forget()
