"""The same as published.py of networks with experts, beside those that are there."""

from typing import Any

STEP_3 = {
    "architectures": ["Step3VLForConditionalGeneration"],
    "model_type": "step3_vl",
    "hidden_size": 7168,
    "projector_bias": False,
    "understand_projector_stride": 2,
    "text_config": {
        "architectures": ["Step3TextForCausalLM"],
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_attention_heads": 64,
        "num_attention_groups": 1,
        "num_hidden_layers": 61,
        "max_seq_len": 65536,
        "vocab_size": 128815,
        "rms_norm_eps": 1e-05,
        "moe_every_n_layer": 1,
        "use_moe": True,
        "moe_intermediate_size": 5120,
        "moe_num_experts": 48,
        "moe_top_k": 3,
        "head_dim": 256,
        "max_position_embedding": 65536,
        "rope_theta": 500000,
        "share_expert_dim": 5120,
        "share_q_dim": 2048,
        "norm_expert_weight": False,
        "moe_layers_enum": ",".join(map(str, range(4, 60))),
        "use_im_start_end": True,
        "vision_select_layer": -1,
        "image_token_len": 169,
    },
    "vision_config": {"hidden_size": 1792, "num_hidden_layers": 63},
}

EXPERTS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "Step-3": (STEP_3, 316_294_538_240, 65_536, 31_232),  # the authors name 316 billion, 38 of them active
}
