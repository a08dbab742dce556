"""ERNIE 4.5's mixtures of experts: the dense network with experts in most layers."""

from dataclasses import replace

from quire.models.common import head_dim, mlp, shared_experts
from quire.models.deepseek import RENAMES
from quire.models.hf import HF
from quire.models.llama import ernie
from quire.models.names import Names
from quire.models.spec import Block, Decoder, MoE


def ernie_moe(c: HF) -> tuple[Decoder, Names]:
    """A correction to softmax scores picks the experts; every bias, the head's too, is one setting."""
    floor = c.get("moe_norm_min", 1e-12)  # guards against dividing by a sum of scores that is almost nothing
    c.refuse(floor > 1e-6, f"moe_norm_min={floor}")
    c.skip("num_nextn_predict_layers")  # layers that predict further tokens
    dense, _ = ernie(c, head_dim(c))
    bias = bool(c.use_bias)
    moe = MoE(
        num_experts=c.count("moe_num_experts", "num_experts"),
        top_k=c.count("moe_k", "num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        correction=True,
        shared=shared_experts(c, "moe_num_shared_experts", bias=bias),
    )
    first, last = c.get("moe_layer_start_index", 1), c.get("moe_layer_end_index", -1)
    interval = c.get("moe_layer_interval", 1)

    def with_experts(i: int, block: Block) -> Block:
        is_sparse = first <= i and (last == -1 or i <= last) and (i + 1) % interval == 0
        return replace(block, mlp=moe) if is_sparse else block

    blocks = tuple(with_experts(i, block) for i, block in enumerate(dense.blocks))
    renames = (*RENAMES, (r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."))
    stacked = ((r"\.moe_statics\.(e_score_correction_bias)$", r".\1"),)  # of one group of experts
    names = Names(renames=renames, stacked=stacked, ignored=(r"^mtp_",))
    return replace(dense, blocks=blocks, head_bias=bias), names
