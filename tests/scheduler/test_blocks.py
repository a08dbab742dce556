"""Blocks: who holds them, what is found again, what is evicted first."""

import struct
from array import array
from hashlib import blake2b

import pytest

from quire.errors import CapacityError, ConfigError
from quire.scheduler.blocks import BlockPool
from quire.types import Coordinates
from tests.scheduler.device import SECRET

TOKENS = array("q", (5, 1, 4, 1, 5, 9, 2, 6, 5, 3))


def keys_of(pool: BlockPool, tokens: array, root: bytes = b"root") -> list[bytes]:
    keys: list[bytes] = []
    pool.extend_keys(keys, root, tokens, len(tokens) // pool.block_size)
    return keys


def published(pool: BlockPool, tokens: array) -> list[int]:
    """Blocks that hold all full blocks of some tokens, findable and held once."""
    keys = keys_of(pool, tokens)
    blocks = pool.take(len(keys))
    for key, block in zip(keys, blocks, strict=True):
        pool.publish(key, block)
    return blocks


def test_keys_depend_on_all_that_comes_before_and_on_the_secret() -> None:
    pool = BlockPool(8, 2, secret=SECRET)
    keys = keys_of(pool, TOKENS)
    assert len(set(keys)) == len(keys) == 5 and {len(key) for key in keys} == {16}
    changed = array("q", (6, *TOKENS[1:]))
    for other in (
        keys_of(pool, changed),
        keys_of(pool, TOKENS, b"other"),
        keys_of(BlockPool(8, 2, secret=b"other"), TOKENS),
    ):
        assert not set(keys) & set(other)
    last = array("q", (*TOKENS[:-1], 0))
    assert keys_of(pool, last)[:-1] == keys[:-1] and keys_of(pool, last)[-1] != keys[-1]


def test_keys_grow_with_the_sequence() -> None:
    pool = BlockPool(8, 2, secret=SECRET)
    keys: list[bytes] = []
    for num in (0, 1, 1, 4, 5):
        pool.extend_keys(keys, b"root", TOKENS, num)
        assert len(keys) == num
    assert keys == keys_of(pool, TOKENS)


def test_coordinates_enter_the_keys_of_blocks_that_have_others_than_text() -> None:
    """And so all that come after them. What comes after a prompt's end has them as if it were the prompt's."""
    pool = BlockPool(8, 2, secret=SECRET)

    def keys(*rows: tuple[int, ...]) -> list[bytes]:
        found: list[bytes] = []
        pool.extend_keys(found, b"root", TOKENS, 5, Coordinates.of(rows))
        return found

    text, plain = tuple(range(10)), keys_of(pool, TOKENS)
    assert keys(text, text, text) == keys(text[:3], text[:3], text[:3]) == plain
    image = (0, 1, 2, 2, 2, 2, 4, 5, 6, 7), (0, 1, 2, 2, 3, 3, 4, 5, 6, 7), (0, 1, 2, 3, 2, 3, 4, 5, 6, 7)
    found = keys(*image)
    assert found[0] == plain[0] and not set(found[1:]) & set(plain)
    assert keys(*(row[:6] for row in image)) == found
    assert not set(keys(image[0], image[2], image[1])[1:]) & set(found)


def test_the_key_is_the_documented_hash() -> None:
    pool = BlockPool(8, 2, secret=SECRET)
    parent, keys = b"root", keys_of(pool, TOKENS)
    for i, key in enumerate(keys):
        data = parent + struct.pack("<2q", *TOKENS[2 * i : 2 * i + 2])
        assert key == (parent := blake2b(data, digest_size=16, key=SECRET).digest())


def test_a_chain_is_found_up_to_its_first_missing_block() -> None:
    pool = BlockPool(8, 2, secret=SECRET)
    blocks = published(pool, TOKENS)
    keys = keys_of(pool, TOKENS)
    assert pool.match(keys) == blocks
    assert pool.match([keys[0], b"unknown", keys[2]]) == blocks[:1]
    pool.forget(blocks[1:2])
    assert pool.match(keys) == blocks[:1]


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    pool = BlockPool(5, 2, secret=SECRET)
    blocks = published(pool, TOKENS)
    pool.release(blocks)
    keys = keys_of(pool, TOKENS)
    for left in (4, 3, 2, 1, 0):
        pool.take(1)
        assert pool.match(keys) == blocks[:left]


def test_the_least_recently_released_chain_is_evicted_first() -> None:
    pool = BlockPool(4, 2, secret=SECRET)
    old, new = TOKENS[:4], TOKENS[4:8]
    for blocks in (published(pool, old), published(pool, new)):
        pool.release(blocks)
    again = pool.match(keys_of(pool, old))
    pool.hold(again)
    pool.release(again)  # now it is the one used last
    pool.take(2)
    assert len(pool.match(keys_of(pool, old))) == 2 and not pool.match(keys_of(pool, new))


def test_blocks_with_nothing_to_find_are_taken_first() -> None:
    pool = BlockPool(4, 2, secret=SECRET)
    chain = published(pool, TOKENS[:4])
    pool.release(chain)
    rest = pool.take(2)
    assert not set(rest) & set(chain)
    pool.release(rest)
    assert set(pool.take(2)) == set(rest)
    assert pool.match(keys_of(pool, TOKENS[:4])) == chain


def test_shared_blocks_are_free_when_the_last_holder_lets_go() -> None:
    pool = BlockPool(4, 2, secret=SECRET)
    blocks = published(pool, TOKENS[:4])
    pool.hold(blocks)
    assert pool.num_idle(blocks) == 0 and pool.num_used == 2
    pool.release(blocks)
    assert pool.num_used == 2
    pool.release(blocks)
    assert pool.num_used == 0 and pool.num_free == 4 and pool.num_idle(blocks) == 2


def test_too_many_blocks_are_not_taken_at_all() -> None:
    pool = BlockPool(3, 2, secret=SECRET)
    with pytest.raises(CapacityError, match="4 blocks are needed and 3 are free"):
        pool.take(4)
    assert pool.num_free == 3


def test_of_two_blocks_with_one_content_the_first_is_found() -> None:
    pool = BlockPool(4, 2, secret=SECRET)
    first, second = published(pool, TOKENS[:2]), published(pool, TOKENS[:2])
    pool.release(second)
    assert pool.match(keys_of(pool, TOKENS[:2])) == first
    pool.take(3)  # the second block among them
    assert pool.match(keys_of(pool, TOKENS[:2])) == first


def test_without_caching_only_held_blocks_are_found() -> None:
    pool = BlockPool(4, 2, secret=SECRET, caching=False)
    blocks = published(pool, TOKENS[:4])
    keys = keys_of(pool, TOKENS[:4])
    pool.hold(blocks[:1])
    pool.release(blocks)
    assert pool.match(keys) == blocks[:1]
    pool.release(blocks[:1])
    assert pool.match(keys) == []


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "secret"), [(0, 4, b"x"), (4, 0, b"x"), (4, 4, b""), (4, 4, b"x" * 65)]
)
def test_impossible_pools_are_refused(num_blocks: int, block_size: int, secret: bytes) -> None:
    with pytest.raises(ConfigError, match="must"):
        BlockPool(num_blocks, block_size, secret=secret)


def test_what_made_room_is_remembered_and_what_is_behind_it_is_no_news() -> None:
    pool = BlockPool(5, 2, secret=SECRET)
    keys, blocks = keys_of(pool, TOKENS), published(pool, TOKENS)
    unknown = keys_of(pool, array("q", (0, 0)))[0]
    pool.release(blocks[:1])  # the chain's head makes room, the rest stays
    pool.take(1)
    assert pool.match(keys) == []
    assert [pool.was_evicted(key) for key in keys] == [True] * 5
    assert not pool.was_evicted(unknown)
    pool.forget(blocks[1:])  # as what a failed sequence wrote: nobody had to make room
    assert [pool.was_evicted(key) for key in keys] == [True] + [False] * 4


def test_not_everything_that_made_room_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.scheduler.blocks.MAX_EVICTED", 2)
    pool = BlockPool(5, 2, secret=SECRET)
    keys, blocks = keys_of(pool, TOKENS), published(pool, TOKENS)
    pool.release(blocks)
    pool.take(5)
    assert [pool.was_evicted(key) for key in keys] == [True, True, False, False, False]  # heads went last
