"""Zamba and Zamba2: state spaces, guided in some layers by attention blocks that are used in turn.

Glorioso et al. 2024. Scores are scaled as if heads had half their dimensions, since half of what they read is the
embedding.
"""

from quire.errors import ModelError
from quire.models.common import attention, decoder, kv_heads, mlp, rope, tied_by_default
from quire.models.hf import HF
from quire.models.mamba import LINEAR, refuse_activation, step_rank, values_and_gate
from quire.models.names import Names, Split
from quire.models.spec import Attention, Block, Decoder, Guided, Mamba, Mamba2, Norm, Rope

GATED_EPS = 1e-5  # the norm of states does not follow rms_norm_eps
SAME = (  # keys that repeat others, or that say how and not what is computed
    *("attention_hidden_size", "attention_head_dim", "kv_channels", "mamba_headdim", "num_query_groups"),
    *("hybrid_layer_ids", "chunk_size", "use_mamba_kernels", "use_mem_eff_path", "num_logits_to_keep"),
    *("time_step_max", "time_step_floor", "time_step_limit", "head_dim", "rope_theta", "ffn_hidden_size"),
)
FIRST_KINDS = ("mamba", "mamba", "hybrid")  # of Zamba's layers, before those that follow its period
RENAMES = (
    (r"^(shared\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(shared\.\d+)\.feed_forward\.", r"\1.mlp."),
    (r"^(shared\.\d+)\.input_layernorm\.", r"\1.attn_norm."),
    (r"^(shared\.\d+)\.pre_ff_layernorm\.", r"\1.mlp_norm."),
    (r"\.mamba_decoder\.input_layernorm\.", ".mixer.norm."),
    (r"\.mamba_decoder\.mamba\.", ".mixer.states."),
    (r"^(layers\.\d+)\.linear\.", r"\1.mixer.guide."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.mamba\.", ".mixer."),
    (r"^final_layernorm\.", "norm."),
)


def zamba(c: HF) -> tuple[Decoder, Names]:
    """Mamba with several heads; one attention block, without positions."""
    c.skip("use_mamba_kernels", "use_associative_scan", "num_logits_to_keep")
    c.skip("time_step_min", "time_step_max", "time_step_floor", "attn_layer_period", "attn_layer_offset")
    refuse_activation(c, "hidden_mamba_act")
    norm, states, inputs = Norm(eps=c.number("rms_norm_eps")), _scan(c), 2 * c.count("hidden_size")
    c.refuse(
        (c.attention_hidden_size or inputs) != inputs, "attention_hidden_size that is not twice hidden_size"
    )
    size = c.attention_head_dim or c.head_dim or inputs // c.count("num_attention_heads")
    mixer = Guided(
        attention=_attention(c, size, c.count("num_key_value_heads")),
        mlp=mlp(c),
        states=states,
        norm=norm,
        shared=0,
    )
    kinds = c.layers_block_type or c.layer_types or _periodic_kinds(c)
    guided = _guided_layers(c, kinds)

    def block(i: int) -> Block:
        if i in guided:
            return Block(mixer=mixer, mlp=None, attn_norm=None, mlp_norm=None)
        return Block(mixer=states, mlp=None, attn_norm=norm, mlp_norm=None)

    renames = ((r"^model\.", ""), *_owners(guided[:1], "shared_transf"), *RENAMES)
    ignored = (r"^layers\.\d+\.shared_transf\.",)
    stacked = (
        (r"\.(x_proj|dt_proj)_(weight|bias)$", r".heads.{}.\1.\2"),
        (r"\.(A_log|D)$", r".heads.{}.\1"),
    )
    splits = values_and_gate(states, states.channels)  # row by row
    names = Names(renames=renames, splits=splits, ignored=ignored, stacked=stacked)
    return decoder(c, block, norm, tied=_tied(c)), names


def zamba2(c: HF) -> tuple[Decoder, Names]:
    """Mamba-2; attention blocks to whose products each use adds its own."""
    c.skip(*SAME)
    c.refuse_if_set("use_long_context")
    for key in ("use_conv_bias", "use_shared_mlp_adapter"):
        c.refuse(not c.get(key, True), f"{key}=false")
    dim, heads, num_blocks = c.count("hidden_size"), c.count("num_attention_heads"), c.count("num_mem_blocks")
    rank, adapts = c.count("adapter_rank"), bool(c.use_shared_attention_adapter)
    size, norm, states = 2 * dim // heads, Norm(eps=c.number("rms_norm_eps")), _states(c, dim)
    whole = _attention(c, size, kv_heads(c), rope(c, size) if c.use_mem_rope else None)
    c.refuse(adapts and whole.num_kv_heads != heads, "use_shared_attention_adapter with groups of heads")
    feed_forward = mlp(c, hidden=c.intermediate_size or 4 * dim, bias=states.bias)
    guided = _guided_layers(c, c.need("layers_block_type", "layer_types"))

    def block(i: int) -> Block:
        if i not in guided:
            return Block(mixer=states, mlp=None, attn_norm=norm, mlp_norm=None)
        mixer = Guided(
            attention=whole,
            mlp=feed_forward,
            states=states,
            norm=norm,
            shared=guided.index(i) % num_blocks,
            qkv_rank=rank if adapts else None,
            up_rank=rank,
        )
        return Block(mixer=mixer, mlp=None, attn_norm=None, mlp_norm=None)

    return decoder(c, block, norm, tied=_tied(c)), _names2(guided, num_blocks, feed_forward.hidden)


def _tied(c: HF) -> bool:
    tied = tied_by_default(c)
    c.refuse(not tied, "tie_word_embeddings=false, by which nothing would be shared,")
    return tied


def _attention(c: HF, size: int, num_kv_heads: int, rotary: Rope | None = None) -> Attention:
    """With heads of `size` dimensions, which read the residual and the embedding."""
    inputs, scale = 2 * c.count("hidden_size"), (size / 2) ** -0.5
    return attention(c, num_kv_heads=num_kv_heads, head_dim=size, rope=rotary, inputs=inputs, scale=scale)


def _scan(c: HF) -> Mamba:
    channels, heads = c.count("mamba_expand") * c.count("hidden_size"), c.count("n_mamba_heads")
    if channels % heads:
        raise ModelError(f"config.json: {channels} channels are not a multiple of n_mamba_heads {heads}")
    return Mamba(
        channels=channels,
        num_heads=heads,
        state_dim=c.count("mamba_d_state"),
        step_rank=step_rank(c, "mamba_dt_rank"),
        width=c.count("mamba_d_conv"),
        bias=bool(c.mamba_proj_bias),
        conv_bias=bool(c.get("mamba_conv_bias", True)),
    )


def _states(c: HF, dim: int) -> Mamba2:
    heads = c.count("n_mamba_heads")
    return Mamba2(
        num_heads=heads,
        head_dim=int(c.number("mamba_expand") * dim) // heads,
        state_dim=c.count("mamba_d_state"),
        groups=c.count("mamba_ngroups"),
        width=c.count("mamba_d_conv"),
        norm=Norm(eps=GATED_EPS),
        bias=bool(c.add_bias_linear),
        time_step=(c.number("time_step_min"), float("inf")),
    )


def _periodic_kinds(c: HF) -> list[str]:
    period, offset = c.count("attn_layer_period"), c.stated("attn_layer_offset")
    left = range(c.count("num_hidden_layers") - len(FIRST_KINDS))
    return [*FIRST_KINDS, *("hybrid" if i % period == offset else "mamba" for i in left)]


def _guided_layers(c: HF, kinds: list[str]) -> list[int]:
    unknown = sorted(set(map(str, kinds)) - {*LINEAR, "hybrid"})
    c.refuse(bool(unknown), f"layer type {', '.join(unknown)}")
    if len(kinds) != c.count("num_hidden_layers"):
        raise ModelError(f"config.json: layers_block_type has {len(kinds)} entries")
    return [i for i, kind in enumerate(kinds) if kind == "hybrid"]


def _owners(layers: list[int], module: str) -> tuple[tuple[str, str], ...]:
    """What is shared lies in the layer that uses it first; others may have copies."""
    return tuple((rf"^layers\.{i}\.{module}\.", f"shared.{n}.") for n, i in enumerate(layers))


def _names2(guided: list[int], num_blocks: int, hidden: int) -> Names:
    """What a use adds is listed with what is shared, by the use's number."""
    uses = [
        (
            rf"^shared\.\d+\.\w+\.(?:linear_)?(gate_up|[qkv])(?:_proj)?_adapter_list\.{use}\.",
            rf"layers.{i}.mixer.\1_",
        )
        for use, i in enumerate(guided)
    ]
    renames = (
        (r"^model\.", ""),
        *_owners(guided[:num_blocks], "shared_transformer"),
        *uses,
        (r"^(layers\.\d+\.mixer\.\w+_)0\.", r"\1a."),
        (r"^(layers\.\d+\.mixer\.\w+_)1\.", r"\1b."),
        *RENAMES,
    )
    splits = {"gate_up_proj": Split({"gate_proj": hidden, "up_proj": hidden})}
    return Names(renames=renames, splits=splits, ignored=(r"^layers\.\d+\.shared_transformer\.",))
