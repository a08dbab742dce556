"""From config.json's usual keys to the pieces of a spec. What a family does differently it passes by name.

Keys without a default are required. Defaults are those of Hugging Face's config classes, for keys
that published checkpoints leave out. Nothing here knows a particular architecture.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quire.errors import ModelError, UnsupportedModel
from quire.log import logger, warn_once
from quire.models.hf import HF
from quire.models.spec import MLP, Attention, Block, Decoder, Growth, Mixer, MoE, Norm, Rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "relu": "relu",
    "relu2": "relu2",
}
MAX_LAYERS = 4096


def activation(c: HF, name: str) -> str:
    """Our name of an activation function."""
    c.refuse(name not in ACTIVATIONS, f"activation {name!r} (known: {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


def head_dim(c: HF) -> int:
    """An equal share of hidden_size unless the config says otherwise."""
    return c.head_dim or _share(c.count("hidden_size"), c.count("num_attention_heads"))


def plain_head_dim(c: HF) -> int:
    """An equal share of hidden_size, for architectures that know no head_dim."""
    return _share(
        c.count("hidden_size", "n_embd", "d_model"), c.count("num_attention_heads", "n_head", "n_heads")
    )


def _share(hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise ModelError(
            f"config.json: hidden_size {hidden_size} is not a multiple of {num_heads} attention heads"
        )
    return hidden_size // num_heads


def attention(c: HF, **changes: Any) -> Attention:
    """Grouped-query attention with the usual keys.

    No bias is assumed: a family that knows `attention_bias` passes what it means.
    """
    base: dict[str, Any] = {
        "num_heads": c.count("num_attention_heads"),
        "num_kv_heads": changes.get("num_kv_heads") or c.count("num_key_value_heads"),
        "head_dim": changes.get("head_dim") or head_dim(c),
    }
    if "rope" not in changes:
        base["rope"] = rope(c, base["head_dim"])
    found = Attention(**{**base, **changes})
    if found.num_heads % found.num_kv_heads:
        raise ModelError(
            f"config.json: {found.num_heads} attention heads are not a multiple of "
            f"{found.num_kv_heads} key-value heads"
        )
    return found


def alibi(num_heads: int) -> tuple[float, ...]:
    """Slopes of Press et al. 2022: powers of two down to 2 ** -8, every other one first if heads are not a power."""
    whole = 2 ** math.ceil(math.log2(num_heads))
    slopes: list[float] = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    return tuple(slopes if whole == num_heads else (slopes[1::2] + slopes[::2])[:num_heads])


def kv_heads(c: HF) -> int:
    """As many as query heads if the config does not group them, for architectures older than that idea."""
    return c.num_key_value_heads or c.count("num_attention_heads")


def multi_head(num_heads: int, size: int, rotary: Rope | None, **changes: Any) -> Attention:
    """Attention of architectures that know no key-value heads."""
    changes = {"num_kv_heads": num_heads, **changes}
    return Attention(num_heads=num_heads, head_dim=size, rope=rotary, **changes)


def mlp(c: HF, **changes: Any) -> MLP:
    """A gated layer of intermediate_size without biases."""
    act = activation(c, changes.pop("act", None) or c.text("hidden_act"))
    hidden = changes.pop("hidden", None) or c.count("intermediate_size")
    return MLP(hidden=hidden, act=act, **changes)


def shared_experts(c: HF, key: str = "n_shared_experts", **changes: Any) -> MLP | None:
    """Experts that see every token, as many as `key` says: one MLP as wide as all of them; None if there are none."""
    count = c.stated(key)
    return mlp(c, hidden=c.count("moe_intermediate_size") * count, **changes) if count else None


def pre_norm(mixer: Mixer, feed_forward: MLP | MoE, norm: Norm, **changes: Any) -> Block:
    return Block(mixer=mixer, mlp=feed_forward, attn_norm=norm, mlp_norm=norm, **changes)


def sandwich(mixer: Mixer, feed_forward: MLP | MoE, norm: Norm, **changes: Any) -> Block:
    """What each part adds is normalised, too."""
    return pre_norm(mixer, feed_forward, norm, attn_post_norm=norm, mlp_post_norm=norm, **changes)


def decoder(c: HF, block: Block | Callable[[int], Block], norm: Norm, **changes: Any) -> Decoder:
    """The usual skeleton around one block, repeated, or a function from the layer's index to its block."""
    num_layers = changes.pop("num_layers", None) or c.count("num_hidden_layers")
    c.refuse(num_layers > MAX_LAYERS, f"a depth of {num_layers} layers (the limit is {MAX_LAYERS})")
    blocks = [block] * num_layers if isinstance(block, Block) else [block(i) for i in range(num_layers)]
    length = changes.get("max_length") or max_length(c)
    base = {
        "vocab_size": changes.get("vocab_size") or c.count("vocab_size"),
        "dim": changes.get("dim") or c.count("hidden_size"),
        "max_length": length,
        "tied": bool(c.get("tie_word_embeddings", False)),
    }
    narrow = tuple(_without_wide_limits(block, length) for block in blocks)
    return Decoder(blocks=narrow, norm=norm, **{**base, **changes})


