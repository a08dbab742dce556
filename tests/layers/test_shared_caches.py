"""A layer that reads another's keys and values computes what it would with keys and values like those of its own."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.attention.base import Backend, ragged
from quire.attention.cpu import Cpu
from quire.attention.reference import Reference
from quire.attention.shapes import block_bytes
from quire.layers.decoder import Decoder
from quire.models import spec
from quire.models.parameters import parameter_shapes

DIM, VOCAB_SIZE, NUM_BLOCKS = 48, 40, 8
NORM = spec.Norm(eps=0.1)
PLAIN = spec.Attention(num_heads=6, num_kv_heads=2, head_dim=16, rope=spec.Rope(dim=16, theta=100.0))
KINDS = {
    "turned": PLAIN,
    "normalised": replace(PLAIN, qk_norm=NORM),
    "normalised after": replace(PLAIN, qk_norm=NORM, norm_after_rope=True),
    "normalised whole": replace(PLAIN, qk_norm=NORM, qk_norm_span="full"),
    "values normalised": replace(PLAIN, qk_norm=NORM, v_norm=spec.Norm(weight=False)),
    "values are keys": replace(PLAIN, qk_norm=NORM, keys_as_values=True),
    "both": replace(PLAIN, qk_norm=NORM, v_norm=spec.Norm(weight=False), keys_as_values=True),
    "biased, local": replace(PLAIN, bias=True, window=3),
}
BACKENDS: list[Backend] = [
    b for b in (Reference(4), Cpu()) if b.why_not(torch.float32, torch.device("cpu")) is None
]


class Weights:
    """Random ones by name; the first layer adds nothing, and the second has its norm, keys and values."""

    def __init__(self, s: spec.Decoder) -> None:
        generator = torch.Generator().manual_seed(0)
        self.found = {
            name: torch.randn(shape, generator=generator) * 0.5 for name, shape in parameter_shapes(s)
        }
        self.found["layers.0.mixer.o_proj.weight"].zero_()
        for name in list(self.found):
            if name.startswith("layers.1.") and ("_norm" in name or ".k_" in name or ".v_" in name):
                self.found[name] = self.found[name.replace(".1.", ".0.", 1)]

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        assert self.found[name].shape == shape
        return self.found[name]


def network(attention: spec.Attention, shares: bool) -> spec.Decoder:
    first = spec.Block(mixer=attention, mlp=None, attn_norm=NORM, mlp_norm=None)
    second = replace(first, mixer=replace(attention, shares=0)) if shares else first
    return spec.Decoder(vocab_size=VOCAB_SIZE, dim=DIM, max_length=64, blocks=(first, second), norm=NORM)


def logits(s: spec.Decoder, weights: Weights, backend: Backend, chunks: tuple[int, ...]) -> Tensor:
    decoder = Decoder(s, backend=backend, dtype=torch.float32)
    decoder.load(weights)
    pool = torch.zeros(NUM_BLOCKS, block_bytes(s, backend.block_size, 4), dtype=torch.uint8)
    caches, parts, start = decoder.caches(pool), [], 0
    for count in chunks:
        ids = torch.arange(start, start + count) * 7 % VOCAB_SIZE
        step = ragged([start], [count], [list(range(NUM_BLOCKS))], backend.block_size)
        parts.append(decoder.logits(decoder(ids, step, caches)))
        start += count
    return torch.cat(parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_shared_keys_and_values_are_as_good_as_own_ones(backend: Backend, kind: str) -> None:
    own, shared = (network(KINDS[kind], shares) for shares in (False, True))
    weights = Weights(own)
    assert {name for name, _ in parameter_shapes(shared)} < set(weights.found)
    want = logits(own, weights, backend, (13,))
    for chunks in ((13,), (5, 1, 7)):
        got = logits(shared, weights, backend, chunks)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * want.abs().max().item())
    weights.found["layers.0.mixer.k_proj.weight"] *= -1.0  # what both read
    assert (logits(shared, weights, backend, (13,)) - want).abs().max() > 0.01
