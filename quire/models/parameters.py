"""Which parameters a network has, and what they and their cache weigh. Knows shapes, not tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from quire.models.spec import (
    ALIBI_DIMS,
    MLA,
    MLP,
    RGLRU,
    AltUp,
    Attention,
    Block,
    Both,
    Decoder,
    DeltaNet,
    Foreign,
    Guided,
    Indexer,
    KimiDelta,
    Lightning,
    Mamba,
    Mamba2,
    Mixer,
    MoE,
    Norm,
    ShortConv,
    Spec,
    attention_of,
)

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def parameter_shapes(spec: Spec) -> Named:
    """Every parameter of a network by its name, in the order in which a forward pass meets them."""
    if isinstance(spec, Foreign):
        yield from spec.parameters
        return
    yield "embed_tokens.weight", (spec.vocab_size, spec.dim)
    if spec.num_positions:
        yield "embed_positions.weight", (spec.num_positions, spec.dim)
    yield from _within("embed_norm", _norm(spec.embed_norm, (spec.dim,)))
    if size := layer_dims(spec):
        yield "embed_tokens_per_layer.weight", (spec.layer_rows, size)
        yield "per_layer_model_projection.weight", (size, spec.dim)
        first = next(block.embedding for block in spec.blocks if block.embedding)
        yield from _within("per_layer_projection_norm", _norm(first.norm, (first.dim,)))
    altup = spec.blocks[0].altup
    for i in range(altup.num - 1 if altup else 0):
        yield f"altup_projections.{i}.weight", (spec.dim, spec.dim)
        yield f"altup_unembed_projections.{i}.weight", (spec.dim, spec.dim)
    for i, block in enumerate(spec.blocks):
        yield from _within(f"layers.{i}", block_shapes(block, spec.dim))
    shared = {b.mixer.shared: b.mixer for b in spec.blocks if isinstance(b.mixer, Guided)}
    for i, mixer in shared.items():
        yield from _within(f"shared.{i}", shared_shapes(mixer, spec.dim))
    yield from _within("norm", _norm(spec.norm, (spec.dim,)))
    if not spec.tied:
        yield "lm_head.weight", (spec.vocab_size, spec.dim)
    if spec.head_bias:
        yield "lm_head.bias", (spec.vocab_size,)


def block_shapes(block: Block, dim: int) -> Named:
    """The parameters of one layer."""
    yield from _within("attn_norm", _norm(block.attn_norm, (dim,)))
    if block.mixer:
        yield from _within("mixer", _mixer(block.mixer, dim))
    yield from _within("attn_post_norm", _norm(block.attn_post_norm, (dim,)))
    yield from _within("mlp_norm", _norm(block.mlp_norm, (dim,)))
    if block.mlp:
        yield from _within(
            "mlp", _moe(block.mlp, dim) if isinstance(block.mlp, MoE) else _mlp(block.mlp, dim)
        )
    yield from _within("mlp_post_norm", _norm(block.mlp_post_norm, (dim,)))
    if block.embedding:
        yield from _linear("per_layer_input_gate", block.embedding.dim, dim)
        yield from _linear("per_layer_projection", dim, block.embedding.dim)
        yield from _within("post_per_layer_input_norm", _norm(block.embedding.norm, (dim,)))
    if block.scalar:
        yield "layer_scalar", (1,)
    if block.altup:
        yield from _altup(block.altup, dim)


def layer_dims(spec: Decoder) -> int:
    """Numbers that a token has for all layers together, beside its embedding."""
    return sum(block.embedding.dim for block in spec.blocks if block.embedding)


def shared_shapes(mixer: Mixer | None, dim: int) -> Named:
    """The parameters that a mixer has in common with others."""
    if isinstance(mixer, Guided):
        yield from _within("attn_norm", _norm(mixer.norm, (2 * dim,)))
        yield from _within("attention", _attention(mixer.attention, dim))
        yield from _within("mlp_norm", _norm(mixer.norm, (dim,)))
        yield from _within("mlp", _mlp(mixer.mlp, dim))


@dataclass(frozen=True)
class Count:
    """Parameters of a network. `active` are those that one token passes through: top_k of the experts."""

    total: int
    active: int


def num_parameters(spec: Spec) -> Count:
    """Counts a tied head once, and as active; all are where nobody knows."""
    if isinstance(spec, Foreign):
        total = sum(prod(shape) for _, shape in spec.parameters)
        return Count(total, total)
    outside = sum(prod(shape) for name, shape in parameter_shapes(spec) if not name.startswith("layers."))
    total = active = outside
    for block in spec.blocks:
        here = sum(prod(shape) for _, shape in block_shapes(block, spec.dim))
        total += here
        active += here - _idle(block.mlp, spec.dim)
    return Count(total, active)


def kv_values_per_token(block: Block) -> int:
    """Numbers that one layer caches for one token."""
    shares = isinstance(block.mixer, Attention) and block.mixer.shares is not None
    return index_values(block) + (0 if shares else kv_values_read(block))


def index_values(block: Block) -> int:
    """Numbers that one layer caches for one token to choose by, and reads of every token before."""
    indexer = block.mixer.indexer if isinstance(block.mixer, MLA) else None
    return indexer.head_dim if indexer and indexer.own else 0


def kv_values_read(block: Block) -> int:
    """Numbers that one layer reads of one cached token that it sees."""
    mixer = attention_of(block.mixer)
    if isinstance(mixer, MLA):
        return mixer.kv_rank + mixer.rope_dim
    if mixer is None:
        return 0
    return mixer.num_kv_heads * (mixer.head_dim + mixer.value_dim + (ALIBI_DIMS if mixer.slopes else 0))


def kv_bytes_per_token(spec: Decoder, value_bytes: int = 2) -> int:
    """Bytes of cache that one more token needs, as long as it is within every layer's window."""
    return sum(kv_values_per_token(block) for block in spec.blocks) * value_bytes


