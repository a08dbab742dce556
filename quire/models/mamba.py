"""Mamba 2, and Bamba: attention in some layers, state spaces in the others."""

import math
from collections.abc import Sequence

from quire.errors import ModelError
from quire.models.common import attention, biases, decoder, head_dim, mlp, pre_norm, rope
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import Block, Decoder, Mamba2, Norm

LONGEST = 32_768  # of networks whose config names no limit, and that have none: states do not grow
LINEAR, FULL = ("linear_attention", "mamba"), ("full_attention", "attention")
NAMES = Names(
    renames=(
        (r"^(backbone|model)\.", ""),
        (r"^embeddings?\.", "embed_tokens."),
        (r"^norm_f\.", "norm."),
        (r"\.norm\.", ".attn_norm."),
        (r"\.mixer\.attn_norm\.", ".mixer.norm."),
    )
)


def mamba2(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(eps=c.get("layer_norm_epsilon", 1e-5))
    c.skip("time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "chunk_size", "expand")
    c.skip("residual_in_fp32", "rescale_prenorm_residual")
    refuse_activation(c, "hidden_act")
    mixer = Mamba2(
        num_heads=c.count("num_heads"),
        head_dim=c.count("head_dim"),
        state_dim=c.count("state_size"),
        groups=c.count("n_groups"),
        width=c.count("conv_kernel"),
        norm=norm,
        bias=bool(c.use_bias),
        conv_bias=bool(c.get("use_conv_bias", True)),
        time_step=time_step(c),
    )
    block = Block(mixer=mixer, mlp=None, attn_norm=norm, mlp_norm=None)
    return decoder(c, block, norm, max_length=c.max_position_embeddings or LONGEST), NAMES


def bamba(c: HF) -> tuple[Decoder, Names]:
    """Rotary embedding of half a head."""
    c.skip("z_loss_coefficient", "num_logits_to_keep", "partial_rotary_factor")
    norm, at = Norm(eps=c.number("rms_norm_eps")), c.attn_layer_indices or ()
    rotary = rope(c, head_dim(c), partial=0.5)
    whole = attention(c, num_kv_heads=c.count("num_key_value_heads"), rope=rotary, **biases(c))
    scan, feed_forward = scanning(c, norm), mlp(c, bias=bool(c.mlp_bias))

    def block(i: int) -> Block:
        return pre_norm(whole if i in at else scan, feed_forward, norm)

    renames = (
        *LLAMA,
        (r"^final_layernorm\.", "norm."),
        (r"\.mamba\.", ".mixer."),
        (r"\.pre_ff_layernorm\.", ".mlp_norm."),
        (r"\.feed_forward\.", ".mlp."),
    )
    return decoder(c, block, norm), Names(renames=renames)


def scanning(c: HF, norm: Norm) -> Mamba2:
    """The mixer of layers that are not attention, with the usual keys of networks that have both."""
    c.skip("mamba_chunk_size")
    refuse_activation(c, "hidden_act")
    heads, size = c.count("mamba_n_heads"), c.mamba_d_head
    if not isinstance(size, int):
        size = c.count("mamba_expand") * c.count("hidden_size") // heads
    c.skip("mamba_expand")
    return Mamba2(
        num_heads=heads,
        head_dim=size,
        state_dim=c.count("mamba_d_state"),
        groups=c.count("mamba_n_groups"),
        width=c.count("mamba_d_conv"),
        norm=norm,
        bias=bool(c.mamba_proj_bias),
        conv_bias=bool(c.get("mamba_conv_bias", True)),
        time_step=time_step(c),
    )


def refuse_activation(c: HF, key: str) -> None:
    """What follows the convolution can be SiLU only."""
    kind = c.get(key, "silu")
    c.refuse(kind not in ("silu", "swish"), f"{key}={kind!r} after a convolution")


def time_step(c: HF) -> tuple[float, float]:
    """The limits of time steps; infinity is written in either of two ways."""
    limits = c.get("time_step_limit", (0.0, math.inf))
    if not isinstance(limits, Sequence) or len(limits) != 2:
        raise ModelError(f"config.json: time_step_limit is {limits!r}; it must be two numbers")
    least, most = (float(n["__float__"]) if isinstance(n, dict) else float(n) for n in limits)
    return least, most


def is_attention(c: HF, kinds: Sequence[str]) -> list[bool]:
    """For each layer, whether it is attention."""
    unknown = sorted(set(map(str, kinds)) - {*LINEAR, *FULL})
    c.refuse(bool(unknown), f"layer type {', '.join(unknown)}")
    return [kind in FULL for kind in kinds]
