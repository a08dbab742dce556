"""MiMo V2: local layers with sinks and more heads of keys, values of fewer dimensions than keys (Xiaomi 2026)."""

from quire.models.common import attention, decoder, layer_kinds, layer_types, mlp, pre_norm, rope
from quire.models.hf import HF
from quire.models.names import LLAMA, STACKED, Names, Split
from quire.models.spec import Attention, Block, Decoder, MoE, Norm, Rope

PARTIAL, THETA, LOCAL_THETA = 0.334, 5_000_000.0, 10_000.0
ALIKE = {"swa_num_attention_heads": "num_attention_heads", "swa_head_dim": "head_dim"}
ALIKE |= {"swa_v_head_dim": "v_head_dim"}


def mimo_v2(c: HF) -> tuple[Decoder, Names]:
    """The keys of the authors' own code and of Transformers, whose defaults are the first published model's."""
    for own, whole in ALIKE.items():
        c.refuse((value := c.get(own)) not in (None, c.get(whole)), f"{own}={value} beside {whole}")
    c.refuse_if_set("add_full_attention_sink_bias", "n_shared_experts", "use_qk_norm", "mlp_bias")
    c.refuse(not c.get("add_swa_attention_sink_bias", True), "add_swa_attention_sink_bias=false")
    c.skip("attention_chunk_size", "hybrid_block_size")  # of no effect in the published network
    norm = Norm(eps=float(c.need("rms_norm_eps", "layernorm_epsilon")))
    local, dense, moe = _local_layers(c), mlp(c), _experts(c)
    mixers, is_dense = {here: _attention(c, here) for here in set(local)}, _dense_layers(c)

    def block(i: int) -> Block:
        return pre_norm(mixers[local[i]], dense if is_dense[i] else moe, norm)

    renames = (*LLAMA, (r"\.attention_sink_bias$", ".sinks"))
    splits = {"gate_up_proj": Split({"gate_proj": moe.expert.hidden, "up_proj": moe.expert.hidden})}
    names = Names(renames=renames, splits=splits, stacked=STACKED, ignored=(r"^mtp\.",))
    return decoder(c, block, norm), names


def _attention(c: HF, local: bool) -> Attention:
    """A window of w tokens before the newest is stated as sliding_window_size, with the newest as sliding_window."""
    size, num_kv_heads = c.count("head_dim"), c.count("num_key_value_heads")
    scale = c.get("attention_value_scale", 0.707)
    before, window = c.sliding_window_size, c.get("sliding_window", 129)
    return attention(
        c,
        num_kv_heads=(c.swa_num_key_value_heads or 2 * num_kv_heads) if local else num_kv_heads,
        head_dim=size,
        v_dim=c.count("v_head_dim"),
        v_scale=1.0 if scale is None else scale,
        rope=_rope(c, size, local),
        window=(window if before is None else before + 1) if local else None,
        sinks=local,
        bias=bool(c.attention_bias),
    )


def _rope(c: HF, size: int, local: bool) -> Rope:
    if c.rope_parameters:
        return rope(c, size, local=local, partial=PARTIAL)
    c.refuse_if_set("rope_scaling")
    theta = c.get("swa_rope_theta", LOCAL_THETA) if local else c.get("rope_theta", THETA)
    dim = int(size * c.get("partial_rotary_factor", PARTIAL))
    c.refuse(dim % 2 == 1, f"rotary embedding of an odd number of dimensions ({dim})")
    return Rope(dim=dim, theta=theta)


def _local_layers(c: HF) -> list[bool]:
    """As listed by either name; else all but the first and every sixth."""
    listed = c.hybrid_layer_pattern
    if listed is None or c.layer_types is not None:
        return layer_types(c, lambda i: i > 0 and (i + 1) % 6 != 0)
    return layer_kinds(c, "hybrid_layer_pattern", list(map(str, listed)), "1", "0")


def _dense_layers(c: HF) -> list[bool]:
    """As listed by either name; else the first only."""
    listed, kinds = c.moe_layer_freq, c.mlp_layer_types
    if kinds is not None:
        return layer_kinds(c, "mlp_layer_types", kinds, "dense", "sparse")
    if listed is None:
        return [i == 0 for i in range(c.count("num_hidden_layers"))]
    return layer_kinds(c, "moe_layer_freq", list(map(str, listed)), "0", "1")


def _experts(c: HF) -> MoE:
    for key, known in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        c.refuse((value := c.get(key, known)) != known, f"{key}={value!r}")
    scale = c.get("routed_scaling_factor", 1.0)
    return MoE(
        num_experts=c.count("n_routed_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        score="sigmoid",
        renorm=bool(c.get("norm_topk_prob", True)),
        scale=1.0 if scale is None else scale,
        groups=c.get("n_group", 1),
        top_groups=c.get("topk_group", 1),
        correction=True,
    )