def _without_wide_limits(block: Block, length: int) -> Block:
    """A window or chunk that no sequence can leave is none; full attention caches and batches better."""
    mixer = block.mixer
    if not isinstance(mixer, Attention):
        return block
    window, chunk = (size if size and size < length else None for size in (mixer.window, mixer.chunk))
    return replace(block, mixer=replace(mixer, window=window, chunk=chunk))


def tied_by_default(c: HF) -> bool:
    """Whether the head is the embedding, for architectures where it is unless the config says otherwise."""
    return bool(c.get("tie_word_embeddings", True))


def layer_types(c: HF, usual: Callable[[int], bool], other: str = "sliding_attention") -> list[bool]:
    """For each layer, whether it is of the `other` kind than full attention, by default attention that is local.

    `usual` answers for configs that do not list it.
    """
    num_layers = c.count("num_hidden_layers")
    kinds = c.layer_types
    if kinds is None:
        return [usual(i) for i in range(num_layers)]
    unknown = sorted(set(map(str, kinds)) - {"full_attention", other})
    c.refuse(bool(unknown), f"layer_types entry {', '.join(unknown)} (known: full_attention, {other})")
    if len(kinds) < num_layers:
        raise ModelError(f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers")
    return [kind == other for kind in kinds[:num_layers]]


def layer_kinds(c: HF, key: str, kinds: Sequence[object], *known: str) -> list[bool]:
    """For each layer, whether it is of the first of the `known` kinds; `kinds` is what the config lists as `key`."""
    num_layers, unknown = c.count("num_hidden_layers"), sorted(set(map(str, kinds)) - {*known})
    c.refuse(bool(unknown), f"{key} entry {', '.join(unknown)} (known: {', '.join(known)})")
    if len(kinds) < num_layers:
        raise ModelError(f"config.json: {key} has {len(kinds)} entries for {num_layers} layers")
    return [kind == known[0] for kind in kinds[:num_layers]]


def has_rope(c: HF) -> list[bool]:
    """For each layer, whether it has rotary embedding, by default all but every fourth."""
    num_layers, interval = c.count("num_hidden_layers"), c.get("no_rope_layer_interval", 4)
    listed = c.no_rope_layers or [(i + 1) % interval for i in range(num_layers)]
    if len(listed) < num_layers:
        raise ModelError(f"config.json: no_rope_layers has {len(listed)} entries for {num_layers} layers")
    return [bool(turns) for turns in listed]


def rope(
    c: HF,
    dim: int,
    *,
    local: bool = False,
    partial: float | None = None,
    alternating: Sequence[int] | None = None,
    **changes: Any,
) -> Rope:
    """Rotary embedding of `dim`-dimensional heads, from the new `rope_parameters` or the old separate keys.

    Args:
        local: the layer is local, where the config has parameters per layer type.
        alternating: how wide sections for time, height and width are by default, whose pairs alternate; None if there
            are none, unless the config is of a composite (composite.py), which says how they lie.
        partial: the default of `partial_rotary_factor`; None if the architecture rotates whole heads.
        changes: fields of Rope; `theta` is the default for configs that do not say.
    """
    default_theta = changes.pop("theta", 10000.0)
    found = rope_parameters(c, local)
    if (found.get("rope_type") or found.get("type")) == "proportional":
        return _proportional(c, found, dim, default_theta, **changes)
    beside = c.partial_rotary_factor  # which Transformers 5 wrote in both places at first
    factor = found.get("partial_rotary_factor") or beside or partial or 1.0
    c.refuse(partial is None and factor != 1.0, f"partial_rotary_factor={factor}")
    sections = found.get("sections")
    if not isinstance(sections, tuple):  # which config.json cannot have
        sections = None if alternating is None else (found.get("mrope_section", alternating), True)
    c.refuse("mrope_section" in found and sections is None, "rotary embedding by sections (mrope_section)")
    rotated = int(dim * factor)
    c.refuse(rotated % 2 == 1, f"rotary embedding of an odd number of dimensions ({rotated})")
    theta = found.get("rope_theta") or c.rope_theta or default_theta
    scaling, stretch = stretched(c, found, rotated)
    axes = None if sections is None else _axes(*sections, num_pairs=rotated // 2)
    return Rope(dim=rotated, theta=theta * stretch, scaling=scaling, axes=axes, **changes)


def _axes(sizes: Any, alternate: bool, *, num_pairs: int) -> tuple[int, ...]:
    """The axis of each pair: a section of pairs for each, or every third pair while a section of height or width lasts.

    Raises:
        ModelError: there are no three sections, or they are not as many pairs as there are.
    """
    is_counts = isinstance(sizes, list | tuple) and len(sizes) == 3 and {*map(type, sizes)} == {int}
    if not is_counts or min(sizes) < 0 or (sum(sizes) != num_pairs and not alternate):
        raise ModelError(
            f"config.json: mrope_section of rope_parameters is {sizes!r}; it must be three counts of {num_pairs} pairs"
        )
    if alternate:
        return tuple(i % 3 if i < 3 * sizes[i % 3] else 0 for i in range(num_pairs))
    return tuple(axis for axis, size in enumerate(sizes) for _ in range(size))


def _proportional(c: HF, found: Mapping[str, Any], dim: int, theta: float, **changes: Any) -> Rope:
    """A part of the frequencies of the whole head; other kinds with a part have all those of a smaller one."""
    c.refuse(
        (factor := found.get("factor", 1.0)) != 1.0, f"factor={factor} with proportional rotary embedding"
    )
    scaling = {
        "rope_type": "proportional",
        "partial_rotary_factor": found.get("partial_rotary_factor", 1.0),
    }
    return Rope(dim=dim, theta=found.get("rope_theta") or theta, scaling=scaling, **changes)


def rope_parameters(c: HF, local: bool = False) -> Mapping[str, Any]:
    """The config's parameters for this kind of layer, as written. `rope_scaling` spares local layers."""
    found = c.rope_parameters or (None if local else c.rope_scaling) or {}
    if any(isinstance(value, Mapping) for value in found.values()):
        kind = "sliding_attention" if local else "full_attention"
        if not isinstance(found.get(kind), Mapping):
            raise ModelError(f"config.json: rope_parameters has {', '.join(found)} but no {kind}")
        found = found[kind]
        if not found.get("rope_theta"):
            raise ModelError(f"config.json: rope_parameters of {kind} has no rope_theta")
    return found


def stretched(c: HF, found: Mapping[str, Any], dim: int) -> tuple[Mapping[str, object] | None, float]:
    """What stretches the context, complete with every default, and a factor on theta."""
    kind = found.get("rope_type") or found.get("type") or "default"
    match kind:
        case "default":
            return None, 1.0
        case "linear":
            return {"rope_type": "linear", "factor": _needed(found, "factor")}, 1.0
        case "dynamic" if found.get("alpha"):  # HunYuan's; unlike the usual kind it does not depend on length
            return None, found["alpha"] ** (dim / (dim - 2))
        case "dynamic":
            warn_once(
                logger,
                "rope_scaling 'dynamic' changes with a sequence's length, which cached keys cannot follow; "
                "it is left out, which is exact up to max_position_embeddings",
            )
            return None, 1.0
        case "llama3":
            keys = ("factor", "low_freq_factor", "high_freq_factor")
            needed = {key: _needed(found, key) for key in keys}
            return {"rope_type": kind, **needed, "original_max_position_embeddings": _original(c, found)}, 1.0
        case "yarn" if not found.get("short_factor"):
            return _yarn(c, found), 1.0
        case "longrope" | "su" | "yarn":  # early Phi 3 checkpoints call it su or yarn
            return _longrope(c, found, dim), 1.0
    raise UnsupportedModel(
        f"{c.architecture}: rope_type {kind!r} in config.json is not supported "
        "(known: default, linear, dynamic, llama3, yarn, longrope, proportional)"
    )


def _needed(found: Mapping[str, Any], key: str) -> Any:
    if found.get(key) is None:
        raise ModelError(f"config.json: the rope parameters have no {key}, which their rope_type needs")
    return found[key]


def _original(c: HF, found: Mapping[str, Any]) -> int:
    """The length the model was trained for before its context was stretched."""
    length = c.original_max_position_embeddings or found.get("original_max_position_embeddings")
    return int(length or c.count("max_position_embeddings"))


def _yarn(c: HF, found: Mapping[str, Any]) -> Mapping[str, object]:
    """Peng et al. 2023. `attention_factor` multiplies cos and sin."""
    original = _original(c, found)
    factor = found.get("factor") or c.count("max_position_embeddings") / original
    gain = found.get("attention_factor")
    if gain is None:
        both = found.get("mscale") and found.get("mscale_all_dim")
        gain = (
            yarn_mscale(factor, found["mscale"]) / yarn_mscale(factor, found["mscale_all_dim"])
            if both
            else yarn_mscale(factor, 1.0)
        )
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": found.get("beta_fast") or 32,
        "beta_slow": found.get("beta_slow") or 1,
        "truncate": found.get("truncate", True),
        "attention_factor": gain,
    }


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(c: HF, found: Mapping[str, Any], dim: int) -> Mapping[str, object]:
    """Ding et al. 2024: one divisor per frequency, short up to the original length and long beyond."""
    original = _original(c, found)
    factor = found.get("factor") or c.count("max_position_embeddings") / original
    gain = found.get("attention_factor")
    if gain is None:
        gain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = {key: tuple(_needed(found, key)) for key in ("short_factor", "long_factor")}
    for key, values in divisors.items():
        if len(values) != dim // 2:
            raise ModelError(
                f"config.json: {key} has {len(values)} entries; {dim} rotated dimensions need {dim // 2}"
            )
    return {
        "rope_type": "longrope",
        **divisors,
        "original_max_position_embeddings": original,
        "attention_factor": gain,
    }


def growth(c: HF) -> Growth | None:
    """Llama 4's, if the rope parameters have it."""
    found = rope_parameters(c)
    rate = found.get("llama_4_scaling_beta")
    return Growth(rate=rate, length=_needed(found, "original_max_position_embeddings")) if rate else None


def max_length(c: HF) -> int:
    """Positions the model was made for, YaRN's stretching included."""
    length = c.count("max_position_embeddings")
    found = c.rope_parameters or c.rope_scaling or {}
    if (found.get("rope_type") or found.get("type")) == "yarn" and found.get("factor"):
        length = max(length, int(_original(c, found) * found["factor"]))
    return length


def window(c: HF, local: bool = True) -> int | None:
    """Positions a local layer's token sees; null and 0 mean all."""
    size: int | None = c.get("sliding_window", 4096)
    return size or None if local else None


def biases(c: HF, *, out: bool = True) -> dict[str, bool]:
    """What `attention_bias` means where it covers q, k and v, and the output too unless `out` is false."""
    return {"bias": bool(c.attention_bias), "out_bias": bool(c.attention_bias) and out}
