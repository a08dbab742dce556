"""What a network is, as plain data: it can be printed, compared, sliced and measured anywhere.

A spec knows no device, parallelism, quantization, cache or loading. A field enters when two families need it.
Parameter names follow from the structure (`layers.3.mixer.q_proj.weight`); `names.py` maps checkpoints onto them.
"""

from collections.abc import Mapping
from dataclasses import dataclass


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


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head, grouped-query or multi-query attention, causal.

    Parameters: {q,k,v,g,o}_proj, {q,k}_norm, sinks.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    bias: bool = False  # of q, k and v
    out_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_span: str = (
        "head"  # what one norm sees: head | full (all heads) | heads (a head; a weight per head)
    )
    norm_after_rope: bool = False
    window: int | None = None  # positions a token sees, itself included
    scale: float | None = None  # None: head_dim ** -0.5
    softcap: float | None = None
    sinks: bool = False  # a learned logit per head that takes part in the softmax only
    # On what a head found, the sigmoid of g: full (one for each number; g has a bias if q has) | head (one for all).
    gate: str | None = None


@dataclass(frozen=True, kw_only=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2). The cache holds the latent and one rotated key per token.

    Parameters: q_proj, or q_{a,b}_proj; kv_a_proj_with_mqa, kv_b_proj, {q,kv}_a_layernorm, g_proj, o_proj.
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
    gate: bool = False  # the sigmoid of g, one for each head, on what it found


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
    """Linear attention that forgets at a fixed rate (MiniMax-Text-01). Parameters: {q,k,v,g,o}_proj, o_norm.

    q, k and v are activated by silu. Head h of n forgets by exp(-rate * 2 ** (-8 * (h + 1) / n)) at each position. The
    norm is of all heads together; the sigmoid of g is a gate on its result.
    """

    num_heads: int
    head_dim: int
    rate: float
    norm: Norm


@dataclass(frozen=True, kw_only=True)
class MLP:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) when not gated."""

    hidden: int
    act: str = "silu"  # silu | gelu | gelu_pytorch_tanh | gelu_new | relu | relu2
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class MoE:
    """Sparse experts behind a router. Parameters: gate, experts.N.{gate,up,down}_proj, shared.*, shared_expert_gate."""

    num_experts: int
    top_k: int
    expert: MLP
    score: str = "softmax"  # softmax | sigmoid | softmax_topk (softmax over the chosen logits)
    renorm: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    correction: bool = False  # e_score_correction_bias picks the experts, not their weights
    router_bias: bool = False
    shared: MLP | None = None
    shared_gate: bool = False


Mixer = Attention | MLA | ShortConv | DeltaNet | KimiDelta | Lightning


@dataclass(frozen=True, kw_only=True)
class Block:
    """One layer. Sequential: h = x + post(attn(pre(x))); h + post(mlp(pre(h))). See `parallel` for the other."""

    mixer: Mixer
    mlp: MLP | MoE
    attn_norm: Norm | None
    mlp_norm: Norm | None
    attn_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    parallel: bool = False  # x + attn(n(x)) + mlp(n(x)); without mlp_norm the two share one norm
    residual_scale: float = 1.0
    # MiniMax: h = a * pre(x) + post(attn(pre(x))); b * pre(h) + post(mlp(pre(h))).
    normed_residual: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only language model. Parameters: embed_tokens, embed_positions, layers.N.*, norm, lm_head."""

    vocab_size: int
    dim: int
    max_length: int  # positions the model was made for
    blocks: tuple[Block, ...]
    norm: Norm
    embed_scale: float = 1.0
    num_positions: int = 0  # rows of learned absolute positions, if any
    position_offset: int = 0  # OPT starts at 2
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


Spec = Decoder | Foreign
