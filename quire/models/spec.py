"""What a network is, as plain data: it can be printed, compared, sliced and measured anywhere.

A spec knows no device, parallelism, quantization, cache or loading. A field enters when two families need it.
Parameter names follow from the structure (`layers.3.mixer.q_proj.weight`); `names.py` maps checkpoints onto them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from quire.models.spans import Spans

ALIBI_DIMS = 6  # that a key has more where scores fall with the distance; see layers/alibi.py


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMS norm (Zhang and Sennrich 2019) or layer norm; computed in float32."""

    kind: str = "rms"  # rms | layer
    eps: float = 1e-6
    bias: bool = False
    weight: bool = True
    offset: float = 0.0  # Gemma and Nemotron store weight - 1


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) over the first `dim` dimensions of each head."""

    dim: int
    theta: float = 10000.0
    interleaved: bool = False  # GPT-J pairs (0, 1), (2, 3), ...; otherwise halves
    scaling: Mapping[str, object] | None = None  # Hugging Face's rope parameters, "rope_type" first
    # Where tokens have three positions, the one that each pair turns by: 0 time, 1 height, 2 width (Qwen2-VL, 2024).
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Queries at position p are multiplied by 1 + rate * log(1 + (p + first) // length).

    So long sequences stay sharp.
    """

    rate: float
    length: int
    first: int = 0  # Llama 4 counts from 1


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head, grouped-query or multi-query attention, causal but for `spans`.

    Parameters: {q,k,v,o}_proj, gate_proj, {q,k}_norm, sinks; with `q_rank`, q_{a,b}_proj and q_a_layernorm for q_proj.
    A layer that `shares` has those of queries only.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    inputs: int | None = None  # numbers that it reads, if not the network's dimensions
    q_rank: int | None = None  # queries are two products, with so many numbers and their norm in between
    q_rank_norm: Norm | None = None
    bias: bool = False  # of q, k and v
    out_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_span: str = (
        "head"  # what one norm sees: head | full (all heads) | heads (a head; a weight per head)
    )
    norm_after_rope: bool = False
    v_dim: int | None = None  # of a head's value; None: head_dim
    v_scale: float = 1.0  # of values
    v_norm: Norm | None = None  # of a head's value; has no weight
    keys_as_values: bool = False  # not yet normalised nor rotated; there is no v_proj
    shares: int | None = (
        None  # the earlier layer, shaped and local as this one, whose keys and values it reads
    )
    clip: float | None = None  # queries and keys, normalised but not yet rotated, and values stay within it
    window: int | None = None  # positions a token sees, itself included
    chunk: int | None = None  # positions a token sees begin at the last multiple of it
    spans: Spans | None = None  # all layers that have any have the same
    scale: float | None = None  # None: head_dim ** -0.5
    growth: Growth | None = None  # of queries
    softcap: float | None = None
    sinks: bool = False  # a learned logit per head that takes part in the softmax only
    slopes: tuple[float, ...] | None = None  # what a head's scores fall by per position of distance (ALiBi)
    # sigmoid | softplus, of a product of the input: what heads found is multiplied by it
    gate: str | None = None
    gate_per_head: bool = False
    gate_bias: bool = False

    @property
    def value_dim(self) -> int:
        return self.v_dim or self.head_dim


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Which positions a token sees (DeepSeek-V3.2): the `top_k` with the highest sum over heads of w * relu(q . k).

    Parameters: wq_b, of the queries' latent; wk, k_norm, weights_proj, of the input. The cache holds a k per token.
    """

    num_heads: int
    head_dim: int
    top_k: int
    rope: Rope  # of q and k
    norm: Norm  # of k
    own: bool = True  # False: what the last layer before with one of its own has chosen; no parameters


@dataclass(frozen=True, kw_only=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2). The cache holds the latent and one rotated key per token.

    Parameters: q_proj, or q_{a,b}_proj; kv_a_proj_with_mqa, kv_b_proj, {q,kv}_a_layernorm, g_proj, o_proj, indexer.*.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope: Rope | None
    norm: Norm
    scale: float | None = None  # None: (nope_dim + rope_dim) ** -0.5
    growth: Growth | None = None
    gate: bool = False  # the sigmoid of g, one for each head, on what it found
    indexer: Indexer | None = None


@dataclass(frozen=True, kw_only=True)
class ShortConv:
    """c * conv(b * x), where b, c and x are products of the input (LFM2). Parameters: {in,out}_proj, conv.

    The convolution is causal, over each of the network's dimensions by itself, and sees `width` positions.
    """

    width: int
    bias: bool = False  # of all three


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Gated delta rule (Yang et al. 2024): a matrix per head that forgets, and that keys correct.

    Parameters: {q,k,v,g,b,a,o}_proj, {q,k,v}_conv1d, A_log, dt_bias, o_norm. q, k and v pass a causal convolution
    that sees `width` positions, each dimension by itself; g is a gate on what the norm makes of a head's result.
    """

    num_k_heads: int
    num_v_heads: int  # groups of these share a key head
    k_dim: int
    v_dim: int
    width: int
    norm: Norm
    beta_scale: float = 1.0  # of sigmoid(b), how much of the difference a key corrects


