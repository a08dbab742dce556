"""GLM 4 (dense, in two forms), GLM 4.5 (experts), GLM 4.7 Flash (latent attention), GLM 5 (sparse); Solar Open."""

from quire.models.common import attention, biases, decoder, head_dim, layer_kinds, mlp, pre_norm, rope
from quire.models.deepseek import (
    RENAMES,
    dense_layers,
    first_dense,
    grouped_experts,
    latent_attention,
    mostly_experts,
    mtp_layers,
    sparse_attention,
)
from quire.models.hf import HF
from quire.models.names import LLAMA, Names, Split
from quire.models.spec import MLA, Decoder, Norm


def glm(c: HF) -> tuple[Decoder, Names]:
    return _dense(c, c.count("head_dim"), None)


def glm4(c: HF) -> tuple[Decoder, Names]:
    return _dense(c, c.count("head_dim"), Norm(eps=c.number("rms_norm_eps")))


def glm4v(c: HF) -> tuple[Decoder, Names]:
    """The text half of a network that also sees."""
    return _dense(c, head_dim(c), Norm(eps=c.number("rms_norm_eps")))


def _dense(c: HF, size: int, post: Norm | None) -> tuple[Decoder, Names]:
    """`size` of a head; `post`: the norm of what a sublayer adds."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    rotary = rope(c, size, partial=0.5, interleaved=True)
    attn = attention(c, rope=rotary, head_dim=size, bias=bool(c.get("attention_bias", True)))
    block = pre_norm(attn, mlp(c), norm, attn_post_norm=post, mlp_post_norm=post)
    renames = (
        (r"\.post_self_attn_layernorm\.", ".attn_post_norm."),
        (r"\.post_mlp_layernorm\.", ".mlp_post_norm."),
        *LLAMA,
    )
    f = c.count("intermediate_size")
    splits = {"gate_up_proj": Split({"gate_proj": f, "up_proj": f})}
    return decoder(c, block, norm), Names(renames=renames, splits=splits)


def glm4_moe(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(eps=c.number("rms_norm_eps"))
    rotary = rope(c, head_dim(c), partial=0.5)
    qk_norm = norm if c.use_qk_norm else None
    mixer = attention(c, rope=rotary, qk_norm=qk_norm, **biases(c, out=False))
    spec = mostly_experts(c, mixer, grouped_experts(c), first_dense(c))
    return spec, Names(renames=RENAMES, ignored=mtp_layers(c))


def glm4_moe_lite(c: HF) -> tuple[Decoder, Names]:
    """GLM 4.5's experts behind DeepSeek V3's attention."""
    spec = mostly_experts(c, latent_attention(c, partial=1.0), grouped_experts(c), dense_layers(c))
    return spec, Names(renames=RENAMES, ignored=mtp_layers(c))


def glm_moe_dsa(c: HF) -> tuple[Decoder, Names]:
    """DeepSeek V3.2, where layers may take over the choice of one before."""
    own = _own_indexer(c)

    def mixer(i: int) -> MLA:
        return sparse_attention(c, interleaved=True, own=own[i])

    spec = mostly_experts(c, mixer, grouped_experts(c), dense_layers(c, usual=3))
    return spec, Names(renames=RENAMES, ignored=mtp_layers(c))


def _own_indexer(c: HF) -> list[bool]:
    """For each layer, whether it has an indexer: as listed, as a pattern says, or each so many layers."""
    c.skip("index_share_for_mtp_iteration")  # of layers that predict further tokens
    num_layers, kinds, pattern = c.count("num_hidden_layers"), c.indexer_types, c.index_topk_pattern
    every, offset = max(c.get("index_topk_freq", 1), 1), c.get("index_skip_topk_offset", 2)
    if kinds is None and pattern is not None:
        kinds = [{"F": "full", "S": "shared"}.get(kind, kind) for kind in pattern]
    if kinds is None:
        kinds = ["shared" if max(i - offset + 1, 0) % every else "full" for i in range(num_layers)]
    own = layer_kinds(c, "indexer_types", kinds, "full", "shared")
    c.refuse(not own[0], "a first layer without an indexer (indexer_types)")
    return own


def solar_open(c: HF) -> tuple[Decoder, Names]:
    """Every layer has experts; whole heads are rotated."""
    c.refuse_if_set("first_k_dense_replace", "use_qk_norm")
    c.skip("intermediate_size")  # of layers without experts
    norm, size = Norm(eps=c.number("rms_norm_eps")), c.count("head_dim")
    rotary = rope(c, size, partial=1.0, theta=1_000_000.0)
    mixer = attention(c, head_dim=size, rope=rotary, **biases(c, out=False))
    return decoder(c, pre_norm(mixer, grouped_experts(c), norm), norm), Names(renames=RENAMES)
