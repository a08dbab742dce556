"""Networks that Transformers lacks, in plain torch: what their publishers say they compute, and nothing fast.

They are written from published descriptions and share no code with the package, whose oracle they are. Configs and
saving are Transformers', so that a case is made of them as of any other. No caches: a sequence is computed whole.
"""

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DeepseekOcr2TextConfig,
    DeepseekOcr2TextModel,
    PreTrainedConfig,
    PreTrainedModel,
    StableLmConfig,
)


class RmsNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def turned(x: Tensor, theta: float) -> Tensor:
    """x [T, H, D], each head's halves rotated by its position."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None, None] / theta ** (torch.arange(half) / half)
    a, b = x.split(half, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [T, H, D] over k and v [T, Hkv, D] -> [T, H * D]."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(later, -torch.inf).softmax(-1), v).flatten(1)


def routed(logits: Tensor, top_k: int, renorm: bool) -> tuple[Tensor, Tensor]:
    """The most likely experts' probabilities, and which these are [T, top_k]."""
    weights, chosen = logits.softmax(-1).topk(top_k, -1)
    return weights / weights.sum(-1, keepdim=True) if renorm else weights, chosen


def combined(each: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """What the chosen of all experts' results [T, E, D] add up to [T, D]."""
    return (each.gather(1, chosen[..., None].expand(-1, -1, each.shape[-1])) * weights[..., None]).sum(1)


class Network(PreTrainedModel):
    """Embedding, layers, norm, head; `layer` makes one."""

    embedding = "embed_tokens"
    layer: Any

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = nn.Module()
        self.model.add_module(self.embedding, nn.Embedding(config.vocab_size, config.hidden_size))
        self.model.layers = nn.ModuleList(self.layer(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor) -> SimpleNamespace:
        """token_ids [1, T] -> logits [1, T, vocab_size]."""
        x = self.model.get_submodule(self.embedding)(token_ids[0])
        for layer in self.model.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x))[None])


class Headed(PreTrainedModel):
    """A model of Transformers with the head that it lacks there."""

    body: Any

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = self.body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor) -> SimpleNamespace:
        """token_ids [1, T] -> logits [1, T, vocab_size]."""
        return SimpleNamespace(logits=self.lm_head(self.model(token_ids).last_hidden_state))


class DeepseekConfig(DeepseekOcr2TextConfig):
    model_type = "deepseek"


class DeepseekForCausalLM(Headed):
    """DeepSeek-MoE (Dai et al. 2024), which is what DeepSeek-OCR 2 reads its text with."""

    config_class = DeepseekConfig
    body = DeepseekOcr2TextModel


if "step3p7" in dir(transformers.models):  # not before 5.23
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextConfig, Step3p7TextModel

    class Step3p5ForCausalLM(Headed):
        """Step-3.5 (StepFun 2026), which is what Step-3.7 reads its text with."""

        config_class = Step3p7TextConfig
        body = Step3p7TextModel


@strict
class OrionConfig(StableLmConfig):
    """Of StableLM's network, with whole heads rotated."""

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("partial_rotary_factor", 1.0)
        super().__post_init__(**kwargs)


@strict
class BailingMoeConfig(PreTrainedConfig):
    """Defaults are those of the configuration that inclusionAI published."""

    model_type = "bailing_moe"
    vocab_size: int = 30592
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 0
    head_dim: int | None = None
    hidden_act: str = "silu"
    use_qkv_bias: bool = False
    use_bias: bool = False
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 16384
    rope_theta: float = 10_000.0
    num_experts: int = 16
    num_shared_experts: int = 0
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    moe_intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    tie_word_embeddings: bool = False


class BailingAttention(nn.Module):
    def __init__(self, c: BailingMoeConfig):
        super().__init__()
        size = c.head_dim or c.hidden_size // c.num_attention_heads
        self.heads, self.size, self.theta = (
            (c.num_attention_heads, *[c.num_key_value_heads] * 2),
            size,
            c.rope_theta,
        )
        self.query_key_value = nn.Linear(c.hidden_size, sum(self.heads) * size, bias=c.use_qkv_bias)
        self.dense = nn.Linear(c.num_attention_heads * size, c.hidden_size, bias=c.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, self.size)).split(self.heads, 1)
        return self.dense(attended(turned(q, self.theta), turned(k, self.theta), v))