@dataclass(frozen=True, kw_only=True)
class KimiDelta:
    """Kimi delta attention (2025): a DeltaNet, each dimension of whose keys forgets at a rate of its own.

    Parameters: {q,k,v,b,f_a,f_b,g_a,g_b,o}_proj, {q,k,v}_conv1d, A_log, dt_bias, o_norm. The rates f and the gate g,
    of which the sigmoid counts, are products of two matrices each, with `rank` numbers between them.
    """

    num_heads: int
    head_dim: int
    width: int
    norm: Norm
    rank: int | None  # None: {f,g}_proj, one matrix each
    floor: float | None = None  # of a decay's logarithm, which is then its sigmoid instead of a softplus


@dataclass(frozen=True, kw_only=True)
class Lightning:
    """Linear attention that forgets at a fixed rate (MiniMax-Text-01). Parameters: {q,k,v,g,o}_proj, {q,k,o}_norm.

    Head h of n forgets by exp(-rate * 2 ** (-8 * (h + 1) / n)) at each position. What heads found is normalised, each
    of `groups` of its dimensions by itself; the sigmoid of g is a gate on the result.
    """

    num_heads: int
    head_dim: int
    rate: float
    norm: Norm
    groups: int = 1
    activated: bool = True  # q, k and v, by silu
    qk_norm: Norm | None = None  # of a head
    rope: Rope | None = None
    scale: float = 1.0  # of q


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """State spaces with a decay for each channel's each dimension (Gu and Dao 2023).

    Parameters: {value,gate,out}_proj, conv1d; of each head heads.N.{x,dt}_proj, .A_log, .D, .{dt,b,c}_layernorm.
    """

    channels: int
    num_heads: int = 1  # that choose what is written and read from their own channels only
    state_dim: int  # of a channel
    step_rank: int  # of the projection that makes time steps
    width: int  # of the convolution
    norm: Norm | None = (
        None  # of what x_proj makes: time steps, what writes to the states and what reads them
    )
    bias: bool = False
    conv_bias: bool = True

    @property
    def head_dim(self) -> int:
        return self.channels // self.num_heads


