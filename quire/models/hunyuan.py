"""Hunyuan's mixtures of experts: A13B, which is the dense one with experts beside each MLP, and HY 3."""

from dataclasses import replace

from quire.models.common import attention, biases, mlp, rope, shared_experts
from quire.models.deepseek import RENAMES, dense_layers, mostly_experts
from quire.models.hf import HF
from quire.models.llama import hunyuan
from quire.models.names import CORRECTION, Names
from quire.models.spec import Block, Decoder, MoE, Norm


def hunyuan_moe(c: HF) -> tuple[Decoder, Names]:
    """A layer's experts and its shared one are of the same size; how many are chosen may differ by layer."""
    for key in ("use_qk_norm", "use_mixed_mlp_moe"):
        c.refuse(not c.get(key, True), f"{key}=false")
    c.refuse_if_set("mlp_bias", "moe_layer_num_skipped")
    for key, usual in (("moe_intermediate_size", c.count("intermediate_size")), ("num_shared_expert", 1)):
        value = c.get(key, usual)
        differs = any(each != usual for each in (value if isinstance(value, list) else [value]))
        c.refuse(differs, f"{key} other than {usual}")
    dense, names = hunyuan(c)
    num_experts = c.count("num_experts", "num_local_experts")
    top_k = c.need("moe_topk", "num_experts_per_tok")

    def with_experts(i: int, block: Block) -> Block:
        chosen, one = top_k[i] if isinstance(top_k, list) else top_k, mlp(c)
        return replace(block, mlp=MoE(num_experts=num_experts, top_k=chosen, expert=one, shared=one))

    blocks = tuple(with_experts(i, block) for i, block in enumerate(dense.blocks))
    renames = (*names.renames, (r"\.gate\.wg\.", ".gate."), (r"\.shared_mlp\.", ".shared."))
    return replace(dense, blocks=blocks), replace(names, renames=renames)


def hy_v3(c: HF) -> tuple[Decoder, Names]:
    c.skip("enable_moe_fp32_combine")  # sums are float32
    norm, size, bias = Norm(eps=c.number("rms_norm_eps")), c.count("head_dim"), bool(c.mlp_bias)
    mixer = attention(c, head_dim=size, rope=rope(c, size, theta=11_158_840.0), qk_norm=norm, **biases(c))
    moe = MoE(
        num_experts=c.count("num_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        score="sigmoid",
        scale=c.number("router_scaling_factor"),
        correction=True,
        shared=shared_experts(c, "num_shared_experts", bias=bias),
    )
    renames = (
        *RENAMES,
        (r"\.router\.gate\.", ".gate."),
        (r"\.expert_bias$", ".e_score_correction_bias"),
        (r"\.shared_mlp\.", ".shared."),
        CORRECTION,
    )
    last = c.count("num_hidden_layers")
    ignored = (rf"^layers\.{last}\.",)  # predicts further tokens
    return mostly_experts(c, mixer, moe, dense_layers(c), bias), Names(renames=renames, ignored=ignored)