class BailingExperts(nn.Module):
    def __init__(self, c: BailingMoeConfig):
        super().__init__()
        self.top_k, self.renorm = c.num_experts_per_tok, c.norm_topk_prob
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Gated(c.hidden_size, c.moe_intermediate_size) for _ in range(c.num_experts)
        )
        if c.num_shared_experts:
            self.shared_experts = Gated(c.hidden_size, c.moe_intermediate_size * c.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.routed(x)
        each = torch.stack([expert(x) for expert in self.experts], 1)
        return combined(each, weights, chosen) + (
            self.shared_experts(x) if hasattr(self, "shared_experts") else 0
        )

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return routed(self.gate(x), self.top_k, self.renorm)


class BailingLayer(nn.Module):
    def __init__(self, c: BailingMoeConfig, i: int):
        super().__init__()
        self.attention = BailingAttention(c)
        is_dense = i < c.first_k_dense_replace
        self.mlp = Gated(c.hidden_size, c.intermediate_size) if is_dense else BailingExperts(c)
        self.input_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class BailingMoeForCausalLM(Network):
    """Ling (2025), from inclusionAI's report and their modeling_bailing_moe.py."""

    config_class = BailingMoeConfig
    embedding = "word_embeddings"
    layer = BailingLayer


@strict
class BailingMoeLinearV2Config(BailingMoeConfig):
    """Of layers, the last of each `layer_group_size` has usual attention."""

    model_type = "bailing_moe_linear"
    use_qk_norm: bool = False
    partial_rotary_factor: float = 1.0
    layer_group_size: int = 1
    group_norm_size: int = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 1.0
    score_function: str = "sigmoid"
    moe_router_enable_expert_bias: bool = True


class RingHeads(nn.Module):
    """Queries, keys and values; the first two are normalised and rotated in part."""

    def __init__(self, c: BailingMoeLinearV2Config, num_kv_heads: int):
        super().__init__()
        self.heads, self.size = (c.num_attention_heads, num_kv_heads, num_kv_heads), c.head_dim
        self.theta, self.turning = c.rope_theta, int(c.head_dim * c.partial_rotary_factor)
        self.query_key_value = nn.Linear(c.hidden_size, sum(self.heads) * c.head_dim, bias=False)
        self.query_layernorm = RmsNorm(c.head_dim, c.rms_norm_eps)
        self.key_layernorm = RmsNorm(c.head_dim, c.rms_norm_eps)
        self.dense = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def made(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, self.size)).split(self.heads, 1)
        return self.placed(self.query_layernorm(q)), self.placed(self.key_layernorm(k)), v

    def placed(self, x: Tensor) -> Tensor:
        return torch.cat((turned(x[..., : self.turning], self.theta), x[..., self.turning :]), -1)


class RingAttention(RingHeads):
    def forward(self, x: Tensor) -> Tensor:
        return self.dense(attended(*self.made(x)))


class RingLinear(RingHeads):
    """Lightning attention (Qin et al. 2024), position by position; heads forget more slowly from layer to layer."""

    def __init__(self, c: BailingMoeLinearV2Config, i: int):
        super().__init__(c, c.num_attention_heads)
        self.groups = c.group_norm_size
        self.g_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.g_norm = RmsNorm(c.num_attention_heads * c.head_dim, c.rms_norm_eps)
        slopes = 2.0 ** (-8 * torch.arange(1, c.num_attention_heads + 1) / c.num_attention_heads)
        self.slopes = slopes * (1 - (i - 1) / (c.num_hidden_layers - 1) + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.made(x)
        state, found = 0.0, []
        for now in range(len(x)):
            state = state * torch.exp(-self.slopes)[:, None, None] + k[now][:, :, None] * v[now][:, None, :]
            found.append(torch.einsum("hd,hde->he", q[now] * self.size**-0.5, state).flatten())
        y = torch.stack(found).unflatten(-1, (self.groups, -1))
        y = (y * (y.square().mean(-1, keepdim=True) + self.g_norm.eps).rsqrt()).flatten(1)
        return self.dense(y * self.g_norm.weight * self.g_proj(x).sigmoid())


class RingExperts(BailingExperts):
    """The highest sigmoids with their corrections, in the groups whose two best add up to most."""

    def __init__(self, c: BailingMoeLinearV2Config):
        super().__init__(c)
        self.gate.expert_bias = nn.Parameter(torch.zeros(c.num_experts))
        self.groups, self.top_groups, self.scale = c.n_group, c.topk_group, c.routed_scaling_factor

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x).sigmoid()
        corrected = (scores + self.gate.expert_bias).unflatten(-1, (self.groups, -1))
        best = corrected.topk(2, -1).values.sum(-1).topk(self.top_groups, -1).indices
        left = torch.full_like(corrected, -torch.inf)
        left.scatter_(1, best[..., None].expand(-1, -1, left.shape[-1]), 0.0)
        chosen = (corrected + left).flatten(1).topk(self.top_k, -1).indices
        weights = scores.gather(1, chosen)
        return weights / (weights.sum(-1, keepdim=True) if self.renorm else 1.0) * self.scale, chosen


