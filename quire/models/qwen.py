"""Qwen 2, 3, 3-Next and 3.5, dense and mixture-of-experts; Mellum 2 and Flint.

Qwen 2 has biases on q, k and v; Qwen 3 normalises q and k; of the later ones, three of four layers are DeltaNets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quire.models.common import attention, biases, decoder, layer_types, mlp, pre_norm, rope, window
from quire.models.deepseek import dense_layers
from quire.models.hf import HF
from quire.models.names import LLAMA, STACKED, Names, Split
from quire.models.spec import MLP, Attention, Block, Decoder, DeltaNet, MoE, Norm

NEXT = (
    (r"^model\.(language_model\.)?", ""),
    *LLAMA,
    (r"\.linear_attn\.norm\.", ".mixer.o_norm."),
    (r"\.linear_attn\.out_proj\.", ".mixer.o_proj."),
    (r"\.linear_attn\.in_proj_([zba])\.", r".mixer.\1_proj."),
    (r"\.mixer\.z_proj\.", ".mixer.g_proj."),
    (r"\.linear_attn\.", ".mixer."),
    (r"\.shared_expert\.", ".shared."),
)
OTHERS = (r"^mtp\.", r"^visual\.")  # what predicts further tokens, and what sees

LOCAL_THETA, GLOBAL_THETA = 10_000.0, 500_000.0  # of Mellum's layers, unless the config says otherwise
SECTIONS = (11, 11, 10)  # of Qwen 3.5's pairs for time, height and width, unless the config says otherwise


def qwen2(c: HF) -> tuple[Decoder, Names]:
    return _dense(c, bias=True), Names(renames=LLAMA)


def mimo(c: HF) -> tuple[Decoder, Names]:
    """Qwen 2 with layers that predict further tokens, which are left out."""
    c.refuse(not c.get("attention_bias", True), "attention_bias=false")
    c.skip("num_nextn_predict_layers")
    return _dense(c, bias=True), Names(renames=LLAMA, ignored=(r"^mtp_layers\.",))


def qwen3(c: HF) -> tuple[Decoder, Names]:
    qk_norm = Norm(eps=c.number("rms_norm_eps"))
    return _dense(c, head_dim=c.count("head_dim"), qk_norm=qk_norm, **biases(c)), Names(renames=LLAMA)


def qwen2_moe(c: HF) -> tuple[Decoder, Names]:
    """A shared expert behind a gate of its own sees every token."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    sliding = window(c, bool(c.use_sliding_window))
    num_local = c.get("max_window_layers", 28) if sliding else 0
    local = layer_types(c, lambda i: i % 2 == 0 and i < num_local)
    moe = _experts(c, renorm=bool(c.norm_topk_prob), **_shared(c))
    bias = bool(c.get("qkv_bias", True))

    def block(i: int) -> Block:
        mixer = attention(c, bias=bias, window=sliding if local[i] else None)
        return pre_norm(mixer, moe if _is_sparse(c, i) else mlp(c), norm)

    renames = (*LLAMA, (r"\.shared_expert\.", ".shared."))
    return decoder(c, block, norm), Names(renames=renames)


def qwen3_moe(c: HF) -> tuple[Decoder, Names]:
    c.skip("intermediate_size")  # of layers without experts, which there need not be
    norm = Norm(eps=c.number("rms_norm_eps"))
    moe, sliding = _experts(c, renorm=bool(c.norm_topk_prob)), window(c, bool(c.use_sliding_window))
    mixer = attention(c, qk_norm=norm, window=sliding, **biases(c))

    def block(i: int) -> Block:
        return pre_norm(mixer, moe if _is_sparse(c, i) else mlp(c), norm)

    return decoder(c, block, norm), Names(renames=LLAMA)


def qwen3_vl_moe(c: HF) -> tuple[Decoder, Names]:
    """The text half of a network that also sees; a layer's experts are stored transposed, side by side."""
    spec, names = qwen3_moe(c)
    hidden = c.count("moe_intermediate_size")
    both = Split({"gate_proj": hidden, "up_proj": hidden})
    transposed = (r"\.experts\.\d+\.(gate_up|down)_proj\.",)
    return spec, replace(names, splits={"gate_up_proj": both}, transposed=transposed, stacked=STACKED)


