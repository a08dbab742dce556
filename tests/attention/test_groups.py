"""How layers divide the cache's blocks among them."""

from dataclasses import replace

import pytest

from quire.attention.groups import cache_layout
from quire.attention.shapes import block_bytes, layer_offsets
from quire.errors import ConfigError
from quire.models import spec
from quire.scheduler.near import Near

NORM = spec.Norm()
FAR = spec.Attention(num_heads=4, num_kv_heads=2, head_dim=32, rope=None)
NEAR = replace(FAR, window=100)
SIZE, ITEM = 16, 2


def network(*mixers: spec.Mixer | None) -> spec.Decoder:
    mlp = spec.MLP(hidden=8)
    blocks = tuple(spec.Block(mixer=m, mlp=mlp, attn_norm=NORM, mlp_norm=NORM) for m in mixers)
    return spec.Decoder(vocab_size=8, dim=8, max_length=1000, blocks=blocks, norm=NORM)


def test_near_layers_lie_beside_far_ones_in_blocks_of_one_size() -> None:
    found = cache_layout(network(NEAR, NEAR, FAR, NEAR, NEAR, FAR), SIZE, ITEM, max_length=1000)
    share = block_bytes(network(FAR), SIZE, ITEM)
    assert found.block_bytes == 2 * share
    assert found.groups == (1, 1, 0, 2, 2, 0)
    assert found.offsets == (0, share, 0, 0, share, share)
    assert found.near == Near(parts=2, window=100)


@pytest.mark.parametrize("mixers", [(FAR, FAR), (replace(FAR, window=1000), FAR), (NEAR, *[FAR] * 9)])
def test_where_nothing_is_gained_layers_share_blocks(mixers: tuple[spec.Mixer, ...]) -> None:
    s = network(*mixers)
    found = cache_layout(s, SIZE, ITEM, max_length=1000)
    assert found.near is None and set(found.groups) == {0}
    assert (found.block_bytes, found.offsets) == (block_bytes(s, SIZE, ITEM), layer_offsets(s, SIZE, ITEM))


def test_where_all_are_near_the_blocks_are() -> None:
    s = network(NEAR, replace(NEAR, window=50), None)
    found = cache_layout(s, SIZE, ITEM, max_length=1000)
    assert found.near == Near(parts=0, window=100)
    assert (found.block_bytes, found.groups) == (block_bytes(s, SIZE, ITEM), (0, 0, 0))
    assert cache_layout(s, SIZE, ITEM).near is None, "nobody said how long sequences are"


def test_what_a_far_layer_reads_is_far() -> None:
    shares = replace(FAR, shares=0)
    assert cache_layout(network(NEAR, shares), SIZE, ITEM, max_length=1000).near is None
    shares = replace(NEAR, shares=0, window=150)
    assert cache_layout(network(NEAR, shares), SIZE, ITEM, max_length=1000).near == Near(parts=0, window=150)


def test_chunks_begin_with_a_block() -> None:
    s = network(replace(FAR, chunk=64), FAR)
    found = cache_layout(s, SIZE, ITEM, max_length=1000)
    assert found.near == Near(parts=1, chunk=64) and found.groups == (1, 0)
    assert cache_layout(s, SIZE, ITEM, max_length=64).near is None
    with pytest.raises(ConfigError, match="block_size is 24; it must divide 64"):
        cache_layout(s, 24, ITEM, max_length=1000)
