"""Arguments of Hugging Face's config classes that cases.py puts together: sizes, and what forces a feature on."""

from collections.abc import Mapping
from typing import Any

VOCAB_SIZE, MAX_LENGTH, FIRST_TOKEN = 104, 64, 3  # tokens below the first one are special

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
BLOOM = {key: value for key, value in FALCON.items() if not key.startswith(("num_", "max_"))}
BLOOM |= {"n_layer": 4, "n_head": 4}
XGLM = {key: SIZES[key] for key in ("vocab_size", "max_position_embeddings", "pad_token_id")}
XGLM |= {"d_model": 128, "ffn_dim": 176, "num_layers": 4, "attention_heads": 4}
MPT = {"d_model": 128, "n_heads": 4, "n_layers": 4, "max_seq_len": MAX_LENGTH, "vocab_size": VOCAB_SIZE}
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
NO_RAMP = LLAMA3 | {"high_freq_factor": 1.0}
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
GEMMA4 = {
    **BASE,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 5,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 24,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "final_logit_softcapping": 0.7,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    },
}
GEMMA3N = {
    **BASE,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 5,
    "num_kv_shared_layers": 2,
    "intermediate_size": [176, 152, 176, 160, 176, 144],
    "activation_sparsity_pattern": [0.9, 0.0, 0.6, 0.0, 0.3, 0.0],
    "hidden_size_per_layer_input": 24,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "altup_num_inputs": 3,
    "laurel_rank": 20,
    "final_logit_softcapping": 0.7,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    },
}
GEMMA3N_OLD = {
    "rope_parameters": None,
    "rope_theta": 5000.0,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}
SHARING = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
UNTIED = {"tie_word_embeddings": False}
GEMMA4_EXPERTS = {
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": False,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 40,
    "rms_norm_eps": 0.5,  # else the norm after the experts hides how much they add up to
}
GEMMA4_PUBLISHED = {"per_layer_config": None, "global_head_dim": 32, "num_global_key_value_heads": 1}
CHOOSING = {"index_n_heads": 10, "index_head_dim": 12, "index_topk": 6}  # with few heads, scores are often 0
TAKING_OVER = {"indexer_types": ["full", "shared", "full", "shared"]}
CAPPED = {"query_pre_attn_scalar": 24, "final_logit_softcapping": 0.7}
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}
LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
BY_THE_BEST = {"topk_method": "group_limited_greedy", "num_experts_per_tok": 3, "norm_topk_prob": False}
MSCALES = {"mscale": 0.7, "mscale_all_dim": 1.3}
STRETCHED = {"rope_parameters": YARN | MSCALES}
GROWING = YARN | {"llama_4_scaling_beta": 0.5}
SHORT = LONGROPE | {PRETRAINED: MAX_LENGTH, "short_mscale": 1.3, "long_mscale": 1.3}
TRINITY = {"mup_enabled": True, "route_scale": 1.5, "attention_bias": True}
LAGUNA = {
    "rope_parameters": PER_TYPE,
    "num_attention_heads_per_layer": [4, 2, 6, 4],
    "moe_routed_scaling_factor": 1.5,
    "shared_expert_intermediate_size": 56,
    "gating": "per-element",
}
LAGUNA_PLAIN = {"shared_expert_intermediate_size": 56, "attention_bias": True}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
SOME_DENSE = {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}
ALL_SPARSE = {key: value for key, value in GROUPS.items() if key != "first_k_dense_replace"}
ROUTING = {key: value for key, value in GROUPS.items() if key not in ("n_routed_experts", "n_shared_experts")}
SHARED = {"num_shared_experts": 2}
FEW_EXPERTS = {key: EXPERTS[key] for key in ("num_experts", "num_experts_per_tok")}
MUP = {"scale_emb": 3.0, "scale_depth": 0.6, "dim_model_base": 32}
ROPE_BASES = {"layer_rope_theta": [500.0, 0, 5000.0, 500.0]}
NEO = {key: value for key, value in PLAIN.items() if key not in ("num_hidden_layers", "num_attention_heads")}
NEO |= {"num_layers": 4, "num_heads": 4, "window_size": 5, "attention_types": [[["global", "local"], 2]]}
ERNIE = {
    "use_bias": True,
    "moe_intermediate_size": 40,
    "moe_k": 2,
    "moe_num_experts": 6,
    "moe_layer_interval": 2,
    "moe_layer_end_index": 2,
}
LLAMA4 = {
    "rope_parameters": NO_RAMP,
    "intermediate_size_mlp": 208,
    "num_local_experts": 6,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": MAX_LENGTH,
    "floor_scale": 6,
    "attn_scale": 0.7,
    "rms_norm_eps": 0.05,
}
LLAMA4_PLAIN = LLAMA4 | {"use_qk_norm": False, "attn_temperature_tuning": False, "moe_layers": [1]}
LLAMA4_PLAIN |= {"attention_bias": True, "rms_norm_eps": 1e-5}

