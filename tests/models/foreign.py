"""Networks of Transformers' modules that are compared with Transformers: its default configs, shrunk, features forced.

python -m tests.models.foreign [CLASS ...]    prints what they come to, or all that generate text
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from quire.errors import QuireError
from quire.layers.hf.conformance import check
from quire.layers.hf.shrink import shrink
from quire.layers.hf.source import describe, hf_config
from quire.models.foreign import generating

LOCAL = {"sliding_window": 64}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
SLIDING = LOCAL | ALTERNATING | {"use_sliding_window": True, "max_window_layers": 2}
MIXED = ["linear_attention", "full_attention"] * 2
CONVOLVED = {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}
ALTERNATING_EXPERTS = SLIDING | {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
GRANITE = {
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}
GROUPS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 64,
}
DECODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta"
    " roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
)
# By model_type: what the default config does not say, or does not do.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    **{kind: {"is_decoder": True} for kind in DECODERS.split()},
    "bamba": {"attn_layer_indices": [1, 3, 5]},
    "bloom": {"seq_length": 2048},
    "cohere_compass_text": SLIDING
    | {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind, theta in (("full_attention", 1e4), ("sliding_attention", 1e3))
        }
    },
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 5e5}},
    "deepseek_v2": GROUPS | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.5},
    "deepseek_v3": {"routed_scaling_factor": 2.5, "norm_topk_prob": True},
    "dots1": GROUPS | SLIDING | {"routed_scaling_factor": 2.5, "n_shared_experts": 2},
    "gemma2": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7},
    "glm4_moe": {"routed_scaling_factor": 2.5},
    **dict.fromkeys(
        ("granite", "granitemoe", "granitemoeshared", "granite_swa", "granitemoe_swa", "hyperclovax"), GRANITE
    ),
    "granitemoehybrid": GRANITE | {"layer_types": MIXED, "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "laguna": ALTERNATING_EXPERTS | {"num_attention_heads_per_layer": [48] * 4},
    "lfm2": CONVOLVED,
    "lfm2_moe": CONVOLVED,
    "mellum": ALTERNATING_EXPERTS,
    "minimax": LOCAL,
    "ministral": {"head_dim": 64},
    "ministral3": LOCAL,
    "mixtral": LOCAL,
    "nemotron": {"head_dim": 64, "num_key_value_heads": 8},
    "olmo": {"clip_qkv": 0.5},
    "olmoe": {"clip_qkv": 0.5},
    "phi3": LOCAL,
    "phi4_multimodal": LOCAL,
    "phimoe": LOCAL,
    "qwen2": SLIDING,
    "qwen2_moe": SLIDING,
    "qwen3": SLIDING,
    "qwen3_moe": SLIDING,
    "smollm3": SLIDING,
    "starcoder2": LOCAL,
    "vaultgemma": {"attn_logit_softcapping": 0.5},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
}

UNLIKE = {  # classes that run otherwise in the earliest version, or not at all
    # no decoders, whatever config.json says
    *(f"{name}ForCausalLM" for name in ("BigBird", "MegatronBert", "Moshi", "RemBert", "RoFormer")),
    # experts that have no shape without numbers; no small network; its own config; no attention function and no cache
    *(f"{name}ForCausalLM" for name in ("AriaText", "CohereCompass", "Dbrx", "Git")),
}


def config(architecture: str) -> dict[str, Any]:
    """What config.json would be."""
    kind = generating()[architecture]
    values = CONFIG_MAPPING[kind]().to_dict() | dict(CHANGES.get(kind, {}))
    return values | {"architectures": [architecture], "model_type": kind}


def outcome(architecture: str) -> list[str] | str:
    """What a class was compared with, or why it is refused, in a line."""
    try:
        raw = config(architecture)
        return features(raw, check(raw).alone)
    except Exception as error:
        words = " ".join(str(error).split()).removeprefix(f"{architecture}: ")
        named = words if isinstance(error, QuireError) else f"{type(error).__name__}: {words}"
        return re.sub(
            r"by [\d.e+-]+ of the greatest \([^)]*\)", "by more than rounding", named.split(". ")[0]
        )


def features(raw: Mapping[str, Any], alone: bool) -> list[str]:
    """What its attention has that is not usual, whether there are states and experts of our products, and the like."""
    spec = describe(raw["architectures"][0], hf_config(shrink(raw)), alone)
    found = {
        "alone": alone,
        "attention.window": any(call.window for call in spec.attention),
        "attention.softcap": any(call.softcap for call in spec.attention),
        "attention.sinks": any(call.sinks for call in spec.attention),
        "attention.v_dim": any(call.k_dim != call.v_dim and not call.v_in_k for call in spec.attention),
        "attention.v_in_k": any(call.v_in_k for call in spec.attention),
        "spans": spec.spans is not None,
        "states": bool(spec.states),
        "experts": any(len(shape) == 3 for name, shape in spec.parameters if name in spec.products),
        "is_decoder": "is_decoder" in CHANGES.get(raw["model_type"], {}),
    }
    return [name for name, has in found.items() if has]


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(generating()):
        found = outcome(name)
        sys.stdout.write(f"{name}: {found if isinstance(found, str) else f'equal, with {found}'}\n")
        sys.stdout.flush()
