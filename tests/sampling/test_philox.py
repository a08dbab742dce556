"""The random bits are Random123's, and map to (seed, position, token) as documented."""

import math

import pytest
import torch

from quire.sampling.philox import Words, fold, gumbel, noise, philox, uniform

ONES = 0xFFFFFFFF


def words(values: tuple[int, ...]) -> Words:
    return Words(*(torch.tensor(value) for value in values))


def bits_of(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    return tuple(int(word) for word in philox(words(counter), (torch.tensor(key[0]), torch.tensor(key[1]))))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert bits_of(counter, key) == expected


def test_uniform_stays_inside_and_is_fine_near_zero() -> None:
    u = uniform(torch.tensor([0, 1, 2**31, ONES - 1, ONES]))
    assert u.dtype == torch.float32
    assert u.tolist() == [2.0**-33, 2.0**-32 + 2.0**-33, 0.5, 1 - 2.0**-24, 1 - 2.0**-24]


def test_gumbel_is_finite_and_grows_as_u_shrinks() -> None:
    g = gumbel(torch.tensor([2.0**-33, 0.1, 0.5, 1 - 2.0**-24]))
    exact = [-math.log(-math.log1p(-u)) for u in (2.0**-33, float(torch.tensor(0.1)), 0.5, 1 - 2.0**-24)]
    torch.testing.assert_close(g, torch.tensor(exact), rtol=1e-6, atol=1e-6)


def test_noise_takes_word_by_token_and_counter_by_position() -> None:
    seed, position = -3, (5 << 32) + 9
    found = noise(torch.tensor([1, seed]), torch.tensor([0, position]), range(11))
    key = (seed & ONES, seed >> 32 & ONES)
    bits = [word for group in range(3) for word in bits_of((group, 9, 5, 0), key)][:11]
    assert torch.equal(found[1], gumbel(uniform(torch.tensor(bits))))


def test_fold_gives_signed_64_bit_seeds_that_differ() -> None:
    seeds = {fold(seed, i, j) for seed in (0, 1, -1, 2**63 - 1) for i in range(20) for j in range(20)}
    assert len(seeds) == 4 * 20 * 20
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert any(seed < 0 for seed in seeds)
    assert fold(7, 1, 2) == fold(7, 1, 2) != fold(7, 2, 1)
