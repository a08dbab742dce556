"""How large the cache is, from a spec alone."""

from dataclasses import replace

from quire.attention.shapes import CacheShape, block_bytes, cache_shapes, layer_offsets, layers_read
from quire.models.parameters import kv_bytes_per_token
from quire.models.spec import MLA, MLP, Attention, Block, Decoder, Indexer, Norm, Rope, num_chosen

NORM = Norm()
ATTENTION = Attention(num_heads=16, num_kv_heads=8, head_dim=128, rope=None)
LATENT = MLA(
    num_heads=16, q_rank=None, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, rope=Rope(dim=64), norm=NORM
)


def decoder(*mixers: Attention | MLA) -> Decoder:
    blocks = tuple(Block(mixer=m, mlp=MLP(hidden=8), attn_norm=NORM, mlp_norm=NORM) for m in mixers)
    return Decoder(vocab_size=8, dim=8, max_length=64, blocks=blocks, norm=NORM)


def test_keys_and_values_of_every_layer() -> None:
    spec = decoder(*[ATTENTION] * 28)
    assert block_bytes(spec, 16, 2) == 28 * 2 * 8 * 128 * 16 * 2
    assert layer_offsets(spec, 16, 2)[:3] == (0, 65536, 131072)


def test_latent_attention_stores_one_latent_and_one_key() -> None:
    assert cache_shapes(decoder(LATENT)) == (CacheShape(1, 576, 512, v_in_k=True),)
    assert block_bytes(decoder(LATENT), 64, 2) == 64 * 576 * 2


def test_an_indexer_stores_a_key_of_its_own_after_the_latent() -> None:
    indexer = Indexer(num_heads=64, head_dim=128, top_k=2048, rope=Rope(dim=64), norm=NORM)
    own = replace(LATENT, indexer=indexer)
    spec = decoder(own, replace(own, indexer=replace(indexer, own=False)), LATENT)
    assert cache_shapes(spec)[0].index == CacheShape(1, 128, 128, v_in_k=True)
    assert layer_offsets(spec, 64, 2) == (0, 64 * 704 * 2, 64 * (704 + 576) * 2)
    assert block_bytes(spec, 64, 2) == 64 * 2 * (704 + 2 * 576) == 64 * kv_bytes_per_token(spec)
    assert (num_chosen(spec, 2049), num_chosen(spec, 2048), num_chosen(decoder(LATENT), 9999)) == (2048, 0, 0)


def test_shares_are_aligned_and_odd_dimensions_padded() -> None:
    odd = Attention(num_heads=1, num_kv_heads=1, head_dim=10, rope=None)
    spec = decoder(odd, ATTENTION, odd)
    assert all(offset % 64 == 0 for offset in layer_offsets(spec, 1, 2))
    assert CacheShape(1, 10, 10).k_bytes(1, 2) == 64
    assert block_bytes(spec, 16, 2) == sum(s.num_bytes(16, 2) for s in cache_shapes(spec))


def test_a_quantized_cache_has_a_byte_a_number_and_a_scale_a_head() -> None:
    spec = decoder(*[ATTENTION] * 28)
    assert block_bytes(spec, 16, 2, quantized=True) == 28 * 2 * 8 * (128 + 4) * 16
    assert layer_offsets(spec, 16, 2, quantized=True)[1] == 2 * 8 * (128 + 4) * 16
    assert block_bytes(decoder(LATENT), 64, 2, quantized=True) == 64 * (576 + 2 * 4)  # two scales
    assert CacheShape(1, 10, 10).k_bytes(3, 4, quantized=True) == 64  # 3 * (16 + 4), rounded up


def test_a_layer_that_shares_takes_no_room() -> None:
    spec = decoder(
        ATTENTION, ATTENTION, replace(ATTENTION, shares=1), replace(ATTENTION, shares=0), ATTENTION
    )
    assert layers_read(spec) == (0, 1, 1, 0, 4)
    assert block_bytes(spec, 16, 2) == block_bytes(decoder(*[ATTENTION] * 3), 16, 2)
    assert kv_bytes_per_token(spec) == kv_bytes_per_token(decoder(*[ATTENTION] * 3))
    assert layer_offsets(spec, 16, 2)[4] == 2 * 65536
