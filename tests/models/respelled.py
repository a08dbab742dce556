"""Cases of networks that Transformers has no class of, or one that spells keys and tensors otherwise."""

from tests.models.case import Case, Spelling, alias
from tests.models.values import (
    BASE,
    EXPERTS,
    GROUPED,
    GROUPS,
    LLAMA3,
    LOCAL,
    MAX_LENGTH,
    MIMO_V2,
    MIMO_V2_PUBLISHED,
    MIXED,
    PLAIN,
    SIZES,
    SOME_DENSE,
    STEP3,
    STEP3_VL,
    STEP3P5,
    STEP3P5_PUBLISHED,
    ZAMBA1,
    theta,
    without,
)

QKV = ("q_proj", "k_proj", "v_proj")
INTERNLM = Spelling(
    {
        r"embed_tokens": "tok_embeddings",
        r"^lm_head": "output",
        r"self_attn": "attention",
        r"o_proj": "wo",
        r"mlp\.gate_proj": "feed_forward.w1",
        r"mlp\.up_proj": "feed_forward.w3",
        r"mlp\.down_proj": "feed_forward.w2",
        r"input_layernorm": "attention_norm",
        r"post_attention_layernorm": "ffn_norm",
    },
    {"wqkv": QKV},
    groups=2,
)
EXAONE = Spelling(
    {
        r"^model\.embed_tokens": "transformer.wte",
        r"^model\.norm": "transformer.ln_f",
        r"^model\.layers": "transformer.h",
        r"self_attn\.o_proj": "attn.attention.out_proj",
        r"self_attn": "attn.attention",
        r"gate_proj": "c_fc_0",
        r"up_proj": "c_fc_1",
        r"down_proj": "c_proj",
        r"input_layernorm": "ln_1",
        r"post_attention_layernorm": "ln_2",
    }
)
CHATGLM = Spelling(
    {
        r"^model\.embed_tokens": "transformer.embedding.word_embeddings",
        r"^lm_head": "transformer.output_layer",
        r"^model\.norm": "transformer.encoder.final_layernorm",
        r"^model": "transformer.encoder",
        r"self_attn\.o_proj": "self_attention.dense",
        r"self_attn": "self_attention",
        r"gate_up_proj": "dense_h_to_4h",
        r"down_proj": "dense_4h_to_h",
    },
    {"query_key_value": QKV},
)
BAILING = Spelling(
    {
        r"embed_tokens": "word_embeddings",
        r"self_attn\.o_proj": "attention.dense",
        r"self_attn\.q_norm": "attention.query_layernorm",
        r"self_attn\.k_norm": "attention.key_layernorm",
        r"self_attn": "attention",
        r"e_score_correction_bias": "expert_bias",
    },
    {"query_key_value": QKV},
)
# What config.json says instead of Transformers' keys, which are deleted.
OWN_EXAONE = {"num_layers": 4, "layer_norm_epsilon": 1e-6, "activation_function": "silu"}
OWN_EXAONE |= {"architectures": ["ExaoneForCausalLM"], "num_hidden_layers": None, "rms_norm_eps": None}
OWN_EXAONE |= {"hidden_act": None, "attention_bias": None, "mlp_bias": None}
OWN_CHATGLM = {
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 176,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": SIZES["vocab_size"],
    "post_layer_norm": True,
    "rmsnorm": True,
    "rope_ratio": 0.05,
    "seq_length": MAX_LENGTH,
}
OWN_CHATGLM |= dict.fromkeys(
    (
        "intermediate_size",
        "head_dim",
        "rms_norm_eps",
        "num_key_value_heads",
        "num_hidden_layers",
        "hidden_act",
    )
)
OWN_CHATGLM |= dict.fromkeys(("max_position_embeddings", "attention_bias", "rope_parameters"))
OWN_CHATGLM |= dict.fromkeys(("partial_rotary_factor",))  # of Transformers 5.17
FIRST_CHATGLM = {"architectures": ["ChatGLMForConditionalGeneration"], "rope_ratio": None}
FIRST_CHATGLM |= {"multi_query_attention": False, "add_qkv_bias": False}
OWN_BAILING = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "num_experts": 8,
    "num_shared_experts": 2,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "use_bias": False,
    "use_qkv_bias": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 500.0,
    "num_nextn_predict_layers": 1,
}
OWN_BAILING |= dict.fromkeys(
    ("n_routed_experts", "n_shared_experts", "attention_bias", "rope_parameters", "num_mtp_layers")
)
RING = {
    **{key: GROUPS[key] for key in ("n_group", "topk_group", "num_experts_per_tok", "moe_intermediate_size")},
    "num_experts": 8,
    "num_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 500.0,
    "rms_norm_eps": 0.2,  # else nothing shows how queries are scaled
}
ROUTED = {key: GROUPS[key] for key in ("n_routed_experts", "num_experts_per_tok", "n_shared_experts")}
ROUTED |= {"moe_intermediate_size": 40}

