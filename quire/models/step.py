"""Step-3: one head of keys and values, to which queries come through few numbers (StepFun 2025)."""

from collections.abc import Sequence

from quire.errors import ModelError
from quire.models.common import attention, decoder, pre_norm, rope
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import MLP, Block, Decoder, MoE, Norm

RENAMES = (
    *LLAMA,
    (r"\.mixer\.q_proj\.", ".mixer.q_a_proj."),
    (r"\.inter_norm\.", ".q_a_layernorm."),
    (r"\.wq\.", ".q_b_proj."),
    (r"\.share_expert\.", ".mlp.shared."),
    (r"\.moe\.gate\.", ".mlp.gate."),
    (r"\.moe\.", ".mlp.experts."),
)
STACKED = ((r"\.experts\.(\w+_proj)\.weight$", r".experts.{}.\1.weight"),)
VISION = (r"^(vision_model|vit_\w+)\.",)


def step3(c: HF) -> tuple[Decoder, Names]:
    """Of a model that also sees images, the part that reads text."""
    c.refuse((groups := c.get("num_attention_groups", 1)) != 1, f"num_attention_groups={groups}")
    c.skip("max_seq_len", "moe_every_n_layer", "use_moe")  # of no effect in the published network
    c.skip("understand_projector_stride", "projector_bias", "vision_select_layer", "image_token_len")
    c.skip("use_im_start_end")
    norm, size, num_layers = (
        Norm(eps=c.number("rms_norm_eps")),
        c.count("head_dim"),
        c.count("num_hidden_layers"),
    )
    attn = attention(
        c,
        num_kv_heads=1,
        head_dim=size,
        rope=rope(c, size, theta=500_000.0),
        q_rank=c.count("share_q_dim"),
        q_rank_norm=norm,
    )
    dense = MLP(hidden=c.count("intermediate_size"))
    moe = MoE(
        num_experts=c.count("moe_num_experts"),
        top_k=c.count("moe_top_k"),
        expert=MLP(hidden=c.count("moe_intermediate_size")),
        renorm=bool(c.norm_expert_weight),
        shared=MLP(hidden=c.count("share_expert_dim")),
    )
    sparse = _layers(c, num_layers)

    def block(i: int) -> Block:
        return pre_norm(attn, moe if i in sparse else dense, norm)

    spec = decoder(c, block, norm, max_length=c.count("max_position_embedding", "max_position_embeddings"))
    return spec, Names(renames=RENAMES, stacked=STACKED, ignored=VISION)


def _layers(c: HF, num_layers: int) -> set[int]:
    """Those with experts: all but the first, or as the config lists them, as numbers or in one text."""
    listed = c.moe_layers_enum
    if listed is None:
        return set(range(1, num_layers))
    items = listed.split(",") if isinstance(listed, str) else listed
    if not isinstance(items, Sequence):
        raise ModelError(f"config.json: moe_layers_enum is {listed!r}; it must list layers")
    return {int(item) for item in items}