def _idle(mlp: MLP | MoE | None, dim: int) -> int:
    if not isinstance(mlp, MoE):
        return 0
    return (mlp.num_experts - mlp.top_k) * sum(prod(shape) for _, shape in _mlp(mlp.expert, dim))


def _within(prefix: str, named: Named) -> Named:
    for name, shape in named:
        yield f"{prefix}.{name}", shape


def _norm(norm: Norm | None, shape: Shape) -> Named:
    if norm and norm.weight:
        yield "weight", shape
    if norm and norm.bias:
        yield "bias", shape


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Named:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _conv(name: str, channels: int, width: int, bias: bool) -> Named:
    yield f"{name}.weight", (channels, 1, width)
    if bias:
        yield f"{name}.bias", (channels,)


def _altup(s: AltUp, dim: int) -> Named:
    yield "altup.modality_router.weight", (s.num, dim)
    yield "altup.prediction_coefs.weight", (s.num**2, s.num)
    yield "altup.correction_coefs.weight", (s.num, s.num)
    yield "altup.correct_output_scale", (dim,)
    yield from _within("altup.router_norm", _norm(s.norm, (dim,)))
    yield from _linear("laurel.linear_left", s.rank, dim)
    yield from _linear("laurel.linear_right", dim, s.rank)
    yield from _within("laurel.post_laurel_norm", _norm(s.norm, (dim,)))


def _mixer(s: Mixer, dim: int) -> Named:
    match s:
        case Attention():
            return _attention(s, dim)
        case MLA():
            return _mla(s, dim)
        case ShortConv():
            return _short_conv(s, dim)
        case DeltaNet():
            return _delta_net(s, dim)
        case KimiDelta():
            return _kimi_delta(s, dim)
        case Lightning():
            return _lightning(s, dim)
        case Mamba():
            return _mamba(s, dim)
        case Mamba2():
            return _mamba2(s, dim)
        case RGLRU():
            return _rglru(s, dim)
        case Both():
            return _both(s, dim)
        case Guided():
            return _guided(s, dim)


def _attention(s: Attention, dim: int) -> Named:
    inputs = s.inputs or dim
    if s.q_rank:
        yield from _linear("q_a_proj", s.q_rank, inputs, s.bias)
        yield from _within("q_a_layernorm", _norm(s.q_rank_norm, (s.q_rank,)))
        yield from _linear("q_b_proj", s.num_heads * s.head_dim, s.q_rank)
    else:
        yield from _linear("q_proj", s.num_heads * s.head_dim, inputs, s.bias)
    keys = () if s.shares is not None else ("k",)
    if keys:
        yield from _linear("k_proj", s.num_kv_heads * s.head_dim, inputs, s.bias)
    if keys and not s.keys_as_values:
        yield from _linear("v_proj", s.num_kv_heads * s.value_dim, inputs, s.bias)
    for name in ("q", *keys):
        heads = s.num_heads if name == "q" else s.num_kv_heads
        spans = {"head": (s.head_dim,), "full": (heads * s.head_dim,), "heads": (heads, s.head_dim)}
        yield from _within(f"{name}_norm", _norm(s.qk_norm, spans[s.qk_norm_span]))
    if s.sinks:
        yield "sinks", (s.num_heads,)
    if s.gate:
        yield from _linear(
            "gate_proj", s.num_heads * (1 if s.gate_per_head else s.value_dim), inputs, s.gate_bias
        )
    yield from _linear("o_proj", dim, s.num_heads * s.value_dim, s.out_bias)