@dataclass(frozen=True, kw_only=True)
class Mamba2:
    """State spaces with one decay per head (Dao and Gu 2024).

    Parameters: {in,out}_proj, conv1d, A_log, D, dt_bias, norm, which sees a group's heads at a time, gated.
    """

    num_heads: int
    head_dim: int
    state_dim: int
    groups: int  # of heads that share what writes to their states and what reads them
    width: int  # of the convolution
    norm: Norm | None
    norm_first: bool = False  # the gate multiplies what the norm makes
    bias: bool = False
    conv_bias: bool = True
    time_step: tuple[float, float] = (0.0, math.inf)  # its limits
    scales: tuple[float, ...] | None = (
        None  # of what in_proj makes: gate, values, what writes, what reads, time steps
    )

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Channels of the convolution: values, and what writes and reads."""
        return self.inner + 2 * self.groups * self.state_dim


@dataclass(frozen=True, kw_only=True)
class RGLRU:
    """act(linear_y(x)) * a gated linear recurrence of conv(linear_x(x)), channel by channel (Griffin, De et al. 2024).

    Parameters: linear_{x,y,out}, conv_1d, all with biases; rg_lru.recurrent_param, and of either gate, which sees the
    channels of one head, rg_lru.{input,recurrent}_gate_{weight,bias}.
    """

    channels: int
    num_heads: int
    width: int  # of the convolution
    act: str


@dataclass(frozen=True, kw_only=True)
class Both:
    """Attention and state spaces of the same input, each times its scale, added (Falcon-H1)."""

    attention: Attention
    states: Mamba2
    attention_scale: float = 1.0
    states_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MLP:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) when not gated.

    xielu (Huang and Schlag 2024) has parameters of its own and is not for gates or experts: act_fn.*.
    """

    hidden: int
    act: str = "silu"  # silu | gelu | gelu_pytorch_tanh | gelu_new | relu | relu2 | xielu
    gated: bool = True
    bias: bool = False
    gate_scale: float = 1.0  # of what act sees of a gate
    limit: float | None = None  # gates, activated, are at most this, and ups within it
    sparsity: float = (
        0.0  # gates lose what this share of equally many normally distributed ones is below; at least 0
    )
    out_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Apart:
    """Routed experts that see the stream, not the norm of it that the shared one sees (Gemma 4).

    Parameters, of the MoE: {router,experts,experts_post,shared_post}_norm, gate.per_expert_scale. The router and the
    experts have norms of their own before them, and the experts and the shared one behind them.
    """

    norm: Norm
    router_scale: float  # of what the router's norm makes


@dataclass(frozen=True, kw_only=True)
class MoE:
    """Sparse experts behind a router. Parameters: gate, experts.N.{gate,up,down}_proj, shared.*, shared_expert_gate."""

    num_experts: int
    top_k: int
    expert: MLP
    score: str = "softmax"  # softmax | sigmoid | {softmax,sigmoid}_topk (of the chosen logits) | sparse_mixer
    renorm: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    correction: bool = False  # e_score_correction_bias picks the experts, not their weights
    router_bias: bool = False
    shared: MLP | None = None
    shared_gate: bool = False
    apart: Apart | None = None
    # A weight multiplies what an expert sees, not what it makes of it; top_k is 1.
    weighs_inputs: bool = False
    held: int | None = None  # of a part (shard.py): experts whose weights it has, which are whole; None: all


@dataclass(frozen=True, kw_only=True)
class Guided:
    """State spaces of x + guide(mlp(attention(x beside the embedding))), with a norm before each (Zamba).

    Layers with the same `shared` have attention, mlp and the norms before them in common: parameters
    shared.N.{attention,mlp}.*, shared.N.{attn,mlp}_norm. Of each layer: states.*, norm, guide, and what it adds to the
    products of queries, keys and values, and of gate and up: {q,k,v,gate_up}_{a,b}, two products with so many numbers
    between them as the ranks say.
    """

    attention: Attention
    mlp: MLP
    states: Mamba | Mamba2
    norm: Norm
    shared: int
    qkv_rank: int | None = None
    up_rank: int | None = None


Mixer = (
    Attention | MLA | ShortConv | DeltaNet | KimiDelta | Lightning | Mamba | Mamba2 | RGLRU | Both | Guided
)


def attention_of(mixer: Mixer | None) -> Attention | MLA | None:
    """The mixer, or the part of it, that reads the cache of keys and values; None if none does."""
    if isinstance(mixer, Both | Guided):
        return mixer.attention
    return mixer if isinstance(mixer, Attention | MLA) else None


@dataclass(frozen=True, kw_only=True)
class LayerEmbedding:
    """What a layer adds last: norm(projection(act(gate(x)) * e)), e being `dim` numbers for a token (Gemma 3n).

    e is (norm(a product of the embedding / sqrt(its dim)) + a row of a table * sqrt(`dim`)) / sqrt(2). Parameters:
    per_layer_input_gate, per_layer_projection, post_per_layer_input_norm.
    """

    dim: int
    act: str
    norm: Norm


