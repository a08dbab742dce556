"""Zamba2: state spaces, guided in some layers by attention blocks that are used in turn (Glorioso et al. 2024)."""

from quire.errors import ModelError
from quire.models.common import attention, decoder, kv_heads, mlp, rope, tied_by_default
from quire.models.hf import HF
from quire.models.mamba import LINEAR
from quire.models.names import Names, Split
from quire.models.spec import Block, Decoder, Guided, Mamba2, Norm

GATED_EPS = 1e-5  # the norm of states does not follow rms_norm_eps
SAME = (  # keys that repeat others, or that say how and not what is computed
    *("attention_hidden_size", "attention_head_dim", "kv_channels", "mamba_headdim", "num_query_groups"),
    *("hybrid_layer_ids", "chunk_size", "use_mamba_kernels", "use_mem_eff_path", "num_logits_to_keep"),
    *("time_step_max", "time_step_floor", "time_step_limit", "head_dim", "rope_theta", "ffn_hidden_size"),
)


def zamba2(c: HF) -> tuple[Decoder, Names]:
    """Scores are scaled as if heads had half their dimensions, since half of what they read is the embedding."""
    c.skip(*SAME)
    c.refuse_if_set("use_long_context")
    c.refuse(not (tied := tied_by_default(c)), "tie_word_embeddings=false, by which nothing would be shared,")
    for key in ("use_conv_bias", "use_shared_mlp_adapter"):
        c.refuse(not c.get(key, True), f"{key}=false")
    dim, heads, num_blocks = c.count("hidden_size"), c.count("num_attention_heads"), c.count("num_mem_blocks")
    rank, adapts = c.count("adapter_rank"), bool(c.use_shared_attention_adapter)
    size, norm, states = 2 * dim // heads, Norm(eps=c.number("rms_norm_eps")), _states(c, dim)
    whole = attention(
        c,
        num_kv_heads=kv_heads(c),
        head_dim=size,
        rope=rope(c, size) if c.use_mem_rope else None,
        inputs=2 * dim,
        scale=(size / 2) ** -0.5,
    )
    c.refuse(adapts and whole.num_kv_heads != heads, "use_shared_attention_adapter with groups of heads")
    feed_forward = mlp(c, hidden=c.intermediate_size or 4 * dim, bias=states.bias)
    guided = _guided_layers(c)

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

    return decoder(c, block, norm, tied=tied), _names(guided, num_blocks, feed_forward.hidden)


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


def _guided_layers(c: HF) -> list[int]:
    kinds = c.need("layers_block_type", "layer_types")
    unknown = sorted(set(map(str, kinds)) - {*LINEAR, "hybrid"})
    c.refuse(bool(unknown), f"layer type {', '.join(unknown)}")
    if len(kinds) != c.count("num_hidden_layers"):
        raise ModelError(f"config.json: layers_block_type has {len(kinds)} entries")
    return [i for i, kind in enumerate(kinds) if kind == "hybrid"]


def _names(guided: list[int], num_blocks: int, hidden: int) -> Names:
    """What is shared lies in the layer that uses it first; what a use adds is listed there by the use's number."""
    uses = [
        (
            rf"^shared\.\d+\.\w+\.(?:linear_)?(gate_up|[qkv])(?:_proj)?_adapter_list\.{use}\.",
            rf"layers.{i}.mixer.\1_",
        )
        for use, i in enumerate(guided)
    ]
    firsts = [
        (rf"^layers\.{i}\.shared_transformer\.", f"shared.{n}.") for n, i in enumerate(guided[:num_blocks])
    ]
    renames = (
        (r"^model\.", ""),
        *firsts,
        *uses,
        (r"^(layers\.\d+\.mixer\.\w+_)0\.", r"\1a."),
        (r"^(layers\.\d+\.mixer\.\w+_)1\.", r"\1b."),
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
    copies = (r"^layers\.\d+\.shared_transformer\.",)  # of what is shared, in layers that use it again
    splits = {"gate_up_proj": Split({"gate_proj": hidden, "up_proj": hidden})}
    return Names(renames=renames, splits=splits, ignored=copies)
