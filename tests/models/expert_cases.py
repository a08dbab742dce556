"""Cases of mixtures of experts, and of latent attention. Part of cases.py, which has the sizes and imports this."""

from tests.models.cases import (
    BASE,
    EXPERTS,
    GROUPED,
    GROUPS,
    LATENT,
    LOCAL,
    MIXED,
    MULTIPLIERS,
    PLAIN,
    YARN,
    Case,
    old,
    theta,
)

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

EXPERT_CASES = (
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