@dataclass(frozen=True, kw_only=True)
class AltUp:
    """Alternating updates (Baykal et al. 2023): of `num` streams a layer computes one, and updates the others by it.

    All are first predicted from all, by coefficients that depend on the token. What the layer's embedding adds goes to
    all but the first. And LAuReL (Menghani et al. 2024), a residual of few dimensions beside attention:
    h = (x + post(attn(y)) + y + norm(right(left(y)))) / sqrt(2), where y is pre(x).

    Parameters: altup.{modality_router,prediction_coefs,correction_coefs,router_norm,correct_output_scale},
    laurel.{linear_left,linear_right,post_laurel_norm}; and the decoder's altup_{,unembed_}projections.N.
    """

    num: int
    active: int
    is_scaled: bool  # the active one, dimension by dimension, for the layer's embedding
    rank: int
    norm: Norm


@dataclass(frozen=True, kw_only=True)
class Block:
    """One layer. Sequential: h = x + post(attn(pre(x))); h + post(mlp(pre(h))). See `parallel` for the other.

    Without `mixer` or without `mlp` it is x + post(that part(pre(x))), with the norms called attn_*.
    """

    mixer: Mixer | None
    mlp: MLP | MoE | None
    attn_norm: Norm | None
    mlp_norm: Norm | None
    attn_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    parallel: bool = False  # x + attn(n(x)) + mlp(n(x)); without mlp_norm the two share one norm
    residual_scale: float = 1.0
    # MiniMax: h = a * pre(x) + post(attn(pre(x))); b * pre(h) + post(mlp(pre(h))).
    normed_residual: tuple[float, float] | None = None
    altup: AltUp | None = None  # all layers' or none's
    embedding: LayerEmbedding | None = None
    scalar: bool = False  # all that comes of the layer is multiplied by one learned number: layer_scalar


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only language model. Parameters: embed_{tokens,positions,norm}, layers.N.*, norm, lm_head.

    Where layers have embeddings: embed_tokens_per_layer, per_layer_model_projection, per_layer_projection_norm.
    """

    vocab_size: int
    dim: int
    max_length: int  # positions the model was made for
    blocks: tuple[Block, ...]
    norm: Norm
    embed_scale: float = 1.0
    embed_norm: Norm | None = None
    num_positions: int = 0  # rows of learned absolute positions, if any
    position_offset: int = 0  # OPT starts at 2
    layer_rows: int = 0  # of the table of layers' embeddings; tokens beyond it have its first row
    sinusoids: int = 0  # computed positions: sines, then cosines of position / 10000 ** (j / sinusoids)
    tied: bool = False  # the head is the embedding
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What one call of attention has: queries and keys of `k_dim`, values of `v_dim`; the rest as in Attention."""

    num_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    v_in_k: bool = False  # values are the beginnings of keys


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A part of what a module keeps of a sequence: float32 if `exact`, else in the network's dtype."""

    kind: str
    number: int
    shape: tuple[int, ...]
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A network that Transformers' own modules compute, as far as others must know it (layers/hf).

    Parameters have the modules' names. `products` are weights that inputs are multiplied with, the head's included.
    """

    architecture: str
    vocab_size: int
    dim: int
    max_length: int
    attention: tuple[Heads, ...]  # calls of a forward pass, in order
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    products: frozenset[str]
    head: str  # the product that makes logits; none of the parameters where it is the embedding
    states: tuple[tuple[str, tuple[Kept, ...]], ...] = ()  # modules that keep some of each sequence
    alone: bool = False  # sequences of a step are computed one after another, by the modules' own attention
    spans: Spans | None = None  # of all calls


Spec = Decoder | Foreign


def has_axes(spec: Spec) -> bool:
    """Whether tokens may have positions in time, height and width."""
    mixers = () if isinstance(spec, Foreign) else [attention_of(block.mixer) for block in spec.blocks]
    ropes = [mixer.rope for mixer in mixers if mixer is not None]
    return any(rope is not None and rope.axes for rope in ropes)


def num_chosen(spec: Spec, length: int) -> int:
    """The most positions that an indexer chooses for a token; 0 if in sequences of that length each sees all."""
    mixers = () if isinstance(spec, Foreign) else [block.mixer for block in spec.blocks]
    counts = [m.indexer.top_k for m in mixers if isinstance(m, MLA) and m.indexer]
    return max((count for count in counts if count < length), default=0)