RESPELLED = (
    Case("MiMoV2Flash", BASE | LOCAL | MIXED | MIMO_V2 | SOME_DENSE | {"attention_bias": True}),
    Case(
        "MiMoV2Flash-published",
        BASE | without(MIMO_V2, "rope_parameters") | {"sliding_window": 6, "norm_topk_prob": False},
        legacy=MIMO_V2_PUBLISHED,
    ),
    Case("Step3Text", STEP3 | {"moe_layers_enum": "0,2", "rope_theta": 500.0}),
    Case("Step3p5", BASE | LOCAL | MIXED | STEP3P5, config="Step3p7TextConfig"),
    Case(
        "Step3p5-published",
        BASE | LOCAL | MIXED | STEP3P5 | {"query_pre_attn_scalar": None, "swiglu_limits": None},
        config="Step3p7TextConfig",
        legacy=STEP3P5_PUBLISHED,
    ),
    alias("Step3VL", "Step3Text", STEP3 | {"norm_expert_weight": True}, "", architectures=[STEP3_VL]),
    Case(
        "InternLM2",
        GROUPED | {"attention_bias": True} | theta(500.0),
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "architectures": ["InternLM2ForCausalLM"],
            "bias": True,
            **dict.fromkeys(("attention_bias", "mlp_bias", "head_dim")),
        },
        INTERNLM,
    ),
    Case("Exaone", BASE | {"rope_parameters": LLAMA3}, "LlamaForCausalLM", "LlamaConfig", OWN_EXAONE, EXAONE),
    alias(
        "Orion",
        "StableLm",
        PLAIN | {"layer_norm_eps": 1e-3, "num_key_value_heads": 4} | theta(500.0),
        "OrionConfig",
        rms_norm_eps=1e-3,
        **dict.fromkeys(("layer_norm_eps", "use_qkv_bias", "qk_layernorm", "use_parallel_residual")),
    ),
    Case(
        "ChatGLM",
        BASE | theta(500.0) | {"rms_norm_eps": 1e-5},
        "GlmForCausalLM",
        "GlmConfig",
        OWN_CHATGLM,
        CHATGLM,
    ),
    Case(
        "ChatGLM-3",
        BASE | theta(10_000.0) | {"num_key_value_heads": 4, "attention_bias": False, "rms_norm_eps": 1e-5},
        "GlmForCausalLM",
        "GlmConfig",
        OWN_CHATGLM | FIRST_CHATGLM,
        CHATGLM,
    ),
    Case(
        "BailingMoeV2",
        BASE | GROUPS | {"use_qk_norm": True, "attention_bias": True} | theta(500.0),
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        OWN_BAILING,
        BAILING,
    ),
    Case("Emu3", GROUPED | theta(500.0), config="Emu3TextConfig"),
    Case("Zamba", GROUPED | ZAMBA1),
    Case(  # layers by their period, without copies of what is shared, and another network's scans
        "Zamba-plain",
        PLAIN
        | ZAMBA1
        | {"layers_block_type": None, "attn_layer_period": 3, "attn_layer_offset": 0, "n_mamba_heads": 1}
        | {"mamba_conv_bias": False, "mamba_proj_bias": False, "attention_head_dim": None, "hidden_size": 120}
        | {"mamba_dt_rank": "auto", "num_key_value_heads": 4, "rms_norm_eps": 14.0},
        legacy={"layers_block_type": None},
    ),
    Case("BailingMoeLinearV2", BASE | RING),
    Case("BailingMoeLinearV2-rest", BASE | RING | {"num_hidden_layers": 5, "first_k_dense_replace": 0}),
    Case("BailingMoe", BASE | EXPERTS | {"num_shared_experts": 2, "use_qkv_bias": True, "rope_theta": 500.0}),
    Case(
        "BailingMoe-dense",
        GROUPED | EXPERTS | {"use_bias": True, "first_k_dense_replace": 1, "norm_topk_prob": False},
    ),
    Case(
        "Deepseek",
        PLAIN | ROUTED | {"mlp_layer_types": ["dense", *["sparse"] * 3], "routed_scaling_factor": 2.5},
        spelling=Spelling({}),
    ),
    Case(
        "Deepseek-published",
        PLAIN
        | ROUTED
        | {"num_key_value_heads": 2, "attention_bias": True}
        | {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2},
        legacy=dict.fromkeys(("mlp_layer_types", "routed_scaling_factor", "topk_method"))
        | {"first_k_dense_replace": 2},
        spelling=Spelling({}),
    ),
)
