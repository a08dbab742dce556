"""A config's network with the same parts, but so small that a CPU computes it at once."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

LAYERS, KINDS = 4, 6  # layers, and kinds of them that are kept at most
NUM_HEADS, HIDDEN = 4, 64
# First match decides. Sizes differ from each other, so that matrices that change places do not fit.
SIZES: Sequence[tuple[str, int]] = (
    (r"(decoder_)?vocab_size(_per_layer_input)?", 96),
    (r"hidden_size|n_embd|d_model|dim|model_dim|embed_dim|word_embed_proj_dim|n_embed", HIDDEN),
    (r"hidden_size_per_layer_input", 12),
    (r"num_(hidden_)?layers|n_layers?|(num_)?(de|en)coder_layers", LAYERS),
    (r"mamba_(n|num)_heads|n_mamba_heads|linear_num_(value_)?heads", NUM_HEADS),
    (r"mamba_d_state|(ssm_)?state_size", 12),
    (r"(mamba_dt|time_step)_rank", 6),
    (r"(mamba_)?n_?groups", 2),
    (r"(mamba_)?chunk_size|block_size", 4),
    (r"adapter_rank", 10),
    (r"rescale_every", 2),
    (r"qk_head_dim|linear_value_head_dim", 24),
    (r"((global|swa|attention|linear(_key)?)_)?head_dim|kv_channels|qk_nope_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"(swa_)?v_head_dim", 20),
    (r"q_lora_rank", 24),
    (r"kv_lora_rank", 32),
    (r"(moe|expert|shared|routed)_.*(intermediate|hidden|ffn|layer).*_size|expert_(ffn_hidden_size|dim)", 40),
    (
        r".*intermediate_size.*|n_inner|((de|en)coder_)?ffn_(dim|hidden_size)|ffn_hidden_size|d_ff|inner_dim",
        112,
    ),
    (r"(sliding|attention|local)_(window|chunk)(_size)?|sliding_window_size|window_size|floor_scale", 5),
    (r"index_topk", 6),
    (r"index_block_size", 4),
    (r"index_topk_blocks", 2),
    (r"(num|n)_(local_|routed_|moe_)?experts|moe_num_experts", 8),
    (r"num_experts_per_tok(en)?|(moe_)?top_?k|moe_k|num_selected_experts", 2),
    (r"n_group|num_expert_groups?", 4),
    (r"topk_group|num_kv_shared_layers", 2),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len(gth)?|max_sequence_length|seq_length|model_max_length",
        256,
    ),
    (r"original_max_position_embeddings", 16),
    (r"pad_token_id|bos_token_id|eos_token_id|decoder_start_token_id", 1),
)
QUERIES = re.compile(r"(num_|n_|(de|en)coder_)?(attention_|query_)?heads?|n_heads?")
KEYS = re.compile(r"(num_|n_)?(global_|swa_)?(key_value|kv)_(n_)?heads?|multi_query_group_num")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
NUMBERS = re.compile(r".*layer_(ids|indices)|full_attn_idxs|mlp_only_layers")  # lists of layers
PERIOD = re.compile(r"(.*_layer)_(period|offset)")
WIDTHS = re.compile(r"attention_hidden_size|lru_width|embedding_dim|mamba_d_ssm")  # shares of the hidden size
# Heads of state-space mixers, whose product is what they compute with.
MIXERS = {"mamba_d_head": "mamba_n_heads", "mamba_headdim": "n_mamba_heads", "head_dim": "num_heads"}


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a small network that keeps every choice of the given one, with two layers of each kind."""
    depth = next((config[key] for key in DEPTHS if config.get(key)), 0)
    kept = _kept(config, depth)
    small = {key: _smaller(key, value, config, kept) for key, value in config.items()}
    if config.get("kv_lora_rank") and "head_dim" in config:  # that of the rotated part
        small["head_dim"] = small.get("qk_rope_head_dim")
    if {"attention_hidden_size", "attention_head_dim"} <= small.keys():
        small["attention_head_dim"] = small["attention_hidden_size"] // NUM_HEADS
    if expand := small.get("mamba_expand", small.get("expand")):
        inner = small.get("mamba_d_ssm") or int(expand * HIDDEN)
        sizes = {size: inner // small[heads] for size, heads in MIXERS.items() if heads in small}
        small |= {key: size for key, size in sizes.items() if isinstance(small.get(key), int)}
    return small | {key: len(kept) for key in DEPTHS if key in config}


def _kept(config: Mapping[str, Any], depth: int) -> list[int]:
    """Which layers stay: one of each kind, then another one of each, so that kinds alternate."""
    lists = [v for key, v in config.items() if _is_by_layer(key, v, depth)]
    numbers = [v for key, v in config.items() if NUMBERS.fullmatch(key) and isinstance(v, list)]
    lists += [[i in v for i in range(depth)] for v in numbers]
    kinds: dict[str, list[int]] = {}
    for i in range(depth):
        kinds.setdefault(repr([one[i] for one in lists]), []).append(i)
    if not lists or len(kinds) > KINDS:
        return list(range(min(depth, LAYERS)))
    kept = [layers[turn] for turn in range(LAYERS) for layers in kinds.values() if turn < len(layers)]
    return kept[: max(LAYERS, 2 * len(kinds))]


def _is_by_layer(key: str, value: Any, depth: int) -> bool:
    """Whether a value says something of each layer: a list, or letters."""
    return (isinstance(value, list) or (isinstance(value, str) and key.endswith("_pattern"))) and len(
        value
    ) == depth


def _smaller(key: str, value: Any, config: Mapping[str, Any], kept: list[int]) -> Any:
    depth = next((config[name] for name in DEPTHS if config.get(name)), 0)
    if isinstance(value, dict):
        return _smaller_dict(value, config, kept)
    if isinstance(value, str) and _is_by_layer(key, value, depth):
        return "".join(value[i] for i in kept)
    if isinstance(value, list) and NUMBERS.fullmatch(key):
        return [new for new, old in enumerate(kept) if old in value]
    if isinstance(value, list):
        if len(value) == depth:
            value = [value[i] for i in kept]
        elif key in ("short_factor", "long_factor"):
            return value[:8]
        return [_smaller(key, one, config, kept) for one in value]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if KEYS.fullmatch(key):
        queries = next((v for k, v in config.items() if QUERIES.fullmatch(k) and isinstance(v, int)), value)
        return max(1, NUM_HEADS * value // queries)
    if QUERIES.fullmatch(key):
        return NUM_HEADS
    if key == "linear_num_key_heads":
        return max(1, NUM_HEADS * value // config["linear_num_value_heads"])
    if WIDTHS.fullmatch(key):
        return HIDDEN * value // config["hidden_size"]
    if found := PERIOD.fullmatch(key):
        period = config[f"{found[1]}_period"]
        return value * min(period, LAYERS) // period
    return min(value, next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), value))


def _smaller_dict(value: Mapping[Any, Any], config: Mapping[str, Any], kept: list[int]) -> dict[Any, Any]:
    """Settings by layer's number, by kind of layer, or of a part of the network."""
    if value and all(str(name).isdigit() for name in value):
        here = {str(name): one for name, one in value.items()}
        value = {
            type(next(iter(value)))(new): here[str(old)] for new, old in enumerate(kept) if str(old) in here
        }
    whole = value if any(name in value for name in DEPTHS) else config
    return {name: _smaller(str(name), one, whole, kept) for name, one in value.items()}
