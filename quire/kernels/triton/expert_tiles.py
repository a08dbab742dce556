"""Which tiles products with experts' weights run with: as tiles.py, from a table or a rule. Knows no tensors.

A product's `rows` are those of an expert that share its weight (experts.py: together); 1 stands for pairs that share
nothing (alone). One number for both products of a layer, since both read what `arrange` left.
"""

import functools
from pathlib import Path

from quire.kernels.triton.tiles import (
    NEARLY,
    SHARED_BYTES,
    Product,
    Tile,
    fitted,
    parse_table,
    print_table,
    rule,
)

TABLE = Path(__file__).with_name("expert_tiles.json")
ROWS = (1, 8, 16, 32, 64, 128)
MOST_WIDE_ROWS = 32  # of numbers of 4 bytes, which no tensor core multiplies exactly
MOST_ALONE = 1  # tokens
MANY_TURNS = 8
LONGEST_STEP = 1024
AT_ONCE = 4096  # numbers of a weight that a program for one pair loads in a step


def rows_for(num_tokens: int, top_k: int, num_experts: int, itemsize: int = 2) -> int:
    """Rows of a tile, one of ROWS: about twice an expert's share, so that few experts read their weight twice.

    All that depends on how many tokens there are is decided here; with a fixed answer, a token's result depends on
    nothing but the token.
    """
    if num_tokens <= MOST_ALONE:
        return 1
    share = 2 * num_tokens * top_k / num_experts
    most = ROWS[-1] if itemsize <= 2 else MOST_WIDE_ROWS
    return next(rows for rows in ROWS[1:] if rows >= min(share, most))


def turns_for(rows: int) -> int:
    """Slots that take turns at a tile: where there are many for each expert, its weight outgrows the cache."""
    return MANY_TURNS if rows >= 64 else 1


@functools.cache
def expert_tile_for(product: Product, processors: int, shared_bytes: int = SHARED_BYTES) -> Tile:
    """The tile measured to be fastest, or the rule's."""
    tile = read_expert_table().get(product) or expert_rule(product, processors)
    return fitted(tile, product, shared_bytes)


@functools.cache
def read_expert_table() -> dict[Product, Tile]:
    return parse_table(TABLE)


def write_expert_table(table: dict[Product, Tile]) -> None:
    print_table(table, TABLE)
    forget_expert_table()


def forget_expert_table() -> None:
    """Read the table again when it is asked for next."""
    read_expert_table.cache_clear()
    expert_tile_for.cache_clear()


def expert_rule(product: Product, processors: int) -> Tile:
    """What was measured to be best for dense layers, with no inputs shared: experts are many programs as they are."""
    if product.rows == 1:
        return _alone(product, processors)
    if product.rows <= 64:
        tile = rule(product, processors)._replace(split=1)
        spills = product.gated and product.itemsize > 2 and product.rows > 8
        return tile._replace(rows=tile.rows // 2) if spills else tile
    step = rule(Product(product.outputs, product.inputs, 64, True, product.itemsize), processors).step
    return Tile(128, step, 1, 3 if product.gated else 4, 8)


def _alone(product: Product, processors: int) -> Tile:
    # As long as threads load 16 bytes at once, even if some have nothing to load: x is then where it is multiplied.
    step = min(LONGEST_STEP, 1 << (product.inputs - 1).bit_length())
    rows = max(2, AT_ONCE // (step * (1 + product.gated)))
    while rows > 2 and -(-product.outputs // rows) < 3 * NEARLY * processors:
        rows //= 2
    return Tile(rows, step, 1, 2, 4)
