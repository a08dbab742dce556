"""Tiny random checkpoints, one per architecture and variant, made by Hugging Face, all features forced on.

All parameters and buffers are random: ones and zeros hide missing norms, biases and corrections. Sizes differ
pairwise, so that a transposed or swapped matrix cannot fit. Windows are shorter than prompts, caps bite.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE, MAX_LENGTH, FIRST_TOKEN = 104, 64, 3  # tokens below the first one are special
STD, NORM_MEAN = 0.3, 0.5
COMPUTED = re.compile(r"\.(slope_rate|(query|key|diagonal)_decay)$")  # buffers that follow from the config


@dataclass(frozen=True, eq=False)
class Case:
    """`values` are arguments of Hugging Face's config class; `legacy` replaces keys of its config.json."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""  # class names; by default they follow from the case's name up to "-"
    config: str = ""
    legacy: Mapping[str, Any] = field(default_factory=dict)  # a value of None deletes the key

    @property
    def architecture(self) -> str:
        return self.model or f"{self.name.split('-')[0]}ForCausalLM"

    @property
    def described(self) -> str:
        """The architecture in config.json."""
        names: list[str] = self.legacy.get("architectures", [self.architecture])
        return names[0]

    @property
    def config_class(self) -> str:
        return self.config or f"{self.name.split('-')[0]}Config"


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": 4,
    "max_position_embeddings": MAX_LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {**SIZES, "hidden_size": 128, "intermediate_size": 176, "num_attention_heads": 4}  # heads of 32
GROUPED = {**PLAIN, "num_key_value_heads": 2}
BASE = {**GROUPED, "head_dim": 16}  # q 64, k and v 32
WIDE = {"head_dim": 64, "intermediate_size": 192}  # whole blocks of a CPU's products
GPT = {"vocab_size": VOCAB_SIZE, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": MAX_LENGTH}
GPT |= {key: SIZES[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
FALCON = {**SIZES, "hidden_size": 128, "num_attention_heads": 4}
GROUPS_OF_HEADS = {"new_decoder_architecture": True, "num_kv_heads": 2}
LOCAL = {"sliding_window": 5}
SLIDING = LOCAL | {"use_sliding_window": True}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
PRETRAINED = "original_max_position_embeddings"
BIASED = {"attention_bias": True, "mlp_bias": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    PRETRAINED: 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, PRETRAINED: 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.7 * i for i in range(8)],
    PRETRAINED: 16,
}
PER_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
GROUPS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
LATENT = {
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
}
CAPPED = {"query_pre_attn_scalar": 24, "final_logit_softcapping": 0.7}
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}
LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
BY_THE_BEST = {"topk_method": "group_limited_greedy", "num_experts_per_tok": 3, "norm_topk_prob": False}
STRETCHED = {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}
SOME_DENSE = {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}
ALL_SPARSE = {key: value for key, value in GROUPS.items() if key != "first_k_dense_replace"}
ROUTING = {key: value for key, value in GROUPS.items() if key not in ("n_routed_experts", "n_shared_experts")}
SHARED = {"num_shared_experts": 2}
ERNIE = {
    "use_bias": True,
    "moe_intermediate_size": 40,
    "moe_k": 2,
    "moe_num_experts": 6,
    "moe_layer_interval": 2,
    "moe_layer_end_index": 2,
}

HYBRID = {
    **GROUPED,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "block_multiple_of": 16,
    "norm_eps": 1e-5,
}

DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 0.2,  # else gated norms blow up the rounding of small results
}
SHARED_EXPERT = EXPERTS | {"shared_expert_intermediate_size": 56}

KIMI = {
    "linear_num_heads": 3,
    "linear_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    "moe_renormalize": False,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "num_expert_group": 4,
    "topk_group": 2,
    "num_shared_experts": 2,
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "model_max_length": MAX_LENGTH,
    "rms_norm_eps": 0.2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}
