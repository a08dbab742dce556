"""Mamba, Falcon Mamba, Mamba 2; Jamba and Bamba: attention in some layers, state spaces in the others."""

import math
from collections.abc import Sequence

from quire.errors import ModelError
from quire.models.common import attention, biases, decoder, head_dim, mlp, pre_norm, rope, tied_by_default
from quire.models.hf import HF
from quire.models.names import LLAMA, Names, Split
from quire.models.spec import Block, Decoder, Mamba, Mamba2, MoE, Norm

LONGEST = 32_768  # of networks whose config names no limit, and that have none: states do not grow
LINEAR, FULL = ("linear_attention", "mamba"), ("full_attention", "attention")
RENAMES = (
    (r"^(backbone|model)\.", ""),
    (r"^embeddings?\.", "embed_tokens."),
    (r"^norm_f\.", "norm."),
    (r"\.norm\.", ".attn_norm."),
    (r"\.mixer\.attn_norm\.", ".mixer.norm."),
)
ONE_HEAD = (r"\.mixer\.(x_proj|dt_proj|A_log|D|dt_layernorm|b_layernorm|c_layernorm)\b", r".mixer.heads.0.\1")

HYBRID = (
    *LLAMA,
    (r"^final_layernorm\.", "norm."),
    (r"\.mamba\.", ".mixer."),
    (r"\.pre_ff_layernorm\.", ".mlp_norm."),
    (r"\.feed_forward\.", ".mlp."),
)


def mamba(c: HF, norm: Norm | None = None) -> tuple[Decoder, Names]:
    """`norm` is the mixers'."""
    c.skip("time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan")
    _skip_training(c)
    refuse_activation(c, "hidden_act")
    mixer = Mamba(
        channels=c.intermediate_size or int(c.get("expand", 2) * c.count("hidden_size")),
        state_dim=c.count("state_size"),
        step_rank=step_rank(c, "time_step_rank"),
        width=c.count("conv_kernel"),
        norm=norm,
        bias=bool(c.use_bias),
        conv_bias=bool(c.get("use_conv_bias", True)),
    )
    c.skip("expand")
    names = Names(renames=(*RENAMES, ONE_HEAD), splits=values_and_gate(mixer))
    return _one_kind(c, mixer, tied=tied_by_default(c)), names


def values_and_gate(s: Mamba, per_group: int = 1) -> dict[str, Split]:
    return {"in_proj": Split(dict.fromkeys(("value_proj", "gate_proj"), s.channels), per_group)}


def falcon_mamba(c: HF) -> tuple[Decoder, Names]:
    """Mamba, with norms that have no weights."""
    c.skip("use_falcon_mambapy")
    return mamba(c, Norm(eps=c.get("mixer_rms_eps", 1e-6), weight=False))


def mamba2(c: HF) -> tuple[Decoder, Names]:
    c.skip("time_step_rank", "chunk_size", "expand", "intermediate_size")
    c.skip(
        "norm_before_gate", "rms_norm"
    )  # Hugging Face's network has that norm, behind the gate, whatever they say
    _skip_training(c)
    refuse_activation(c, "hidden_act")
    mixer = Mamba2(
        num_heads=c.count("num_heads"),
        head_dim=c.count("head_dim"),
        state_dim=c.count("state_size"),
        groups=c.count("n_groups"),
        width=c.count("conv_kernel"),
        norm=_norm(c),
        bias=bool(c.use_bias),
        conv_bias=bool(c.get("use_conv_bias", True)),
        time_step=time_step(c),
    )
    return _one_kind(c, mixer), Names(renames=RENAMES)


def _norm(c: HF) -> Norm:
    return Norm(eps=c.get("layer_norm_epsilon", 1e-5))


def _skip_training(c: HF) -> None:
    """Keys of how weights begin; and residuals are as exact as kernels hold them, whatever the config says."""
    c.skip(
        "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual", "residual_in_fp32"
    )


def _one_kind(c: HF, mixer: Mamba | Mamba2, **changes: bool) -> Decoder:
    """A network of such mixers and nothing else."""
    block = Block(mixer=mixer, mlp=None, attn_norm=_norm(c), mlp_norm=None)
    return decoder(c, block, _norm(c), max_length=c.max_position_embeddings or LONGEST, **changes)


def step_rank(c: HF, key: str) -> int:
    rank = c.get(key, "auto")
    return math.ceil(c.count("hidden_size") / 16) if rank == "auto" else c.count(key)


def jamba(c: HF) -> tuple[Decoder, Names]:
    """Attention knows no positions; experts in some layers (Lieber et al. 2024)."""
    c.skip("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep")
    c.refuse_if_set("sliding_window")
    refuse_activation(c, "hidden_act")
    norm = Norm(eps=c.number("rms_norm_eps"))
    whole = attention(c, rope=None)
    scan = Mamba(
        channels=c.count("mamba_expand") * c.count("hidden_size"),
        state_dim=c.count("mamba_d_state"),
        step_rank=step_rank(c, "mamba_dt_rank"),
        width=c.count("mamba_d_conv"),
        norm=norm,
        bias=bool(c.mamba_proj_bias),
        conv_bias=bool(c.get("mamba_conv_bias", True)),
    )
    num_experts, top_k, dense = c.count("num_experts"), c.count("num_experts_per_tok"), mlp(c)
    moe = MoE(num_experts=num_experts, top_k=top_k, expert=dense, renorm=False) if num_experts > 1 else dense

    def block(i: int) -> Block:
        attends = i % c.count("attn_layer_period") == c.stated("attn_layer_offset")
        has_experts = i % c.count("expert_layer_period") == c.stated("expert_layer_offset")
        return pre_norm(whole if attends else scan, moe if has_experts else dense, norm)

    renames = (*HYBRID, ONE_HEAD, (r"\.mlp\.router\.", ".mlp.gate."))
    return decoder(c, block, norm), Names(renames=renames, splits=values_and_gate(scan))


def bamba(c: HF) -> tuple[Decoder, Names]:
    """Rotary embedding of half a head."""
    c.skip("z_loss_coefficient", "num_logits_to_keep", "partial_rotary_factor")
    norm, at = Norm(eps=c.number("rms_norm_eps")), c.attn_layer_indices or ()
    rotary = rope(c, head_dim(c), partial=0.5)
    whole = attention(c, num_kv_heads=c.count("num_key_value_heads"), rope=rotary, **biases(c))
    scan, feed_forward = scanning(c, norm), mlp(c, bias=bool(c.mlp_bias))

    def block(i: int) -> Block:
        return pre_norm(whole if i in at else scan, feed_forward, norm)

    return decoder(c, block, norm), Names(renames=HYBRID)


def scanning(c: HF, norm: Norm, inner: int | None = None) -> Mamba2:
    """The mixer of layers that are not attention, with the usual keys of networks that have both.

    `inner`: how many dimensions all heads have, if not mamba_expand times the network's.
    """
    c.skip("mamba_chunk_size", "mamba_expand")
    refuse_activation(c, "hidden_act")
    heads, size = c.count("mamba_n_heads"), c.mamba_d_head
    if not isinstance(size, int):
        size = (inner or c.count("mamba_expand") * c.count("hidden_size")) // heads
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
