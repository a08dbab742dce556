"""The networks: a Qwen3 decoder, and an EAGLE-3 head that drafts for it. They know nothing of text or of training.

Rows hold several documents, which do not see one another. Parameters have the names of published checkpoints.
"""

import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

EPS, THETA, TAPS = 1e-6, 10000.0, (2, 4, 7)  # drafting reads the residual stream as it enters these layers
CONFIG = {"hidden_act": "silu", "rms_norm_eps": EPS, "attention_bias": False, "max_position_embeddings": 2048}
CONFIG |= {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
SIZES = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size"
Linear = partial(nn.Linear, bias=False)


@dataclass(frozen=True)
class Shape:
    vocab: int = 4096
    dim: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 768


MAIN, DRAFT = Shape(), Shape(dim=128, layers=3, heads=2, kv_heads=1, hidden=256)


def visible(documents: Tensor, draft: int = 0, drafts: int = 1) -> Tensor | BlockMask:
    """What each place sees, given the document of each place, [rows, length]: its document up to itself.

    In a round of drafting, `draft` sees the text up to where the round began, and its place in each draft since;
    keys are those of the text and of the later drafts, one after the other.
    """
    rows, length = documents.shape
    back = torch.tensor(draft, device=documents.device)  # a tensor, as a number would be compiled in

    def sees(row: Tensor, _: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        i, place = kv // length, kv % length
        near = torch.where(i == 0, place <= q - back, (place == q - back + i) & (i <= back))
        return near & (documents[row, q] == documents[row, place])

    make = create_block_mask if documents.is_cuda else create_mask
    return make(sees, rows, 1, length, drafts * length, device=str(documents.device))


@cache
def compiled_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask) -> Tensor:
    if isinstance(mask, BlockMask):
        return compiled_attention()(q, k, v, block_mask=mask, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of [rows, heads, length, head_dim] (arXiv 2104.09864), halves paired."""
    length, size = x.shape[-2:]
    rates = THETA ** (-torch.arange(0, size, 2, device=x.device) / size)
    angles = torch.arange(length, device=x.device)[:, None] * rates
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Layer(nn.Module):
    """A decoder layer, in two halves around attention. That of a draft head also reads the next token's embedding."""

    def __init__(self, shape: Shape, drafts: bool = False):
        super().__init__()
        dim, self.head_dim, self.drafts = shape.dim, shape.head_dim, drafts
        heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads, "v_proj": shape.kv_heads}
        wide = {name: Linear(dim * (1 + drafts), count * shape.head_dim) for name, count in heads.items()}
        self.self_attn = nn.ModuleDict(wide | {"o_proj": Linear(shape.heads * shape.head_dim, dim)})
        up = {name: Linear(dim, shape.hidden) for name in ("gate_proj", "up_proj")}
        self.mlp = nn.ModuleDict(up | {"down_proj": Linear(shape.hidden, dim)})
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim, EPS), nn.RMSNorm(dim, EPS)
        if drafts:
            self.hidden_norm = nn.RMSNorm(dim, EPS)
        else:
            self.self_attn.update({name: nn.RMSNorm(shape.head_dim, EPS) for name in ("q_norm", "k_norm")})

    def before(self, x: Tensor, embeddings: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [rows, heads, length, head_dim]."""
        attn, normed = self.self_attn, self.input_layernorm(embeddings if self.drafts else x)
        wide = torch.cat((normed, self.hidden_norm(x)), dim=-1) if self.drafts else normed
        q, k, v = (
            f(wide).unflatten(-1, (-1, self.head_dim)) for f in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        if not self.drafts:
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return rotate(q).type_as(v), rotate(k).type_as(v), v

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(normed)) * self.mlp.up_proj(normed))


def initialize(model: nn.Module, num_layers: int) -> None:
    for name, x in model.named_parameters():
        if x.dim() == 2:  # those that write to the residual stream are smaller, as so many add up
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(x, std=0.02 / (2 * num_layers) ** 0.5 if adds else 0.02)


class Model(nn.Module):
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.model = shape, nn.ModuleDict({"embed_tokens": nn.Embedding(shape.vocab, shape.dim)})
        self.model["layers"] = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.model["norm"] = nn.RMSNorm(shape.dim, EPS)
        initialize(self, shape.layers)

    def forward(self, tokens: Tensor, documents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Hidden states for `logits`, and the residual streams at TAPS; all are [rows, length, dim]."""
        x, taps, mask = self.model.embed_tokens(tokens), [], visible(documents)
        for i, layer in enumerate(self.model.layers):
            taps += [x] if i in TAPS else []
            x = layer.after(x, attend(*layer.before(x), mask))
        return self.model.norm(x), taps

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)