BAILING = {"head_dim": 24, "first_k_dense_replace": 1, "short_conv_kernel_size": 3}
KIMI_PUBLISHED = {
    "layer_types": None,
    "mlp_layer_types": None,
    "linear_attn_config": {
        "num_heads": 3,
        "head_dim": 20,
        "short_conv_kernel_size": 4,
        "full_attn_layers": [2],
        "kda_layers": [1, 3, 4],
    },
    "linear_num_heads": None,
    "linear_head_dim": None,
    "linear_conv_kernel_dim": None,
    "first_k_dense_replace": 1,
    "mla_use_nope": True,
    "moe_router_activation_func": "sigmoid",
}
LIGHTNING = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "full_attn_alpha_factor": 1.7,
    "linear_attn_alpha_factor": 2.3,
    "mlp_alpha_factor": 3.1,
    "rms_norm_eps": 0.05,
}
M1 = "MiniMaxM1ForCausalLM"
TEXT_01 = {
    "layer_types": None,
    "attn_type_list": [0, 1, 0, 0],
    "postnorm": True,
    "shared_intermediate_size": 0,
    **{
        f"{part}_{factor}_factor": None
        for part in ("full_attn", "linear_attn", "mlp")
        for factor in ("alpha", "beta")
    },
    "layernorm_full_attention_alpha": 1.7,
    "layernorm_linear_attention_alpha": 2.3,
    "layernorm_mlp_alpha": 3.1,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
    "architectures": ["MiniMaxText01ForCausalLM"],
    "model_type": "minimax_text_01",
}

LFM3 = {
    "layer_types": ["conv", "full_attention", "sliding_attention", "conv"],
    "conv_L_cache": 5,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    },
}


def theta(base: float | None, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base, **more}}


def without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def old(**more: Any) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    return {"rope_parameters": None, "layer_types": None, **more}


