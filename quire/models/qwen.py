"""Qwen 2 and 3, dense and mixture-of-experts. Qwen 2 has biases on q, k and v; Qwen 3 normalises q and k."""

from typing import Any

from quire.models.common import attention, biases, decoder, layer_types, mlp, pre_norm, window
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import MLP, Block, Decoder, MoE, Norm


def qwen2(c: HF) -> tuple[Decoder, Names]:
    return _dense(c, bias=True), Names(renames=LLAMA)


def qwen3(c: HF) -> tuple[Decoder, Names]:
    qk_norm = Norm(eps=c.number("rms_norm_eps"))
    return _dense(c, head_dim=c.count("head_dim"), qk_norm=qk_norm, **biases(c)), Names(renames=LLAMA)


def qwen2_moe(c: HF) -> tuple[Decoder, Names]:
    """A shared expert behind a gate of its own sees every token."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    sliding = window(c, bool(c.use_sliding_window))
    num_local = c.get("max_window_layers", 28) if sliding else 0
    local = layer_types(c, lambda i: i % 2 == 0 and i < num_local)
    shared = mlp(c, hidden=c.count("shared_expert_intermediate_size"))
    moe = _experts(c, shared=shared, shared_gate=True)
    bias = bool(c.get("qkv_bias", True))

    def block(i: int) -> Block:
        mixer = attention(c, bias=bias, window=sliding if local[i] else None)
        return pre_norm(mixer, moe if _is_sparse(c, i) else mlp(c), norm)

    renames = (*LLAMA, (r"\.shared_expert\.", ".shared."))
    return decoder(c, block, norm), Names(renames=renames)


def qwen3_moe(c: HF) -> tuple[Decoder, Names]:
    c.skip("intermediate_size")  # of layers without experts, which there need not be
    norm = Norm(eps=c.number("rms_norm_eps"))
    moe, sliding = _experts(c), window(c, bool(c.use_sliding_window))
    mixer = attention(c, qk_norm=norm, window=sliding, **biases(c))

    def block(i: int) -> Block:
        return pre_norm(mixer, moe if _is_sparse(c, i) else mlp(c), norm)

    return decoder(c, block, norm), Names(renames=LLAMA)


def _dense(c: HF, **own: Any) -> Decoder:
    """Layers from max_window_layers on are local, if any are."""
    norm, feed_forward = Norm(eps=c.number("rms_norm_eps")), mlp(c)
    sliding = window(c, bool(c.use_sliding_window))
    local = layer_types(c, lambda i: sliding is not None and i >= c.get("max_window_layers", 28))

    def block(i: int) -> Block:
        return pre_norm(attention(c, window=sliding if local[i] else None, **own), feed_forward, norm)

    return decoder(c, block, norm)


def _experts(c: HF, shared: MLP | None = None, shared_gate: bool = False) -> MoE:
    return MoE(
        num_experts=c.count("num_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        renorm=bool(c.norm_topk_prob),
        shared=shared,
        shared_gate=shared_gate,
    )


def _is_sparse(c: HF, layer: int) -> bool:
    return layer not in (c.mlp_only_layers or ()) and (layer + 1) % c.get("decoder_sparse_step", 1) == 0