class Eagle(nn.Module):
    """EAGLE-3 (arXiv 2503.01840) for a target of `shape`; `draft_tokens` are the ids that it can draft, ascending."""

    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "tie_word_embeddings": False,
    }
    config |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": TAPS, "use_aux_hidden_state": True}}

    def __init__(self, shape: Shape, draft_tokens: Tensor):
        super().__init__()
        self.shape, self.midlayer, self.norm = shape, Layer(shape, drafts=True), nn.RMSNorm(shape.dim, EPS)
        self.fc = Linear(len(TAPS) * shape.dim, shape.dim)
        self.lm_head = Linear(shape.dim, len(draft_tokens))
        self.register_buffer("d2t", draft_tokens - torch.arange(len(draft_tokens)))
        self.register_buffer("t2d", torch.isin(torch.arange(shape.vocab), draft_tokens))
        initialize(self, 1)

    def forward(self, embeddings: Tensor, taps: list[Tensor], documents: Tensor, drafts: int) -> list[Tensor]:
        """Hidden states for `logits` of each draft. At place t they foresee token t + 2, from the embedding of token
        t + 1, which the caller puts there; draft j began at place t - j with the taps, and is junk before it can."""
        x, keys, values, hidden = self.fc(torch.cat(taps, dim=-1)), [], [], []
        for j in range(drafts):
            q, k, v = self.midlayer.before(x, embeddings)
            keys, values = [*keys, k], [*values, v]
            rest = (0, 0, 0, (drafts - 1 - j) * k.shape[2])  # one size, so that attention is compiled once
            k, v = (F.pad(torch.cat(x, dim=2), rest) for x in (keys, values))
            x = self.midlayer.after(x, attend(q, k, v, visible(documents, j, drafts)))
            hidden.append(self.norm(x))
            x = x.roll(1, dims=1)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the draft vocabulary."""
        return self.lm_head(hidden)


def compile_layers(model: nn.Module) -> nn.Module:
    """On a GPU, compile what surrounds attention: once, as the layers are alike. Returns the model."""
    for layer in (x for x in model.modules() if isinstance(x, Layer) and torch.cuda.is_available()):
        layer.before = partial(torch.compile(Layer.before, dynamic=False), layer)
        layer.after = partial(torch.compile(Layer.after, dynamic=False), layer)
    return model


def save_model(model: Model | Eagle, folder: Path, **config: Any) -> None:
    """Write a checkpoint in bfloat16. `config`: more of its config.json, such as `eos_token_id`."""
    sizes = dict(zip(SIZES.split(), astuple(model.shape), strict=True))
    config = {**model.config, **CONFIG, **sizes, "dtype": "bfloat16", **config}
    if isinstance(model, Eagle):
        config |= {"num_hidden_layers": 1, "draft_vocab_size": len(model.d2t)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: x.bfloat16() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load_model(shape: Shape, folder: Path) -> Any:
    """The `Model` or `Eagle` that `save_model` wrote, in float32."""
    state = load_file(folder / "model.safetensors")
    model = Eagle(shape, state["d2t"] + torch.arange(len(state["d2t"]))) if "d2t" in state else Model(shape)
    model.load_state_dict(state)
    return model