CASES = (
    Case(
        "Qwen3Next",
        BASE
        | DELTA
        | SHARED_EXPERT
        | theta(500.0, partial_rotary_factor=0.5)
        | {"attention_bias": True, "mlp_only_layers": [2], "norm_topk_prob": False},
    ),
    Case(
        "Qwen3Next-old",
        BASE | DELTA | SHARED_EXPERT | {"layer_types": None, "full_attention_interval": 2},
        legacy=old(full_attention_interval=2, rope_theta=10_000.0, partial_rotary_factor=0.25),
    ),
    Case("KimiLinear", without(PLAIN, "max_position_embeddings") | without(LATENT, "q_lora_rank") | KIMI),
    Case(
        "KimiLinear-published",
        without(PLAIN, "max_position_embeddings") | LATENT | KIMI | {"moe_renormalize": True},
        legacy=KIMI_PUBLISHED,
    ),
    Case(
        "BailingHybrid",
        without(PLAIN, "max_position_embeddings") | without(LATENT, "q_lora_rank") | KIMI | BAILING,
    ),
    Case(
        "BailingHybrid-open",
        without(PLAIN, "max_position_embeddings")
        | without(LATENT, "q_lora_rank")
        | KIMI
        | BAILING
        | {"kda_safe_gate": False, "rope_theta": 500.0},
    ),
    Case("MiniMax", BASE | LOCAL_EXPERTS | LIGHTNING | {"head_dim": 24}),
    Case("MiniMax-text-01", BASE | LOCAL_EXPERTS | LIGHTNING | LOCAL, legacy=TEXT_01),
    Case("MiniMax-m1", GROUPED | LOCAL_EXPERTS | LIGHTNING, legacy=TEXT_01 | {"architectures": [M1]}),
    Case(  # Hugging Face stores the convolution in three parts of one size
        "OlmoHybrid",
        GROUPED | DELTA | theta(500.0) | {"attention_bias": True, "linear_key_head_dim": 40},
    ),
    Case(
        "OlmoHybrid-nope",
        GROUPED | DELTA | theta(None) | {"linear_key_head_dim": 40, "linear_allow_neg_eigval": False},
    ),
    Case(
        "Lfm2Moe",
        GROUPED
        | EXPERTS
        | theta(500.0)
        | {"layer_types": HYBRID["layer_types"], "num_dense_layers": 1}
        | {"routed_scaling_factor": 2.5, "conv_bias": True},
    ),
    Case(
        "Lfm2Moe-plain",
        GROUPED
        | EXPERTS
        | {"layer_types": HYBRID["layer_types"], "num_dense_layers": 2}
        | {"use_expert_bias": False, "norm_topk_prob": False, "tie_word_embeddings": False},
    ),
    Case("Lfm3", BASE | LOCAL | LFM3 | {"attention_bias": True}),
    Case(
        "Lfm3-plain",
        BASE
        | {"sliding_window": 7, "use_sandwich_norm": False, "use_attention_gate": False, "conv_bias": True}
        | {"num_hidden_layers": 5, "tie_word_embeddings": False, "rope_parameters": LFM3["rope_parameters"]},
        legacy={"layer_types": None},
    ),
    Case("Qwen3_5", BASE | DELTA | theta(500.0, partial_rotary_factor=0.5), config="Qwen3_5TextConfig"),
    Case("Qwen3_5Moe", BASE | DELTA | SHARED_EXPERT, config="Qwen3_5MoeTextConfig"),
    Case("Lfm2", HYBRID | theta(500.0)),
    Case("Lfm2-bias", HYBRID | {"conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False}),
    Case("Llama", BASE | theta(500.0)),
    Case("Llama-3.1", BASE | {"rope_parameters": LLAMA3}),
    Case("Llama-linear", BASE | {"rope_parameters": LINEAR}),
    Case("Llama-yarn", BASE | {"rope_parameters": YARN}),
    Case("Llama-tied", GROUPED | BIASED | {"tie_word_embeddings": True}),
    Case(
        "Llama-old",
        BASE | {"rope_parameters": LINEAR | {"rope_theta": 10_000.0}},
        legacy=old(rope_scaling={"type": "linear", "factor": 4.0}),
    ),
    Case("Mistral", BASE | LOCAL),
    Case("Qwen2", GROUPED | SLIDING | {"max_window_layers": 2}),
    Case("Qwen2-old", GROUPED | SLIDING | {"max_window_layers": 2}, legacy=old()),
    Case("Qwen3", BASE | theta(500.0) | {"attention_bias": True, "tie_word_embeddings": True}),
    Case("Qwen3-wide", BASE | WIDE | {"attention_bias": True}),
    Case(
        "Qwen2Moe",
        GROUPED
        | EXPERTS
        | SLIDING
        | {"max_window_layers": 3, "shared_expert_intermediate_size": 56, "mlp_only_layers": [1]},
    ),
    Case("Qwen3Moe", BASE | EXPERTS | SLIDING | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    Case("Olmoe", GROUPED | {"num_experts": 8, "num_experts_per_tok": 2}),
    Case("Mixtral", BASE | LOCAL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Case("Gemma", BASE | {"hidden_act": "gelu"}),
    Case("Gemma2", BASE | LOCAL | CAPPED | {"attn_logit_softcapping": 0.5}),
    Case("Gemma3", BASE | LOCAL | CAPPED | MIXED | {"rope_parameters": PER_TYPE}, config="Gemma3TextConfig"),
    Case(
        "Gemma3-old",
        BASE
        | LOCAL
        | {"query_pre_attn_scalar": 24, "rope_parameters": PER_TYPE, "sliding_window_pattern": 2}
        | {"tie_word_embeddings": False},
        config="Gemma3TextConfig",
        legacy=old(
            rope_theta=5000.0,
            rope_local_base_freq=100.0,
            rope_scaling={"rope_type": "linear", "factor": 4.0},
            sliding_window_pattern=2,
        ),
    ),
    Case("Olmo", GROUPED),
    Case("Olmo2", GROUPED | theta(500.0)),
    Case("Olmo3", GROUPED | LOCAL | {"rope_parameters": PER_TYPE}),
    Case("Exaone4", BASE | LOCAL | {"sliding_window_pattern": 4}),
    Case("Exaone4-global", BASE | {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    Case("Phi", GROUPED | {"partial_rotary_factor": 0.5}),
    Case("Phi3", BASE | LOCAL),
    Case("Phi3-long", BASE | {"rope_parameters": LONGROPE, "hidden_size": 64} | {PRETRAINED: 16}),
    Case("Granite", GROUPED | MULTIPLIERS | BIASED),
    Case("Cohere", GROUPED | {"use_qk_norm": True, "logit_scale": 0.25, "attention_bias": True}),
    Case("Cohere2", GROUPED | LOCAL | {"logit_scale": 0.25}),
    Case("GPT2", GPT, model="GPT2LMHeadModel"),
    Case("GPT2-scaled", GPT | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 176}, "GPT2LMHeadModel"),
    Case("GPTJ", GPT | {"rotary_dim": 8, "n_inner": 176}),
    Case("GPTNeoX", PLAIN | {"rotary_pct": 0.5}),
    Case(
        "GPTNeoX-sequential",
        PLAIN | {"use_parallel_residual": False, "attention_bias": False},
        legacy=old(rotary_pct=0.25, rotary_emb_base=10_000),
    ),
    Case("Falcon", FALCON | GROUPS_OF_HEADS | {"ffn_hidden_size": 176}),
    Case("Falcon-11b", FALCON | GROUPS_OF_HEADS | {"num_ln_in_parallel_attn": 1}),
    Case("Falcon-7b", FALCON | {"multi_query": True, "bias": True}),
    Case(
        "Falcon-rw",
        FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": False},
    ),
    Case("OPT", FALCON | {"ffn_dim": 176, "word_embed_proj_dim": 128}),
    Case("Starcoder2", GROUPED | LOCAL),
    Case("StableLm", GROUPED | {"use_qkv_bias": True}),
    Case("StableLm-parallel", GROUPED | {"use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    Case("Glm4", BASE),
    Case("Glm", BASE),
    Case("Ministral", BASE | LOCAL | MIXED),
    Case("Cwm", BASE | LOCAL | {"mlp_bias": True, "rope_parameters": LLAMA3}),
    Case("Jais2", GROUPED),
    Case("VaultGemma", BASE | LOCAL | CAPPED | {"attn_logit_softcapping": 0.5}),
    Case(
        "GraniteSWA", GROUPED | MULTIPLIERS | BIASED | LOCAL | {"layer_rope_theta": [500.0, 0, 5000.0, 500.0]}
    ),
    Case("HyperCLOVAX", BASE | MULTIPLIERS | BIASED),
    Case("HyperCLOVAX-plain", BASE | MULTIPLIERS | {"use_post_norm": False}),
    Case("Glm4Moe", BASE | GROUPS | {"use_qk_norm": True, "attention_bias": True}),
    Case("Dots1", BASE | GROUPS | LOCAL | MIXED),
    Case("Nemotron", BASE | BIASED),
    Case("SmolLM3", GROUPED | SLIDING | {"no_rope_layer_interval": 2}),
    Case("SeedOss", BASE | {"attention_out_bias": True}),
    Case("HunYuanDenseV1", BASE | {"attention_bias": True}),
    Case("HunYuanDenseV1-alpha", BASE | theta(500.0, rope_type="dynamic", alpha=10.0, factor=1.0)),
    Case("Ernie4_5", BASE | {"use_bias": True}),
    Case("Helium", GROUPED | BIASED | {"head_dim": 32}),
    Case("Helium-wide", PLAIN | BIASED | WIDE | {"num_attention_heads": 2, "num_key_value_heads": 1}),
    Case("Arcee", BASE | BIASED),
    Case("DeepseekV3", PLAIN | GROUPS | LATENT),
    Case(
        "DeepseekV3-yarn",
        PLAIN
        | GROUPS
        | LATENT
        | {"q_lora_rank": None, "rope_interleave": False}
        | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    Case("GraniteMoe", GROUPED | MULTIPLIERS | LOCAL_EXPERTS | {"attention_bias": True}),
    Case("GraniteMoeShared", GROUPED | MULTIPLIERS | LOCAL_EXPERTS | {"shared_intermediate_size": 56}),
    Case("Ernie4_5_Moe", GROUPED | ERNIE),
    Case("Ernie4_5_Moe-plain", GROUPED | ERNIE | {"use_bias": False, "moe_num_shared_experts": 0}),
    Case("HunYuanMoEV1", BASE | {"num_experts": 6, "moe_topk": [2, 3, 2, 3], "attention_bias": True}),
    Case(
        "MiniMaxM2",
        BASE | LOCAL_EXPERTS | theta(500.0, partial_rotary_factor=0.5),
        legacy=old(rope_theta=500.0, rotary_dim=8),
    ),
    Case("DeepseekV2", PLAIN | GROUPS | LATENT | BY_THE_BEST),
    Case(
        "DeepseekV2-greedy",
        PLAIN | GROUPS | LATENT | STRETCHED | {"norm_topk_prob": False, "q_lora_rank": None},
    ),
    Case("Glm4MoeLite", PLAIN | ALL_SPARSE | LATENT | SOME_DENSE),
    Case("Youtu", PLAIN | LATENT | STRETCHED),
    Case(
        "KimiK2",
        PLAIN | GROUPS | LATENT | {"n_group": 1, "topk_group": 1},
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        legacy={"architectures": ["KimiK2ForCausalLM"], "model_type": "kimi_k2"},
    ),
    Case("SolarOpen", BASE | ALL_SPARSE | {"attention_bias": True}),
    Case("HYV3", BASE | EXPERTS | SHARED | SOME_DENSE | {"attention_bias": True, "mlp_bias": True}),
    Case("ExaoneMoe", BASE | ROUTING | EXPERTS | SHARED | LOCAL | MIXED),
    Case(  # so wide that gates are clamped
        "GptOss",
        BASE | LOCAL | LOCAL_EXPERTS | {"hidden_size": 192, "rope_parameters": YARN | {"truncate": False}},
    ),
    Case(  # so large an epsilon that the norm after the experts leaves a trace of how much they add up to
        "FlexOlmo",
        GROUPED | {"num_experts": 6, "num_experts_per_tok": 2, "attention_bias": True, "rms_norm_eps": 0.5},
    ),
)
BY_NAME = {case.name: case for case in CASES}


def hf_config(case: Case) -> Any:
    config = getattr(transformers, case.config_class)(**case.values)
    config._attn_implementation = "eager"
    return config


@cache
def config_of(case: Case) -> dict[str, Any]:
    """config.json as it is saved, without building the model."""
    values = hf_config(case).to_dict() | {"architectures": [case.architecture]} | dict(case.legacy)
    values = json.loads(json.dumps(values))
    return {key: value for key, value in values.items() if case.legacy.get(key, key) is not None}


def build_hf(case: Case, folder: Path | None = None, *, seed: int = 0) -> torch.nn.Module:
    """Hugging Face's model of a case: random, float32, eager. Saved into `folder` if there is one."""
    torch.manual_seed(seed)
    model = getattr(transformers, case.architecture)(hf_config(case)).eval().float()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # persistent buffers too
            if tensor.is_floating_point() and not COMPUTED.search(name):
                is_norm = name.endswith("weight") and tensor.ndim == 1  # else biases drown the input
                tensor.normal_(mean=NORM_MEAN if is_norm else 0.0, std=STD)
    if folder is not None:
        model.save_pretrained(folder)
        _make_legacy(folder / "config.json", case.legacy)
    return model


def _make_legacy(path: Path, changes: Mapping[str, Any]) -> None:
    config = {**json.loads(path.read_text()), **changes}
    deleted = {key for key, value in changes.items() if value is None}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in deleted}))


def prompt(num_tokens: int, *, seed: int = 1) -> list[int]:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()
