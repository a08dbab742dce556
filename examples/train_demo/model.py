"""The networks: Qwen3, and an EAGLE-3 head that drafts for it. They know nothing of text or of training.
A batch lies flat, [N]; only attention sees rows. Parameters have the names of published checkpoints."""

import json
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EPS, THETA, TAPS = 1e-6, 10000.0, (2, 4, 7)  # drafting reads the residual stream as it enters these layers
CONFIG = {"hidden_act": "silu", "rms_norm_eps": EPS, "attention_bias": False, "max_position_embeddings": 2048}
CONFIG |= {"rope_theta": THETA, "rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
SIZES = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size"


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


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # [N] int64; N is the same for all batches, so that layers are compiled once
    targets: Tensor  # [N] int64: the next token where it is learned, else -100
    groups: tuple[tuple[int, int, int], ...]  # (start, rows, length), in order; what is outside is padding


def rotary(batch: Batch, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the place of each token in its row, [N, 1, head_dim / 2]."""
    places = torch.zeros_like(batch.tokens)
    for start, rows, length in batch.groups:
        places[start : start + rows * length] = torch.arange(rows * length, device=places.device) % length
    angles = places[:, None, None] / THETA ** (torch.arange(0, head_dim, 2, device=places.device) / head_dim)
    return angles.cos(), angles.sin()


def attend(batch: Batch, shape: Shape, drafts: list[Tensor]) -> Tensor:
    """Attention within rows, [N, heads, head_dim], from `Layer.before` of each draft so far; zeros outside of rows.
    Draft j sees draft 0 up to j places back, and one place of each later draft. A model has only draft 0."""
    edges = [edge for start, rows, length in batch.groups for edge in (start, start + rows * length)]
    sizes = [end - start for start, end in pairwise((0, *edges, len(batch.tokens)))]
    pieces, j = list(zip(*(x.split(sizes) for x in drafts), strict=True)), len(drafts) - 1
    out = [torch.zeros_like(piece[j][:, : shape.heads]) for piece in pieces]
    for n, (_, rows, length) in enumerate(batch.groups):
        views = [x.unflatten(0, (rows, length)).transpose(1, 2) for x in pieces[2 * n + 1]]
        kv = torch.cat([x[:, shape.heads :] for x in views], dim=2)
        k, v = kv.repeat_interleave(shape.heads // shape.kv_heads, dim=1).chunk(2, dim=1)
        past = torch.ones(length, length, dtype=torch.bool, device=kv.device).tril()
        seen = torch.cat([past.tril(-j), *(past.tril(-i).triu(-i) for i in reversed(range(j)))], dim=1)
        how = {"attn_mask": seen} if j else {"is_causal": True}  # the latter has the faster kernel
        mixed = F.scaled_dot_product_attention(views[j][:, : shape.heads], k, v, **how)
        out[2 * n + 1] = mixed.transpose(1, 2).flatten(0, 1)
    return torch.cat(out)


def linears(**sizes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


class Layer(nn.Module):
    """A decoder layer, in two halves around attention. A drafting one also reads the next token's embedding."""

    def __init__(self, shape: Shape, drafts: bool = False):
        super().__init__()
        self.head_dim, self.drafts, dim, hidden = shape.head_dim, drafts, shape.dim, shape.hidden
        wide, q, kv = dim * (1 + drafts), shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.self_attn = linears(q_proj=(wide, q), k_proj=(wide, kv), v_proj=(wide, kv), o_proj=(q, dim))
        self.mlp = linears(gate_proj=(dim, hidden), up_proj=(dim, hidden), down_proj=(hidden, dim))
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim, EPS), nn.RMSNorm(dim, EPS)
        self.hidden_norm = nn.RMSNorm(dim, EPS) if drafts else None
        for name in ("q_norm", "k_norm"):
            self.self_attn[name] = nn.Identity() if drafts else nn.RMSNorm(shape.head_dim, EPS)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Queries, keys and values side by side, [N, heads + 2 * kv_heads, head_dim]."""
        attn, normed = self.self_attn, self.input_layernorm(embeddings if self.drafts else x)
        x = torch.cat((normed, self.hidden_norm(x)), dim=-1) if self.drafts else normed
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        left, right = torch.cat((attn.q_norm(q.float()), attn.k_norm(k.float())), dim=1).chunk(2, dim=-1)
        rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
        return torch.cat((rotated.type_as(v), v), dim=1)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.flatten(1))
        normed = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(normed)) * self.mlp.up_proj(normed))


def initialize(model: nn.Module, layers: int) -> None:
    for name, x in model.named_parameters():
        adds = "o_proj" in name or "down_proj" in name  # to the residual stream, as many others do
        if x.dim() == 2:
            nn.init.normal_(x, std=0.02 / (2 * layers) ** 0.5 if adds else 0.02)


class Model(nn.Module):
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, embedding, norm = shape, nn.Embedding(shape.vocab, shape.dim), nn.RMSNorm(shape.dim, EPS)
        layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "norm": norm})
        initialize(self, shape.layers)

    def forward(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Hidden states for `logits`, [N, dim], and the residual streams at TAPS."""
        x, taps, (cos, sin) = self.model.embed_tokens(batch.tokens), [], rotary(batch, self.shape.head_dim)
        for i, layer in enumerate(self.model.layers):
            taps += [x] if i in TAPS else []
            x = layer.after(x, attend(batch, self.shape, [layer.before(x, cos, sin)]))
        return self.model.norm(x), taps

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)


