"""Which tiles a product of few rows runs with: what was measured, in tiles.json, else a rule. Knows no tensors.

tiles.json is a list of products and their tiles, measured on an H100; `quire bench kernels --tune` writes it.
"""

import functools
import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("tiles.json")
ROWS = (1, 8, 16, 32, 64)  # rows that tiles are made for; above these, cuBLAS is as fast
FULL, NEARLY = 1.9, 0.9  # programs per processor: several small ones, or one that fills it
LITTLE = 1.1  # times the inputs, with what is multiplied in vain
MANY_OUTPUTS = 2**15  # a vocabulary's
SHARED_BYTES = 227 * 1024  # of an H100's processor


class Tile(NamedTuple):
    """How a program works; see linear.py."""

    rows: int  # of the weight
    step: int  # inputs that it multiplies at once
    split: int  # programs that share the inputs of a tile
    stages: int  # steps on their way; how often the loop is unrolled, where there is one row
    warps: int


@dataclass(frozen=True, slots=True)
class Product:
    """x [rows, inputs] with a weight [outputs, inputs], or with two of them where it is gated."""

    outputs: int
    inputs: int
    rows: int  # one of ROWS
    gated: bool = False
    itemsize: int = 2  # bytes of a number


def bucket(num_rows: int) -> int:
    """The least of ROWS that holds so many."""
    return next(rows for rows in ROWS if num_rows <= rows)


@functools.cache
def tile_for(product: Product, processors: int, shared_bytes: int = SHARED_BYTES) -> Tile:
    """The tile measured to be fastest, or the rule's."""
    return fitted(read_table().get(product) or rule(product, processors), product, shared_bytes)


@functools.cache
def read_table() -> dict[Product, Tile]:
    return parse_table(TABLE)


def write_table(table: dict[Product, Tile]) -> None:
    print_table(table, TABLE)
    forget()


def parse_table(path: Path) -> dict[Product, Tile]:
    return {Product(*key): Tile(*tile) for key, tile in json.loads(path.read_text(encoding="utf-8"))}


def print_table(table: dict[Product, Tile], path: Path) -> None:
    """One product in a line, in order."""
    keyed = sorted((list(astuple(product)), list(tile)) for product, tile in table.items())
    path.write_text("[\n" + ",\n".join(map(json.dumps, keyed)) + "\n]\n", encoding="utf-8")


def forget() -> None:
    """Read the table again when it is asked for next."""
    read_table.cache_clear()
    tile_for.cache_clear()


def fitted(tile: Tile, product: Product, shared_bytes: int = SHARED_BYTES) -> Tile:
    """The tile with as many stages as fit in a processor's shared memory."""
    if product.rows == 1:
        return tile
    numbers = tile.rows * (1 + product.gated) + max(product.rows, 16)
    most = shared_bytes // (numbers * tile.step * product.itemsize)
    return tile._replace(stages=max(1, min(tile.stages, most)))


def rule(product: Product, processors: int) -> Tile:
    """Tiles near the best for Llama 8B and Qwen3 0.6B at all their sizes (an H100), by what these have in common.

    Few rows wait for what is on its way from memory: many small programs. With many rows, x is what is read again for
    each tile: few tall ones, which share their inputs where there are not enough to fill the GPU.
    """
    return _divided(
        _one_row(product, processors) if product.rows == 1 else _rows(product, processors), product
    )


def _one_row(product: Product, processors: int) -> Tile:
    if product.gated:
        return Tile(2, 1024, 1, 1, 4)
    if 3 * processors <= product.outputs // 8 <= 4 * processors:
        return Tile(8, 512, 1, 4, 4)
    return Tile(4, 1024, 1, 1 if product.outputs < MANY_OUTPUTS else 4, 4)


def _rows(product: Product, processors: int) -> Tile:
    wide, many = product.itemsize // 2, product.outputs >= MANY_OUTPUTS
    if product.rows == 8:
        step = 256 if product.gated or many else 128
        stages = 3 if product.gated else 4 if many else 6
        return _split(Tile(16, step // wide, 1, stages, 1), product, NEARLY * processors)
    if product.rows == 64 and many and not product.gated:
        return Tile(128, 128 // wide, 1, 3, 8)
    step = 64 if product.rows == 64 and product.gated else 128
    tile = Tile(64, step // wide, 1, 3 if product.gated and step == 128 else 4, 4)
    return _split(tile, product, (NEARLY if product.rows == 64 else FULL) * processors)


def _divided(tile: Tile, product: Product) -> Tile:
    """The longest step that leaves little rest, with more rows where it had to be shorter and there is one row."""
    longest = min(tile.step, max(16, 1 << (product.inputs - 1).bit_length()))
    least = min(longest, 256 if product.rows == 1 else 64)
    steps = [longest >> i for i in range(longest.bit_length()) if longest >> i >= least]
    padded = {step: -(-product.inputs // step) * step for step in steps}
    little = max(LITTLE * product.inputs, min(padded.values()))
    step = next(step for step in steps if padded[step] <= little)
    return tile._replace(step=step, rows=tile.rows * (longest // step if product.rows == 1 else 1))


def _split(tile: Tile, product: Product, programs: float) -> Tile:
    """Share the inputs of each tile among as many programs as it takes, with two steps left for each."""
    tiles, split = -(-product.outputs // tile.rows) * (1 + product.gated), 1
    while tiles * split < programs and split < 8 and product.inputs >= 4 * split * tile.step:
        split *= 2
    return tile._replace(split=split)
