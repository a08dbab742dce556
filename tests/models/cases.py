"""Tiny random checkpoints, one per architecture and variant, made by Hugging Face, all features forced on.

All parameters and buffers are random: ones and zeros hide missing norms, biases and corrections. Sizes differ
pairwise, so that a transposed or swapped matrix cannot fit. Windows are shorter than prompts, caps bite.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models.case import Case, alias, found
from tests.models.respelled import RESPELLED
from tests.models.values import (
    ALL_SPARSE,
    BAILING,
    BASE,
    BIASED,
    BLOOM,
    BY_THE_BEST,
    CAPPED,
    CHOOSING,
    DELTA,
    ERNIE,
    EXPERTS,
    FACTORS,
    FALCON,
    FEW_EXPERTS,
    FIRST_TOKEN,
    GEMMA3N,
    GEMMA3N_OLD,
    GEMMA4,
    GEMMA4_EXPERTS,
    GEMMA4_PUBLISHED,
    GPT,
    GROUPED,
    GROUPS,
    GROUPS_OF_HEADS,
    GROWING,
    HALF_STATES,
    HYBRID,
    KIMI,
    KIMI_K2,
    KIMI_PUBLISHED,
    LAGUNA,
    LAGUNA_PLAIN,
    LATENT,
    LFM3,
    LIGHTNING,
    LINEAR,
    LLAMA3,
    LLAMA4,
    LLAMA4_PLAIN,
    LOCAL,
    LOCAL_EXPERTS,
    LONGROPE,
    M1,
    MIXED,
    MPT,
    MSCALES,
    MULTIPLIERS,
    MUP,
    NEO,
    ONE_GROUP,
    PER_TYPE,
    PLAIN,
    PRETRAINED,
    ROPE_BASES,
    ROUTING,
    SCAN,
    SHARED,
    SHARED_EXPERT,
    SHARING,
    SHORT,
    SIZES,
    SLIDING,
    SOME_DENSE,
    SPARE,
    STATES,
    STRETCHED,
    TAKING_OVER,
    TEXT_01,
    TRINITY,
    UNTIED,
    VOCAB_SIZE,
    WIDE,
    XGLM,
    YARN,
    ZAMBA,
    old,
    theta,
    without,
)

STD, NORM_MEAN = 0.3, 0.5
COMPUTED = re.compile(r"\.(slope_rate|(query|key|diagonal)_decay)$")  # buffers that follow from the config


CASES = (
    *RESPELLED,
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
    Case(
        "Mamba2",
        SIZES
        | {"hidden_size": 120, "num_heads": 6, "head_dim": 40, "state_size": 24, "n_groups": 3}
        | {"use_bias": True, "chunk_size": 16, "time_step_limit": [0.4, 1.5]},
    ),
    Case(
        "FalconH1",
        GROUPED
        | theta(500.0)
        | STATES
        | FACTORS
        | {"mamba_d_ssm": 240, "mamba_d_head": 40, "mamba_proj_bias": False},
    ),
    Case(
        "FalconH1-norm",
        GROUPED
        | BIASED
        | STATES
        | {"mamba_d_ssm": 240, "mamba_d_head": 40, "mamba_rms_norm": True, "projectors_bias": True},
    ),
    Case(
        "FalconH1-gate",
        GROUPED
        | STATES
        | {
            "mamba_d_ssm": 384,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "projectors_bias": True,
        },
    ),
    Case("Mamba", SCAN),
    Case(
        "FalconMamba", SCAN | {"tie_word_embeddings": False, "use_conv_bias": False, "time_step_rank": "auto"}
    ),
    Case(
        "Jamba",
        GROUPED
        | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 6, "mamba_d_state": 12}
        | {"mamba_proj_bias": True, "mamba_dt_rank": 20},
    ),
    Case(
        "RecurrentGemma",
        {**GROUPED, "intermediate_size": 352, "lru_width": 96, "conv1d_width": 3}
        | {"attention_window_size": 5, "logits_soft_cap": 0.7, "attention_bias": True},
    ),
    Case("Bamba", GROUPED | BIASED | STATES | {"attn_layer_indices": [1]}),
    Case(
        "GraniteMoeHybrid",
        GROUPED | MULTIPLIERS | LOCAL_EXPERTS | STATES | HALF_STATES | {"attention_bias": True},
    ),
    Case(
        "GraniteMoeHybrid-dense",
        GROUPED
        | MULTIPLIERS
        | STATES
        | HALF_STATES
        | {"num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    Case("NemotronH", BASE | ALL_SPARSE | SPARE),
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
    Case("Olmoe-clipped", GROUPED | {"num_experts": 8, "num_experts_per_tok": 2, "clip_qkv": 0.7}),
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
    Case("Gemma3n", GEMMA3N | {"attention_bias": True, "altup_active_idx": 1}, config="Gemma3nTextConfig"),
    Case(
        "Gemma3n-old",
        GEMMA3N | {"altup_correct_scale": False, "num_kv_shared_layers": 0, "tie_word_embeddings": False},
        config="Gemma3nTextConfig",
        legacy=GEMMA3N_OLD,
    ),
    Case("Gemma4", GEMMA4 | SHARING | {"attention_bias": True}, config="Gemma4TextConfig"),
    Case("Gemma4-published", GEMMA4 | UNTIED, config="Gemma4TextConfig", legacy=GEMMA4_PUBLISHED),
    Case("Gemma4-experts", GEMMA4 | GEMMA4_EXPERTS, config="Gemma4TextConfig"),
    Case("Olmo", GROUPED),
    Case("Olmo-clipped", GROUPED | {"clip_qkv": 1.5}),
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
    Case("GraniteSWA", GROUPED | MULTIPLIERS | BIASED | LOCAL | ROPE_BASES),
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
        PLAIN | GROUPS | LATENT | {"q_lora_rank": None, "rope_interleave": False} | STRETCHED,
    ),
    Case("DeepseekV32", PLAIN | GROUPS | LATENT | CHOOSING | STRETCHED),
    Case("GlmMoeDsa", PLAIN | ALL_SPARSE | LATENT | CHOOSING | SOME_DENSE | TAKING_OVER),
    Case(
        "GlmMoeDsa-pattern",
        PLAIN | GROUPS | LATENT | CHOOSING | {"index_topk_freq": 2, "index_skip_topk_offset": 1},
        legacy={"indexer_types": None, "index_topk_freq": 2, "index_skip_topk_offset": 1},
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
    alias("KimiK2", "DeepseekV3", PLAIN | GROUPS | LATENT | ONE_GROUP, model_type="kimi_k2"),
    Case("DeepseekV3-kimi_k2", PLAIN | GROUPS | LATENT | ONE_GROUP, legacy=KIMI_K2),
    Case("SolarOpen", BASE | ALL_SPARSE | {"attention_bias": True}),
    Case("HYV3", BASE | EXPERTS | SHARED | SOME_DENSE | {"attention_bias": True, "mlp_bias": True}),
    Case("ExaoneMoe", BASE | ROUTING | EXPERTS | SHARED | LOCAL | MIXED),
    Case("Phimoe", BASE | LOCAL_EXPERTS | LOCAL | {"attention_bias": True, "lm_head_bias": True}),
    alias("PhiMoE", "Phimoe", GROUPED | LOCAL_EXPERTS | {"rope_parameters": SHORT, "hidden_size": 64}),
    Case("XGLM", XGLM),
    Case("CTRL", GPT | {"dff": 176}, model="CTRLLMHeadModel"),
    Case("Bloom", BLOOM),
    Case("Bloom-odd", BLOOM | {"hidden_size": 96, "n_head": 6, "tie_word_embeddings": False}),
    Case("Mpt", MPT | {"attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3}}),
    alias("MPT", "Mpt", MPT),
    Case("NanoChat", GROUPED | {"attention_bias": True, "final_logit_softcapping": 0.7}),
    Case("Afmoe", BASE | EXPERTS | SHARED | LOCAL | MIXED | TRINITY),
    Case("Laguna", BASE | EXPERTS | LOCAL | MIXED | LAGUNA),
    Case("Laguna-plain", BASE | EXPERTS | LOCAL | LAGUNA_PLAIN),
    Case("Kolibri1", BASE | EXPERTS | LOCAL | MIXED | {"shared_expert_intermediate_size": 56}),
    Case("Apertus", GROUPED | {"attention_bias": True, "rope_parameters": LLAMA3}),
    alias("Aquila", "Llama", BASE | theta(500.0)),
    alias("Xverse", "Llama", BASE | {"tie_word_embeddings": True}),
    alias(
        "InternLM", "Llama", BASE | {"attention_bias": True}, bias=True, attention_bias=None, mlp_bias=None
    ),
    alias("MiMo", "Qwen2", GROUPED, num_nextn_predict_layers=1, attention_bias=True),
    Case("Llama4", BASE | LLAMA4 | {"attention_chunk_size": 16}, config="Llama4TextConfig"),
    Case("Llama4-plain", BASE | LLAMA4_PLAIN, config="Llama4TextConfig"),
    Case("Ministral3", BASE | LOCAL | {"rope_parameters": GROWING}),
    Case("Mistral4", PLAIN | GROUPS | LATENT | ONE_GROUP | {"rope_parameters": GROWING | MSCALES}),
    Case("GPTBigCode", GPT | {"n_inner": 176}),
    Case("GPTBigCode-multihead", GPT | {"multi_query": False, "scale_attn_weights": False}),
    Case("GPTNeo", NEO),
    Case("CodeGen", GPT | {"rotary_dim": 8, "n_inner": 176}),
    Case("GPTNeoXJapanese", FALCON | theta(500.0, partial_rotary_factor=0.5)),
    Case(
        "GPTNeoXJapanese-old",
        FALCON | {"tie_word_embeddings": False} | theta(10_000.0, partial_rotary_factor=1.0),
        legacy=old(rotary_pct=1.0, rotary_emb_base=10_000),
    ),
    Case("Persimmon", PLAIN),
    Case("Persimmon-plain", PLAIN | {"qk_layernorm": False}),
    Case("BioGpt", PLAIN),
    Case("MiniCPM3", PLAIN | LATENT | MUP),
    Case(
        "MiniCPM3-plain", PLAIN | LATENT | {"scale_depth": None, "dim_model_base": None, "v_head_dim": None}
    ),
    alias("InternLM3", "Llama", BASE | BIASED, config="InternLM3Config"),
    alias("IQuestCoder", "Llama", BASE | BIASED, config="IQuestCoderConfig"),
    Case(
        "GraniteMoeSWA",
        GROUPED | MULTIPLIERS | LOCAL_EXPERTS | LOCAL | ROPE_BASES | {"shared_intermediate_size": 56},
    ),
    Case("Mellum", BASE | EXPERTS | LOCAL | MIXED | SOME_DENSE | {"rope_parameters": PER_TYPE}),
    Case(
        "Flint",
        BASE | EXPERTS | LOCAL | MIXED | {"shared_expert_intermediate_size": 56, "mlp_only_layers": [1]},
    ),
    Case("Cohere2Moe", BASE | FEW_EXPERTS | LOCAL | {"logit_scale": 0.25, "attention_bias": True}),
    Case(
        "Cohere2Moe-dense",
        BASE
        | FEW_EXPERTS
        | LOCAL
        | {"logit_scale": 0.25, "rms_norm_eps": 1e-5, "prefix_dense_intermediate_size": 56}
        | {"first_k_dense_replace": 2, "sliding_window_pattern": 2, "expert_selection_fn": "sigmoid"}
        | {"num_shared_experts": 2, "shared_expert_combination_strategy": "sum", "norm_topk_prob": False},
    ),
    Case("Zamba2", PLAIN | ZAMBA | {"use_shared_attention_adapter": True, "use_mem_rope": True}),
    Case(
        "Zamba2-plain",
        GROUPED
        | ZAMBA
        | {"layers_block_type": ["hybrid", "mamba"] * 2 + ["mamba"], "num_mem_blocks": 1}
        | {"add_bias_linear": True, "intermediate_size": None},
    ),
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
    config = found(case.config_class)(**case.values)
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
    model = found(case.architecture)(hf_config(case)).eval().float()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # persistent buffers too
            if tensor.is_floating_point() and not COMPUTED.search(name):
                is_norm = name.endswith("weight") and tensor.ndim == 1  # else biases drown the input
                tensor.normal_(mean=NORM_MEAN if is_norm else 0.0, std=STD)
    if folder is not None:
        model.save_pretrained(folder)
        if case.spelling is not None:
            file = folder / "model.safetensors"
            save_file(case.spelling.of(load_file(file)), file)
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
