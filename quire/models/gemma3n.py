"""Gemma 3n (text): several streams, embeddings for each layer, sparse gates, layers without keys of their own."""

from collections.abc import Sequence
from typing import Any

from quire.models.common import attention, biases, decoder, layer_types, mlp, sandwich, tied_by_default
from quire.models.gemma import rope_per_type
from quire.models.gemma4 import layer_embedding, shared_layers, unused_keys
from quire.models.hf import HF
from quire.models.names import SANDWICH, Names
from quire.models.spec import AltUp, Block, Decoder, Norm

SPARSE_LAYERS, SPARSITY = 10, 0.95


def gemma3n(c: HF) -> tuple[Decoder, Names]:
    """Four of five layers are local."""
    c.skip("altup_coef_clip")  # is for training
    local, norm = layer_types(c, lambda i: (i + 1) % 5 != 0), Norm(eps=c.number("rms_norm_eps"))
    shares, sparsity = shared_layers(c, local), _sparsity(c, len(local))
    hidden = _by_layer(c, "intermediate_size", c.need("intermediate_size"), len(local))
    embedding, changes = layer_embedding(c, norm)
    altup = AltUp(
        num=c.count("altup_num_inputs"),
        active=c.stated("altup_active_idx"),
        is_scaled=bool(c.get("altup_correct_scale", True)),
        rank=c.count("laurel_rank"),
        norm=norm,
    )
    c.refuse(
        not 0 <= altup.active < altup.num, f"altup_active_idx={altup.active} of {altup.num} altup_num_inputs"
    )

    def block(i: int) -> Block:
        mixer = attention(
            c,
            head_dim=c.count("head_dim"),
            rope=rope_per_type(c, local[i]),
            qk_norm=norm,
            v_norm=Norm(eps=norm.eps, weight=False),
            shares=shares[i],
            scale=1.0,
            window=c.count("sliding_window") if local[i] else None,
            **biases(c),
        )
        feed_forward = mlp(c, act=c.text("hidden_activation"), hidden=hidden[i], sparsity=sparsity[i])
        return sandwich(mixer, feed_forward, norm, altup=altup, embedding=embedding)

    changes |= {"embed_scale": c.count("hidden_size") ** 0.5, "tied": tied_by_default(c)}
    spec = decoder(c, block, norm, logit_softcap=c.get("final_logit_softcapping", 30.0), **changes)
    return spec, Names(renames=SANDWICH, ignored=unused_keys(shares))


def _sparsity(c: HF, num_layers: int) -> Sequence[float]:
    shares = c.activation_sparsity_pattern
    if shares is None:
        sparse = SPARSE_LAYERS if num_layers > SPARSE_LAYERS else 0
        shares = [SPARSITY] * sparse + [0.0] * (num_layers - sparse)
    shares = _by_layer(c, "activation_sparsity_pattern", shares, num_layers)
    c.refuse(not all(0 <= share < 1 for share in shares), f"activation_sparsity_pattern={shares}")
    return shares


def _by_layer(c: HF, key: str, value: Any, num_layers: int) -> Sequence[Any]:
    """A value for each layer, from a list of them or one for all."""
    values = value if isinstance(value, list) else [value] * num_layers
    c.refuse(len(values) != num_layers, f"{key} of {len(values)} layers with num_hidden_layers={num_layers}")
    return values
