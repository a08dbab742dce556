"""Nemotron 3 and 4, Minitron: layer norms that store weight - 1, squared ReLU, rotary halves of heads.

Nemotron-H: layers of one part each, state spaces, attention, or feed-forward.
"""

import math
from collections.abc import Callable, Mapping

from quire.models.common import (
    activation,
    attention,
    biases,
    decoder,
    head_dim,
    kv_heads,
    mlp,
    pre_norm,
    rope,
)
from quire.models.hf import HF
from quire.models.mamba import RENAMES, refuse_activation
from quire.models.names import LLAMA, Names
from quire.models.spec import MLP, Attention, Block, Decoder, Mamba2, MoE, Norm

KINDS = {
    "M": "mamba",
    "linear_attention": "mamba",
    "*": "attention",
    "full_attention": "attention",
    "-": "mlp",
}
KINDS |= {"E": "moe"} | {name: name for name in ("mamba", "attention", "mlp", "moe")}


def nemotron(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(kind="layer", eps=c.number("norm_eps"), bias=True, offset=1.0)
    attn = attention(c, rope=rope(c, head_dim(c), partial=0.5), num_kv_heads=kv_heads(c), **biases(c))
    feed_forward = mlp(c, gated=False, bias=bool(c.mlp_bias))
    return decoder(c, pre_norm(attn, feed_forward, norm), norm), Names(renames=LLAMA)


def nemotron_h(c: HF) -> tuple[Decoder, Names]:
    """Attention knows no positions. The experts' layers route as DeepSeek V3's do."""
    c.refuse_if_set("attention_bias", "sliding_window", "moe_latent_size", "tie_word_embeddings")
    norm, listed = Norm(eps=c.number("layer_norm_epsilon")), _layers(c)
    parts = {kind: PARTS[kind](c) for kind in set(listed)}

    def block(i: int) -> Block:
        part = parts[listed[i]]
        if isinstance(part, Attention | Mamba2):
            return Block(mixer=part, mlp=None, attn_norm=norm, mlp_norm=None)
        return Block(mixer=None, mlp=part, attn_norm=norm, mlp_norm=None)

    c.skip("residual_in_fp32", "rescale_prenorm_residual", "num_logits_to_keep")
    c.skip(
        "num_hidden_layers",
        "num_nextn_predict_layers",
        "mtp_layers_block_type",
        "mtp_hybrid_override_pattern",
    )
    renames = (
        *RENAMES,
        (r"\.mixer\.((up|down)_proj|gate|(shared_)?experts)\.", r".mlp.\1."),
        (r"\.shared_experts\.", ".shared."),
    )
    return decoder(c, block, norm, num_layers=len(listed)), Names(renames=renames, ignored=(r"^mtp\.",))


def _layers(c: HF) -> list[str]:
    """Each layer's kind, which a list of words says, or a string of letters."""
    found = c.need("layers_block_type", "layer_types", "hybrid_override_pattern")
    c.skip("layer_types", "hybrid_override_pattern")
    unknown = sorted(set(map(str, found)) - set(KINDS))
    c.refuse(bool(unknown), f"layer type {', '.join(unknown)}")
    return [KINDS[kind] for kind in found]


def _scan(c: HF) -> Mamba2:
    refuse_activation(c, "mamba_hidden_act")
    c.skip("expand", "chunk_size", "mamba_proj_bias", "use_mamba_kernels", "mamba_ssm_cache_dtype")
    c.skip("time_step_max", "time_step_floor", "time_step_limit")
    return Mamba2(
        num_heads=c.count("mamba_num_heads"),
        head_dim=c.count("mamba_head_dim"),
        state_dim=c.count("ssm_state_size"),
        groups=c.count("n_groups"),
        width=c.count("conv_kernel"),
        norm=Norm(eps=c.number("layer_norm_epsilon")),
        bias=bool(c.use_bias),
        conv_bias=bool(c.get("use_conv_bias", True)),
        time_step=(c.get("time_step_min", 0.001), math.inf),
    )


def _attention(c: HF) -> Attention:
    return attention(c, head_dim=c.count("head_dim", "attention_head_dim"), rope=None)


def _plain(c: HF, hidden: int, bias: bool) -> MLP:
    return MLP(hidden=hidden, act=activation(c, c.get("mlp_hidden_act", "relu2")), gated=False, bias=bias)


def _mlp(c: HF) -> MLP:
    return _plain(c, c.count("intermediate_size"), bool(c.mlp_bias))


def _moe(c: HF) -> MoE:
    c.skip("n_shared_experts", "moe_shared_expert_overlap")
    return MoE(
        num_experts=c.count("n_routed_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=_plain(c, c.count("moe_intermediate_size"), False),
        score="sigmoid",
        renorm=bool(c.get("norm_topk_prob", True)),
        scale=c.number("routed_scaling_factor"),
        groups=c.count("n_group"),
        top_groups=c.count("topk_group"),
        correction=True,
        shared=_plain(c, c.count("moe_shared_expert_intermediate_size"), bool(c.mlp_bias)),
    )


PARTS: Mapping[str, Callable[[HF], Attention | Mamba2 | MLP | MoE]] = {
    "mamba": _scan,
    "attention": _attention,
    "mlp": _mlp,
    "moe": _moe,
}