def mellum(c: HF) -> tuple[Decoder, Names]:
    """Qwen 3's experts; local layers are listed and have a rotary embedding of their own."""
    c.skip("num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types")  # layers that predict further tokens
    norm, size = Norm(eps=c.number("rms_norm_eps")), c.count("head_dim")
    moe = _experts(c, renorm=True)
    local, is_dense = layer_types(c, lambda i: False), dense_layers(c, usual=0)

    def block(i: int) -> Block:
        rotary = rope(c, size, local=local[i], theta=LOCAL_THETA if local[i] else GLOBAL_THETA)
        sliding = c.get("sliding_window", 1024) or None if local[i] else None
        mixer = attention(c, head_dim=size, rope=rotary, window=sliding, qk_norm=norm, **biases(c))
        return pre_norm(mixer, mlp(c) if is_dense[i] else moe, norm)

    return decoder(c, block, norm), Names(renames=LLAMA, ignored=(r"^mtp\.",))


def flint(c: HF) -> tuple[Decoder, Names]:
    """Sinks in every layer, sigmoid scores; only local layers have a rotary embedding."""
    norm, size, last = (
        Norm(eps=c.number("rms_norm_eps")),
        c.count("head_dim"),
        c.count("num_hidden_layers") - 1,
    )
    local = layer_types(c, lambda i: i >= 2 and i % 4 != 1 and i != last)
    shared = mlp(c, hidden=c.count("shared_expert_intermediate_size"))
    moe = replace(_experts(c, shared=shared, renorm=True), score="sigmoid")
    rotary = rope(c, size)
    sliding = c.get("sliding_window", 513)
    dense = c.mlp_only_layers
    is_dense = (0, 1) if dense is None else dense

    def block(i: int) -> Block:
        here = {"rope": rotary, "window": sliding} if local[i] else {"rope": None}
        mixer = attention(c, head_dim=size, qk_norm=norm, sinks=True, **here, **biases(c))
        return pre_norm(mixer, moe if _is_sparse(c, i, is_dense) else mlp(c), norm)

    renames = (*LLAMA, (r"\.shared_expert\.", ".shared."), (r"\.softmax_offset$", ".sinks"))
    return decoder(c, block, norm), Names(renames=renames)


def qwen3_next(c: HF) -> tuple[Decoder, Names]:
    """Key head by key head, a DeltaNet stores its queries, keys, values and gates in one, and its rates in another."""
    c.skip("intermediate_size")  # of layers without experts, which there need not be
    moe = _experts(c, renorm=bool(c.get("norm_topk_prob", True)), **_shared(c))
    delta = _delta_net(c)
    q, v = delta.k_dim * delta.num_k_heads, delta.v_dim * delta.num_v_heads
    per_head = {
        "in_proj_qkvz": Split({"q_proj": q, "k_proj": q, "v_proj": v, "g_proj": v}, delta.num_k_heads),
        "in_proj_ba": Split(dict.fromkeys(("b_proj", "a_proj"), delta.num_v_heads), delta.num_k_heads),
    }
    spec = _hybrid(c, delta, lambda i: moe if _is_sparse(c, i) else mlp(c), None)
    return spec, _next_names(spec, delta, per_head)


def qwen3_5(c: HF) -> tuple[Decoder, Names]:
    """The text half of a network that also sees."""
    delta, feed_forward = _delta_net(c), mlp(c)
    spec = _hybrid(c, delta, lambda _: feed_forward, SECTIONS)
    return spec, _next_names(spec, delta, _in_proj_qkv(delta))


def qwen3_5_moe(c: HF) -> tuple[Decoder, Names]:
    c.skip("intermediate_size")
    delta, moe = _delta_net(c), replace(_experts(c, **_shared(c)), renorm=True)
    spec = _hybrid(c, delta, lambda _: moe, SECTIONS)
    both = Split(dict.fromkeys(("gate_proj", "up_proj"), moe.expert.hidden))
    return spec, _next_names(spec, delta, {**_in_proj_qkv(delta), "gate_up_proj": both})


