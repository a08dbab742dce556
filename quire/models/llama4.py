"""Llama 4 (Meta 2025): rotary embedding within chunks and none in every fourth layer, experts of weighed inputs."""

from quire.models.common import (
    attention,
    biases,
    decoder,
    has_rope,
    layer_types,
    mlp,
    pre_norm,
    rope,
)
from quire.models.hf import HF
from quire.models.names import LLAMA, STACKED, Names, Split
from quire.models.spec import Block, Decoder, Growth, MoE, Norm

RENAMES = (
    *LLAMA,
    (r"\.feed_forward\.", ".mlp."),
    (r"\.mlp\.router\.", ".mlp.gate."),
    (r"\.mlp\.shared_expert\.", ".mlp.shared."),
)


def llama4(c: HF) -> tuple[Decoder, Names]:
    """Queries and keys are normalised after they turn, which without weights is the same as before."""
    norm, num_layers = Norm(eps=c.number("rms_norm_eps")), c.count("num_hidden_layers")
    size, turns = c.count("head_dim"), has_rope(c)
    rotary = rope(c, size, theta=500_000.0, interleaved=True)
    c.refuse("attention_factor" in (rotary.scaling or {}), "rotary embedding that lengthens queries and keys")
    chunk, local = c.get("attention_chunk_size", 8192), layer_types(c, turns.__getitem__, "chunked_attention")
    growth = Growth(rate=c.get("attn_scale", 0.1), length=c.get("floor_scale", 8192), first=1)
    unit = Norm(eps=norm.eps, weight=False) if c.get("use_qk_norm", True) else None
    turning = {"rope": rotary, "qk_norm": unit}
    still = {"rope": None, "growth": growth if c.get("attn_temperature_tuning", True) else None}
    c.refuse((top_k := c.count("num_experts_per_tok")) != 1, f"num_experts_per_tok={top_k}")
    step = c.get("interleave_moe_layer_step", 1)
    sparse = range(step - 1, num_layers, step) if c.moe_layers is None else c.moe_layers
    moe = MoE(
        num_experts=c.count("num_local_experts"),
        top_k=top_k,
        expert=mlp(c),
        score="sigmoid_topk",
        renorm=False,
        shared=mlp(c),
        weighs_inputs=True,
    )
    dense = mlp(c, hidden=c.count("intermediate_size_mlp"))

    def block(i: int) -> Block:
        own = {"head_dim": size, "chunk": chunk if local[i] else None, **biases(c)}
        mixer = attention(c, **own, **(turning if turns[i] else still))
        return pre_norm(mixer, moe if i in sparse else dense, norm)

    names = Names(
        renames=RENAMES,
        splits={"gate_up_proj": Split({"gate_proj": moe.expert.hidden, "up_proj": moe.expert.hidden})},
        transposed=(r"\.experts\.\d+\.(gate_up|down)_proj\.",),
        stacked=STACKED,
    )
    return decoder(c, block, norm), names