class Eagle(nn.Module):
    """EAGLE-3 (arXiv 2503.01840) for a target of `shape`; `draft_tokens` are the ids that it can draft, ascending."""

    def __init__(self, shape: Shape, draft_tokens: Tensor):
        super().__init__()
        self.shape, count = replace(shape, layers=1), len(draft_tokens)
        self.fc = nn.Linear(len(TAPS) * shape.dim, shape.dim, bias=False)
        self.lm_head = nn.Linear(shape.dim, count, bias=False)
        self.midlayer, self.norm = Layer(shape, drafts=True), nn.RMSNorm(shape.dim, EPS)
        self.register_buffer("d2t", draft_tokens - torch.arange(count))
        self.register_buffer("t2d", torch.isin(torch.arange(shape.vocab), draft_tokens))
        aux = {"eagle_aux_hidden_state_layer_ids": TAPS, "use_aux_hidden_state": True}
        self.config = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
        self.config |= {"draft_vocab_size": count, "eagle_config": aux}
        initialize(self, 1)

    def forward(self, embeddings: Tensor, features: list[Tensor], batch: Batch, steps: int) -> list[Tensor]:
        """Hidden states for `logits`, [N, dim], of drafts 0 to steps - 1. At place t each foresees token t + 2, from
        the embedding of t + 1; draft j's round began at t - j, from the taps there, so t < j means nothing."""
        x, drafts, hidden = self.fc(torch.cat(features, dim=-1)).float(), [], []
        cos, sin = rotary(batch, self.shape.head_dim)
        for _ in range(steps):
            drafts = [*drafts, self.midlayer.before(x, cos, sin, embeddings)]
            x = self.midlayer.after(x, attend(batch, self.shape, drafts))
            hidden.append(self.norm(x))
            x = x.roll(1, dims=0)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def compile_layers(model: nn.Module) -> nn.Module:
    """On a GPU, compile what surrounds attention: once, as the layers are alike. Returns the model."""
    for layer in (x for x in model.modules() if isinstance(x, Layer) and torch.cuda.is_available()):
        layer.before = partial(torch.compile(Layer.before, dynamic=False), layer)
        layer.after = partial(torch.compile(Layer.after, dynamic=False), layer)
    return model


def save_model(model: Model | Eagle, folder: Path, dtype=torch.bfloat16, **config: object) -> None:
    """Write a checkpoint. `config`: more of its config.json, such as `eos_token_id`."""
    sizes = dict(zip(SIZES.split(), astuple(model.shape), strict=True))
    own = {"tie_word_embeddings": isinstance(model, Model), "dtype": str(dtype).removeprefix("torch.")}
    config = {**model.config, **sizes, **CONFIG, **own, **config}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load_model(shape: Shape, folder: Path) -> Model | Eagle:
    """What `save_model` wrote, in float32."""
    state = load_file(folder / "model.safetensors")
    model = Eagle(shape, state["d2t"] + torch.arange(len(state["d2t"]))) if "d2t" in state else Model(shape)
    model.load_state_dict(state)
    return model


save_eagle, load_eagle = save_model, load_model