def _mla(s: MLA, dim: int) -> Named:
    q = s.num_heads * (s.nope_dim + s.rope_dim)
    if s.q_rank:
        yield from _linear("q_a_proj", s.q_rank, dim)
        yield from _within("q_a_layernorm", _norm(s.norm, (s.q_rank,)))
        yield from _linear("q_b_proj", q, s.q_rank)
    else:
        yield from _linear("q_proj", q, dim)
    yield from _linear("kv_a_proj_with_mqa", s.kv_rank + s.rope_dim, dim)
    yield from _within("kv_a_layernorm", _norm(s.norm, (s.kv_rank,)))
    yield from _linear("kv_b_proj", s.num_heads * (s.nope_dim + s.v_dim), s.kv_rank)
    if s.gate:
        yield from _linear("g_proj", s.num_heads, dim)
    if s.indexer and s.indexer.own:
        yield from _within("indexer", _indexer(s.indexer, dim, s.q_rank or 0))
    yield from _linear("o_proj", dim, s.num_heads * s.v_dim)


def _indexer(s: Indexer, dim: int, q_rank: int) -> Named:
    yield from _linear("wq_b", s.num_heads * s.head_dim, q_rank)
    yield from _linear("wk", s.head_dim, dim)
    yield from _within("k_norm", _norm(s.norm, (s.head_dim,)))
    yield from _linear("weights_proj", s.num_heads, dim)


def _short_conv(s: ShortConv, dim: int) -> Named:
    yield from _linear("in_proj", 3 * dim, dim, s.bias)
    yield from _conv("conv", dim, s.width, s.bias)
    yield from _linear("out_proj", dim, dim, s.bias)


def _delta_net(s: DeltaNet, dim: int) -> Named:
    keys, values = s.num_k_heads * s.k_dim, s.num_v_heads * s.v_dim
    for part, size in (("q", keys), ("k", keys), ("v", values)):
        yield from _linear(f"{part}_proj", size, dim)
        yield f"{part}_conv1d.weight", (size, 1, s.width)
    for part, size in (("g", values), ("b", s.num_v_heads), ("a", s.num_v_heads)):
        yield from _linear(f"{part}_proj", size, dim)
    yield "A_log", (s.num_v_heads,)
    yield "dt_bias", (s.num_v_heads,)
    yield from _within("o_norm", _norm(s.norm, (s.v_dim,)))
    yield from _linear("o_proj", dim, values)


def a_log_shape(s: KimiDelta) -> Shape:
    """Kimi Linear stores it as it is multiplied."""
    return (s.num_heads,) if s.rank is None else (1, 1, s.num_heads, 1)


def _kimi_delta(s: KimiDelta, dim: int) -> Named:
    size = s.num_heads * s.head_dim
    for part in "qkv":
        yield from _linear(f"{part}_proj", size, dim)
        yield f"{part}_conv1d.weight", (size, 1, s.width)
    yield from _linear("b_proj", s.num_heads, dim)
    for part in "fg":
        if s.rank is None:
            yield from _linear(f"{part}_proj", size, dim)
        else:
            yield from _linear(f"{part}_a_proj", s.rank, dim)
            yield from _linear(f"{part}_b_proj", size, s.rank)
    yield "A_log", a_log_shape(s)
    yield "dt_bias", (size,)
    yield from _within("o_norm", _norm(s.norm, (s.head_dim,)))
    yield from _linear("o_proj", dim, size)


def _lightning(s: Lightning, dim: int) -> Named:
    size = s.num_heads * s.head_dim
    for part in "qkvg":
        yield from _linear(f"{part}_proj", size, dim)
    for part in "qk":
        yield from _within(f"{part}_norm", _norm(s.qk_norm, (s.head_dim,)))
    yield from _within("o_norm", _norm(s.norm, (size,)))
    yield from _linear("o_proj", dim, size)