HYBRID = {
    **GROUPED,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "block_multiple_of": 16,
    "norm_eps": 1e-5,
}
STATES = {
    "mamba_n_heads": 6,
    "mamba_d_head": 64,
    "mamba_n_groups": 3,
    "mamba_d_state": 24,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_proj_bias": True,
    "mamba_chunk_size": 16,
    "time_step_limit": [0.4, 1.5],
    "hidden_size": 192,
}
HALF_STATES = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "shared_intermediate_size": 56,
}
FACTORS = {
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "mlp_multipliers": [0.6, 0.7],
    "key_multiplier": 0.4,
    "attention_out_multiplier": 1.3,
    "attention_in_multiplier": 0.8,
    "ssm_multipliers": [0.5, 0.6, 1.4, 1.5, 1.6],
    "ssm_in_multiplier": 0.9,
    "ssm_out_multiplier": 0.7,
}
SCAN = {
    **SIZES,
    "hidden_size": 120,
    "state_size": 12,
    "conv_kernel": 3,
    "use_bias": True,
    "time_step_rank": 20,
    "expand": 3,
}
SPARE = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    "mamba_num_heads": 6,
    "mamba_head_dim": 40,
    "ssm_state_size": 24,
    "n_groups": 3,
    "use_bias": True,
    "mlp_bias": True,
    "moe_shared_expert_intermediate_size": 56,
    "time_step_min": 0.4,
    "chunk_size": 16,
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


def without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in keys}


def old(**more: Any) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    return {"rope_parameters": None, "layer_types": None, **more}


STEP3 = {
    **without(PLAIN, "max_position_embeddings"),
    "max_position_embedding": MAX_LENGTH,
    "head_dim": 24,
    "share_q_dim": 56,
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_intermediate_size": 40,
    "share_expert_dim": 72,
}
MIMO_V2 = {
    "head_dim": 24,
    "v_head_dim": 20,
    "attention_value_scale": 0.6,
    "num_nextn_predict_layers": 0,
    **{key: GROUPS[key] for key in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")},
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.334},
    },
}
MIMO_V2_PUBLISHED = {  # the same as its authors spell it
    "hybrid_layer_pattern": [0, 1, 1, 1],
    "moe_layer_freq": [0, 1, 1, 1],
    "layernorm_epsilon": 1e-5,
    "sliding_window_size": 5,
    "sliding_window": 5,
    "attention_chunk_size": 5,
    "swa_num_key_value_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_head_dim": 24,
    "swa_v_head_dim": 20,
    "rope_theta": 5_000_000,
    "swa_rope_theta": 10_000,
    "partial_rotary_factor": 0.334,
    "add_swa_attention_sink_bias": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    **dict.fromkeys(("layer_types", "mlp_layer_types", "rope_parameters", "rms_norm_eps")),
}
STEP3P5 = {
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "share_expert_dim": 72,
    "num_sliding_attention_heads": 8,
    "query_pre_attn_scalar": 24,
    "moe_router_scaling_factor": 2.5,
    "swiglu_limits": [0.0, 0.02, None, 0.03],
    "swiglu_limits_shared": [0.0, 0.03, None, 0.02],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": LLAMA3 | {"partial_rotary_factor": 0.5},
    },
}
STEP3P5_PUBLISHED = {  # the same as its authors spell it, with a layer that predicts further tokens
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "num_attention_groups": 2,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 8,
        "num_attention_groups": 2,
        "head_dim": 16,
        "true_head_dim": 16,
    },
    "moe_layers_enum": "1,2,3",
    "moe_router_activation": "sigmoid",
    "norm_expert_weight": True,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factors": [1.0, 0.5, 1.0, 0.5, 1.0],
    "rope_theta": [100.0, 500.0, 100.0, 500.0, 100.0],
    "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
    "use_head_wise_attn_gate": True,
    "yarn_only_types": ["full_attention"],
    "zero_centered": True,
    **dict.fromkeys(("n_routed_experts", "num_experts_per_tok", "num_key_value_heads", "mlp_layer_types")),
    **dict.fromkeys(("rope_parameters", "per_layer_config", "num_sliding_attention_heads", "hidden_act")),
}
STEP3_VL = "Step3VLForConditionalGeneration"

ZAMBA = {
    "hidden_size": 120,
    "num_hidden_layers": 5,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
    "num_mem_blocks": 2,
    "adapter_rank": 12,
    "rms_norm_eps": 100.0,  # else scores are so large that they blow up rounding
    "n_mamba_heads": 6,
    "mamba_d_state": 24,
    "mamba_ngroups": 3,
    "time_step_min": 0.4,
    "chunk_size": 16,
}
ZAMBA1 = {
    "hidden_size": 120,
    "num_hidden_layers": 5,
    "layers_block_type": ZAMBA["layers_block_type"],
    "rms_norm_eps": 25.0,  # with less, rounding is blown up; with more, attention fades
    "attention_head_dim": 40,
    "n_mamba_heads": 3,
    "mamba_d_state": 24,
    "mamba_d_conv": 3,
    "mamba_dt_rank": 20,
    "mamba_proj_bias": True,
}
KIMI_K2 = {  # as it was published: Transformers knows no such type, and would run the code that comes with it
    "model_type": "kimi_k2",
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
}