class RingLayer(BailingLayer):
    def __init__(self, c: BailingMoeLinearV2Config, i: int):
        super().__init__(c, i)
        period = c.layer_group_size
        is_whole = (i + 1) % period == 0 or i >= c.num_hidden_layers // period * period
        self.attention = RingAttention(c, c.num_key_value_heads) if is_whole else RingLinear(c, i)
        if i >= c.first_k_dense_replace:
            self.mlp = RingExperts(c)


class BailingMoeLinearV2ForCausalLM(Network):
    """Ring-linear (inclusionAI 2025), from what engines that serve it compute and quote of its authors' code.

    These differ in the decays: here they are those that are quoted, in which layers count from minus one.
    """

    config_class = BailingMoeLinearV2Config
    embedding = "word_embeddings"
    layer = RingLayer


@strict
class Step3TextConfig(PreTrainedConfig):
    """Defaults are those of the configuration that StepFun published."""

    model_type = "step3_text"
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_attention_heads: int = 64
    num_attention_groups: int = 1
    num_hidden_layers: int = 61
    max_seq_len: int = 65536
    vocab_size: int = 128815
    rms_norm_eps: float = 1e-5
    moe_intermediate_size: int = 5120
    moe_num_experts: int = 48
    moe_top_k: int = 3
    rope_theta: float = 500_000.0
    max_position_embedding: int = 65536
    share_expert_dim: int = 5120
    share_q_dim: int = 2048
    head_dim: int = 256
    norm_expert_weight: bool = False
    moe_layers_enum: str | None = None
    tie_word_embeddings: bool = False


class Step3Attention(nn.Module):
    """Multi-matrix factorization attention (Hu et al. 2024): one key head; queries are wq(inter_norm(q_proj(x)))."""

    def __init__(self, c: Step3TextConfig):
        super().__init__()
        self.theta, self.size = c.rope_theta, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.share_q_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.head_dim, bias=False)
        self.inter_norm = RmsNorm(c.share_q_dim, c.rms_norm_eps)
        self.wq = nn.Linear(c.share_q_dim, c.num_attention_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.wq(self.inter_norm(self.q_proj(x))).unflatten(-1, (-1, self.size))
        k, v = self.k_proj(x)[:, None], self.v_proj(x)[:, None]
        return self.o_proj(attended(turned(q, self.theta), turned(k, self.theta), v))


class Step3Experts(nn.Module):
    """Experts chosen by the softmax of all scores; their weights are stacked."""

    def __init__(self, c: Step3TextConfig):
        super().__init__()
        self.top_k, self.renorm = c.moe_top_k, c.norm_expert_weight
        self.gate = nn.Linear(c.hidden_size, c.moe_num_experts, bias=False)
        sizes = {"gate_proj": (c.moe_intermediate_size, c.hidden_size)}
        sizes |= {"up_proj": sizes["gate_proj"], "down_proj": sizes["gate_proj"][::-1]}
        for name, size in sizes.items():
            self.add_module(name, nn.Module())
            self.get_submodule(name).weight = nn.Parameter(torch.empty(c.moe_num_experts, *size))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = routed(self.gate(x), self.top_k, self.renorm)
        gate, up = (torch.einsum("eih,th->tei", part.weight, x) for part in (self.gate_proj, self.up_proj))
        each = torch.einsum("eoi,tei->teo", self.down_proj.weight, F.silu(gate) * up)
        return combined(each, weights, chosen)


class Step3Layer(nn.Module):
    def __init__(self, c: Step3TextConfig, i: int):
        super().__init__()
        listed = c.moe_layers_enum or ",".join(map(str, range(1, c.num_hidden_layers)))
        self.sparse = str(i) in listed.split(",")
        self.self_attn = Step3Attention(c)
        if self.sparse:
            self.moe, self.share_expert = Step3Experts(c), Gated(c.hidden_size, c.share_expert_dim)
        else:
            self.mlp = Gated(c.hidden_size, c.intermediate_size)
        self.input_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        y = self.post_attention_layernorm(x)
        return x + (self.moe(y) + self.share_expert(y) if self.sparse else self.mlp(y))


class Step3TextForCausalLM(Network):
    """Of StepFun's report (2025) and their modeling_step3.py, the part that reads text."""

    config_class = Step3TextConfig
    layer = Step3Layer