def _mamba(s: Mamba, dim: int) -> Named:
    for part in ("value", "gate"):
        yield from _linear(f"{part}_proj", s.channels, dim, s.bias)
    yield from _conv("conv1d", s.channels, s.width, s.conv_bias)
    for i in range(s.num_heads):
        yield from _within(f"heads.{i}", _scan(s))
    yield from _linear("out_proj", dim, s.channels, s.bias)


def _scan(s: Mamba) -> Named:
    yield from _linear("x_proj", s.step_rank + 2 * s.state_dim, s.head_dim)
    for name, size in (("dt", s.step_rank), ("b", s.state_dim), ("c", s.state_dim)):
        yield from _within(f"{name}_layernorm", _norm(s.norm, (size,)))
    yield from _linear("dt_proj", s.head_dim, s.step_rank, bias=True)
    yield "A_log", (s.head_dim, s.state_dim)
    yield "D", (s.head_dim,)


def _mamba2(s: Mamba2, dim: int) -> Named:
    yield from _linear("in_proj", s.inner + s.convolved + s.num_heads, dim, s.bias)
    yield from _conv("conv1d", s.convolved, s.width, s.conv_bias)
    for name in ("A_log", "D", "dt_bias"):
        yield name, (s.num_heads,)
    yield from _within("norm", _norm(s.norm, (s.inner,)))
    yield from _linear("out_proj", dim, s.inner, s.bias)


def _both(s: Both, dim: int) -> Named:
    yield from _within("attention", _attention(s.attention, dim))
    yield from _within("states", _mamba2(s.states, dim))


def additions(s: Guided, dim: int) -> dict[str, tuple[int | None, int, int]]:
    """By product: the rank of what a layer adds to it, its inputs and its outputs."""
    a = s.attention
    size, rows = a.inputs or dim, {"q": a.num_heads, "k": a.num_kv_heads, "v": a.num_kv_heads}
    qkv = {name: (s.qkv_rank, size, heads * a.head_dim) for name, heads in rows.items()}
    return qkv | {"gate_up": (s.up_rank, dim, 2 * s.mlp.hidden)}


def _guided(s: Guided, dim: int) -> Named:
    for name, (rank, inputs, outputs) in additions(s, dim).items():
        if rank:
            yield from _linear(f"{name}_a", rank, inputs)
            yield from _linear(f"{name}_b", outputs, rank)
    yield from _linear("guide", dim, dim)
    yield from _within("norm", _norm(s.norm, (dim,)))
    yield from _within("states", _mixer(s.states, dim))


def _rglru(s: RGLRU, dim: int) -> Named:
    for name in ("linear_x", "linear_y"):
        yield from _linear(name, s.channels, dim, bias=True)
    yield from _conv("conv_1d", s.channels, s.width, bias=True)
    size = s.channels // s.num_heads
    for gate in ("input", "recurrent"):
        yield f"rg_lru.{gate}_gate_weight", (s.num_heads, size, size)
        yield f"rg_lru.{gate}_gate_bias", (s.num_heads, size)
    yield "rg_lru.recurrent_param", (s.channels,)
    yield from _linear("linear_out", dim, s.channels, bias=True)


def _mlp(s: MLP, dim: int) -> Named:
    if s.gated:
        yield from _linear("gate_proj", s.hidden, dim, s.bias)
    yield from _linear("up_proj", s.hidden, dim, s.bias)
    if s.act == "xielu":
        yield from (
            ("act_fn.alpha_p", (1,)),
            ("act_fn.alpha_n", (1,)),
            ("act_fn.beta", ()),
            ("act_fn.eps", ()),
        )
    yield from _linear("down_proj", dim, s.hidden, s.bias)


def _moe(s: MoE, dim: int) -> Named:
    yield from _linear("gate", s.num_experts, dim, s.router_bias)
    if s.correction:
        yield "gate.e_score_correction_bias", (s.num_experts,)
    for i in range(s.num_experts if s.held is None else s.held):
        yield from _within(f"experts.{i}", _mlp(s.expert, dim))
    if s.shared:
        yield from _within("shared", _mlp(s.shared, dim))
    if s.shared_gate:
        yield from _linear("shared_expert_gate", 1, dim)
    if s.apart:
        for name in ("router", "experts", "experts_post", "shared_post"):
            yield from _within(f"{name}_norm", _norm(s.apart.norm, (dim,)))
        yield "gate.per_expert_scale", (s.num_experts,)
