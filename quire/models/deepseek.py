"""DeepSeek MoE to V3.2, Kimi K2: latent attention, grouped routing, shared experts; dots.llm1; Youtu; MiniCPM 3."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from quire.models.common import (
    attention,
    biases,
    decoder,
    growth,
    kv_heads,
    layer_kinds,
    layer_types,
    mlp,
    plain_head_dim,
    pre_norm,
    rope,
    rope_parameters,
    shared_experts,
    tied_by_default,
    window,
    yarn_mscale,
)
from quire.models.hf import HF
from quire.models.names import LLAMA, STACKED, Names, Split
from quire.models.spec import MLA, Attention, Block, Decoder, Indexer, MoE, Norm, Rope

LATENT_EPS = 1e-6  # the norms of latents do not follow rms_norm_eps
RENAMES = (*LLAMA, (r"\.shared_experts\.", ".shared."))


def deepseek(c: HF) -> tuple[Decoder, Names]:
    """DeepSeek-MoE (Dai et al. 2024): usual attention, softmax scores."""
    for key, known in (("scoring_func", "softmax"), ("topk_method", "greedy")):
        c.refuse((value := c.get(key, known)) != known, f"{key}={value!r}")
    c.refuse_if_set("mlp_bias", "use_mla")  # the latter, of DeepSeek-OCR
    c.skip("n_group", "topk_group", "head_dim")
    moe = MoE(
        num_experts=c.count("n_routed_experts", "num_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        renorm=bool(c.norm_topk_prob),
        scale=c.get("routed_scaling_factor", 1.0),
        shared=shared_experts(c),
    )
    mixer = attention(c, head_dim=plain_head_dim(c), num_kv_heads=kv_heads(c), **biases(c))
    return mostly_experts(c, mixer, moe, dense_layers(c)), Names(renames=RENAMES)


def deepseek_v2(c: HF) -> tuple[Decoder, Names]:
    """Softmax scores; groups of experts, where there are any, by their best one's."""
    c.refuse_if_set("mlp_bias", "norm_topk_prob")  # the latter, Hugging Face's network ignores
    c.refuse((kind := c.get("scoring_func", "softmax")) != "softmax", f"scoring_func={kind!r}")
    method = c.get("topk_method", "greedy")
    c.refuse(method not in ("greedy", "group_limited_greedy"), f"topk_method={method!r}")
    c.skip("n_group", "topk_group")
    is_limited = method == "group_limited_greedy"
    moe = MoE(
        num_experts=c.count("n_routed_experts", "num_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        renorm=False,
        scale=c.number("routed_scaling_factor"),
        groups=c.count("n_group") if is_limited else 1,
        top_groups=c.count("topk_group") if is_limited else 1,
        shared=shared_experts(c),
    )
    mixer = latent_attention(c, interleaved=True)
    return mostly_experts(c, mixer, moe, first_dense(c)), Names(renames=RENAMES)


def deepseek_v3(c: HF) -> tuple[Decoder, Names]:
    spec = mostly_experts(c, latent_attention(c), grouped_experts(c), first_dense(c))
    return spec, Names(renames=RENAMES, ignored=mtp_layers(c))


def deepseek_v32(c: HF) -> tuple[Decoder, Names]:
    """DeepSeek V3, each token of which sees the positions that an indexer chooses."""
    mixer = sparse_attention(c, interleaved=False)
    spec = mostly_experts(c, mixer, grouped_experts(c), dense_layers(c, usual=3))
    return spec, Names(renames=RENAMES, ignored=mtp_layers(c))


def youtu(c: HF) -> tuple[Decoder, Names]:
    """DeepSeek V3 without experts."""
    c.skip("embedding_initializer_range")
    norm = Norm(eps=c.number("rms_norm_eps"))
    block = pre_norm(latent_attention(c), mlp(c), norm)
    return decoder(c, block, norm, tied=tied_by_default(c)), Names(renames=LLAMA)


def minicpm3(c: HF) -> tuple[Decoder, Names]:
    """Youtu with multipliers at the ends and at each sublayer, which depend on width and depth (Hu et al. 2024)."""
    norm, dim, num_layers = (
        Norm(eps=c.number("rms_norm_eps")),
        c.count("hidden_size"),
        c.count("num_hidden_layers"),
    )
    v_dim = c.v_head_dim or dim // c.count("num_attention_heads")
    mixer = latent_attention(c, v_dim, interleaved=False)
    depth, base = c.get("scale_depth", 1.4), c.get("dim_model_base", 256)
    residual = 1.0 if depth is None else depth / num_layers**0.5
    block = pre_norm(mixer, mlp(c, bias=bool(c.mlp_bias)), norm, residual_scale=residual)
    scales = {"embed_scale": c.get("scale_emb", 12), "logit_scale": 1.0 if base is None else base / dim}
    return decoder(c, block, norm, **scales, tied=tied_by_default(c)), Names(renames=LLAMA)


def dots1(c: HF) -> tuple[Decoder, Names]:
    norm, sliding = Norm(eps=c.number("rms_norm_eps")), window(c)
    local = layer_types(c, lambda i: sliding is not None and i >= c.get("max_window_layers", 62))

    def mixer(i: int) -> Attention:
        return attention(c, qk_norm=norm, window=sliding if local[i] else None, **biases(c))

    return mostly_experts(c, mixer, grouped_experts(c), first_dense(c)), Names(renames=RENAMES)


def mostly_experts(
    c: HF,
    mixer: Attention | MLA | Callable[[int], Attention | MLA],
    moe: MoE,
    is_dense: Sequence[bool],
    bias: bool = False,
) -> Decoder:
    """Layers with experts, or where `is_dense` says so with one MLP; `mixer` may be a function of the layer's index."""
    norm, dense = Norm(eps=c.number("rms_norm_eps")), mlp(c, bias=bias)

    def block(i: int) -> Block:
        return pre_norm(mixer(i) if callable(mixer) else mixer, dense if is_dense[i] else moe, norm)

    return decoder(c, block, norm)


def mistral4(c: HF) -> tuple[Decoder, Names]:
    """Softmax scores, all experts one group; queries grow with their position."""
    c.need("rope_parameters", "rope_scaling")  # Hugging Face's own default is a YaRN of one model
    for key in ("n_group", "topk_group"):
        c.refuse((value := c.get(key, 1)) != 1, f"{key}={value}")
    moe = MoE(
        num_experts=c.count("n_routed_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        renorm=bool(c.get("norm_topk_prob", True)),
        scale=c.number("routed_scaling_factor"),
        shared=shared_experts(c),
    )
    rope_dim = c.count("qk_rope_head_dim")
    size = rope_dim + c.count("qk_nope_head_dim")
    rotary = rope(c, size, partial=rope_dim / size, interleaved=bool(c.get("rope_interleave", True)))
    c.refuse(rotary.dim != rope_dim, f"rotary embedding of {rotary.dim} dimensions of {rope_dim}")
    mixer = replace(latent_attention(c, rotary=rotary), growth=growth(c))
    splits = {"gate_up_proj": Split({"gate_proj": moe.expert.hidden, "up_proj": moe.expert.hidden})}
    spec = mostly_experts(c, mixer, moe, first_dense(c))
    return spec, Names(renames=RENAMES, splits=splits, stacked=STACKED)


def latent_attention(c: HF, v_dim: int | None = None, rotary: Rope | None = None, **changes: Any) -> MLA:
    """Latent attention with the usual keys, and what they do not tell; `changes` are fields of its Rope."""
    c.refuse_if_set("attention_bias")
    c.skip("head_dim", "qk_head_dim", "num_key_value_heads")  # follow from the other sizes
    rope_dim, nope_dim = c.count("qk_rope_head_dim"), c.count("qk_nope_head_dim")
    if rotary is None and "interleaved" not in changes:
        changes["interleaved"] = bool(c.get("rope_interleave", True))
    return MLA(
        num_heads=c.count("num_attention_heads"),
        q_rank=c.stated("q_lora_rank"),
        kv_rank=c.count("kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=v_dim or c.count("v_head_dim"),
        rope=rotary or rope(c, rope_dim, **changes),
        norm=Norm(eps=LATENT_EPS),
        scale=_stretched_scale(c, nope_dim + rope_dim),
    )


def sparse_attention(c: HF, *, interleaved: bool, own: bool = True) -> MLA:
    """Latent attention to what an indexer chooses: its `own`, or one before; `interleaved`: which pairs that turns."""
    c.refuse_if_set("mlp_bias")
    c.refuse(not c.get("rope_interleave", True), "rope_interleave=False")
    kinds = {"indexed_attention", "deepseek_sparse_attention"}  # the latter, of Transformers before 5.20
    unknown = sorted(set(map(str, c.layer_types or ())) - kinds)
    c.refuse(bool(unknown), f"layer_types entry {', '.join(unknown)} (known: {', '.join(sorted(kinds))})")
    mixer = latent_attention(c, interleaved=True)
    indexer = Indexer(
        num_heads=c.count("index_n_heads"),
        head_dim=c.count("index_head_dim"),
        top_k=c.count("index_topk"),
        rope=rope(c, mixer.rope_dim, interleaved=bool(c.get("indexer_rope_interleave", interleaved))),
        norm=Norm(kind="layer", eps=LATENT_EPS, bias=True),
        own=own,
    )
    c.refuse(
        indexer.head_dim < mixer.rope_dim,
        f"index_head_dim={indexer.head_dim} below {mixer.rope_dim} that turn",
    )
    c.refuse(mixer.q_rank is None, "q_lora_rank=None")
    return replace(mixer, indexer=indexer)


def grouped_experts(c: HF, shared: str = "n_shared_experts") -> MoE:
    """Routing by sigmoid scores plus a correction, within the best groups of experts (DeepSeek-AI 2024).

    `shared` is the key of the number of shared experts.
    """
    c.refuse((kind := c.get("scoring_func", "sigmoid")) != "sigmoid", f"scoring_func={kind!r}")
    c.refuse((kind := c.get("topk_method", "noaux_tc")) != "noaux_tc", f"topk_method={kind!r}")
    return MoE(
        num_experts=c.count("n_routed_experts", "num_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        score="sigmoid",
        renorm=bool(c.need("norm_topk_prob")),
        scale=c.number("routed_scaling_factor"),
        groups=c.count("n_group"),
        top_groups=c.count("topk_group"),
        correction=True,
        shared=shared_experts(c, shared),
    )


def first_dense(c: HF) -> list[bool]:
    """For each layer, whether it is one of the first, which have no experts."""
    first = int(c.need("first_k_dense_replace"))
    return [i < first for i in range(c.count("num_hidden_layers"))]


def dense_layers(c: HF, usual: int = 1) -> list[bool]:
    """For each layer, whether it has no experts, for architectures whose config may list that.

    `usual`: how many of the first have none where the config says nothing.
    """
    num_layers, kinds = c.count("num_hidden_layers"), c.mlp_layer_types
    first = c.get("first_k_dense_replace", usual)
    if kinds is None:
        return [i < first for i in range(num_layers)]
    return layer_kinds(c, "mlp_layer_types", kinds, "dense", "sparse")


def mtp_layers(c: HF) -> tuple[str, ...]:
    """Checkpoints append layers that predict further tokens; they are no part of the decoder."""
    first, extra = c.count("num_hidden_layers"), c.get("num_nextn_predict_layers", c.get("num_mtp_layers", 1))
    return tuple(rf"^layers\.{first + i}\." for i in range(extra))


def _stretched_scale(c: HF, head_dim: int) -> float | None:
    """YaRN sharpens attention as it stretches the context; None leaves the scale as it is."""
    found = rope_parameters(c)
    kind, all_dim = found.get("rope_type") or found.get("type") or "default", found.get("mscale_all_dim")
    if kind == "default" or not all_dim:
        return None
    return float(head_dim**-0.5 * yarn_mscale(found["factor"], all_dim) ** 2)