def _delta_net(c: HF) -> DeltaNet:
    c.refuse((act := c.text("hidden_act")) != "silu", f"hidden_act={act!r}")
    return DeltaNet(
        num_k_heads=c.get("linear_num_key_heads", 16),
        num_v_heads=c.get("linear_num_value_heads", 32),
        k_dim=c.get("linear_key_head_dim", 128),
        v_dim=c.get("linear_value_head_dim", 128),
        width=c.get("linear_conv_kernel_dim", 4),
        norm=Norm(eps=c.number("rms_norm_eps")),
    )


def _hybrid(
    c: HF, delta: DeltaNet, feed_forward: Callable[[int], MLP | MoE], sections: Sequence[int] | None
) -> Decoder:
    c.refuse(not c.get("attn_output_gate", True), "attn_output_gate=false")
    c.skip("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    norm = Norm(eps=c.number("rms_norm_eps"), offset=1.0)
    rotary = rope(c, c.count("head_dim"), partial=0.25, alternating=sections)
    attn = attention(
        c, rope=rotary, qk_norm=norm, gate="sigmoid", gate_bias=bool(c.attention_bias), **biases(c)
    )
    interval = c.get("full_attention_interval", 4)
    is_delta = layer_types(c, lambda i: (i + 1) % interval != 0, "linear_attention")

    def block(i: int) -> Block:
        return pre_norm(delta if is_delta[i] else attn, feed_forward(i), norm)

    return decoder(c, block, norm)


def _in_proj_qkv(delta: DeltaNet) -> dict[str, Split]:
    q, v = delta.k_dim * delta.num_k_heads, delta.v_dim * delta.num_v_heads
    return {"in_proj_qkv": Split({"q_proj": q, "k_proj": q, "v_proj": v})}


def _next_names(spec: Decoder, delta: DeltaNet, more: Mapping[str, Split]) -> Names:
    """Attention's gates lie behind their heads' queries."""
    q, v = delta.k_dim * delta.num_k_heads, delta.v_dim * delta.num_v_heads
    splits = {"conv1d": Split({"q_conv1d": q, "k_conv1d": q, "v_conv1d": v}), **more}
    for mixer in (block.mixer for block in spec.blocks):
        if isinstance(mixer, Attention):
            rows = mixer.num_heads * mixer.head_dim
            splits["q_proj"] = Split({"q_proj": rows, "gate_proj": rows}, mixer.num_heads)
    return Names(renames=NEXT, splits=splits, ignored=OTHERS, stacked=STACKED)


def _shared(c: HF) -> dict[str, Any]:
    return {"shared": mlp(c, hidden=c.count("shared_expert_intermediate_size")), "shared_gate": True}


def _dense(c: HF, **own: Any) -> Decoder:
    """Layers from max_window_layers on are local, if any are."""
    norm, feed_forward = Norm(eps=c.number("rms_norm_eps")), mlp(c)
    sliding = window(c, bool(c.use_sliding_window))
    local = layer_types(c, lambda i: sliding is not None and i >= c.get("max_window_layers", 28))

    def block(i: int) -> Block:
        return pre_norm(attention(c, window=sliding if local[i] else None, **own), feed_forward, norm)

    return decoder(c, block, norm)


def _experts(c: HF, shared: MLP | None = None, shared_gate: bool = False, renorm: bool = False) -> MoE:
    """`renorm`: what an absent norm_topk_prob means."""
    return MoE(
        num_experts=c.count("num_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        renorm=bool(c.get("norm_topk_prob", renorm)),
        shared=shared,
        shared_gate=shared_gate,
    )


def _is_sparse(c: HF, layer: int, dense: Sequence[int] | None = None) -> bool:
    dense = c.mlp_only_layers or () if dense is None else dense
    return layer not in dense and (layer + 1) % c.get("decoder_sparse_step", 1) == 0
