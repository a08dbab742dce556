"""Checkpoints of several networks, one of which computes text: which it is, and what the others' tensors are called.

Only text is served. Where nothing is seen or heard, positions in time, height and width are one, unless a prompt brings
its own, by which sections of rotary embeddings turn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quire.errors import UnsupportedModel
from quire.models.names import Names

COMPOSITES = (  # Hugging Face's class names
    "AyaVisionForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "DeepseekOCRForCausalLM",
    "DeepseekOcr2ForConditionalGeneration",
    "Emu3ForConditionalGeneration",
    "Exaone4_5_ForConditionalGeneration",
    "FuyuForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma3nForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "GotOcr2ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Ovis2ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
)
FAMILIES: Mapping[str, str] = {  # model_type of the network that computes text -> module.function
    "cohere2": "cohere.cohere2",
    "deepseek_ocr2_text": "deepseek.deepseek",
    "deepseek_v3": "deepseek.deepseek_v3",
    "deepseek_vl_v2": "deepseek.deepseek",
    "emu3_text_model": "llama.emu3",
    "exaone4": "olmo.exaone4",
    "gemma": "gemma.gemma",
    "gemma2": "gemma.gemma2",
    "gemma3_text": "gemma.gemma3",
    "gemma3n_text": "gemma3n.gemma3n",
    "gemma4_text": "gemma4.gemma4",
    "gemma4_unified_text": "gemma4.gemma4",
    "glm4v_moe_text": "glm.glm4_moe",
    "glm4v_text": "glm.glm4v",
    "kimi_k2": "deepseek.deepseek_v3",
    "lfm2": "lfm.lfm2",
    "lfm2_moe": "lfm.lfm2_moe",
    "llama": "llama.llama",
    "llama4_text": "llama4.llama4",
    "ministral3": "llama.ministral3",
    "mistral": "llama.mistral",
    "mistral4": "deepseek.mistral4",
    "persimmon": "gpt.persimmon",
    "qwen2": "qwen.qwen2",
    "qwen2_5_vl": "qwen.qwen2",
    "qwen2_5_vl_text": "qwen.qwen2",
    "qwen2_vl": "qwen.qwen2",
    "qwen2_vl_text": "qwen.qwen2",
    "qwen3": "qwen.qwen3",
    "qwen3_5_moe_text": "qwen.qwen3_5_moe",
    "qwen3_5_text": "qwen.qwen3_5",
    "qwen3_moe": "qwen.qwen3_moe",
    "qwen3_vl_moe_text": "qwen.qwen3_vl_moe",
    "qwen3_vl_text": "qwen.qwen3",
    "smollm3": "llama.smollm3",
}
# How wide sections are if config.json does not say, and whether they alternate.
SECTIONS: Mapping[str, tuple[list[int], bool]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), ([16, 24, 24], False)),
    **dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text"), ([24, 20, 20], True)),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text"), ([8, 12, 12], False)),
}
PREFIXES = (r"^(model\.)?(language_model|text_model)\.(model\.)*", "model.")
OTHERS = (
    r"^(model\.)?("
    + "|".join(
        (
            *(
                "aligner",
                "audio_tower",
                "connector",
                "embed_audio",
                "embed_vision",
                "image_newline",
            ),
            *("projector", "qwen2_model", "sam_model", "view_seperator"),
            *("mm_projector", "multi_modal_projector", "vision_model", "vision_tower", "visual"),
            *("vision_embed_tokens", "vision_embedder", "visual_embeddings_table", "vqmodel"),
        )
    )
    + r")\b"
)
BESIDE = {  # keys that are not the text's, where those are not by themselves
    *("vision_config", "language_config", "projector_config"),
    *("candidate_resolutions", "global_view_pos", "tile_tag", "lm_head"),
}
WHOLE = (  # keys of the whole that hold for the part
    *("tie_word_embeddings", "quantization_config"),
    *("image_token_id", "image_token_index", "video_token_id"),
)


@dataclass(frozen=True)
class Part:
    """The network that computes text: its config.json, and the function that describes it."""

    config: Mapping[str, Any]
    family: str

    def names(self, own: Names) -> Names:
        """How the whole checkpoint spells the part, by how it is spelled alone."""
        return replace(own, renames=(PREFIXES, *own.renames), ignored=(*own.ignored, OTHERS))


def text_part(config: Mapping[str, Any]) -> Part | None:
    """The part that computes text; None if the config is not of several networks.

    Raises:
        UnsupportedModel: no family describes that part.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or names[0] not in COMPOSITES:
        return None
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):  # early Qwens have both in one, and DeepSeek-OCR has the text's twice
        inner = {key: value for key, value in config.items() if key not in BESIDE}
    kind = str(inner.get("model_type"))
    if kind not in FAMILIES:
        raise UnsupportedModel(
            f"{names[0]}: no family describes its text_config, whose model_type is {kind!r}"
            f" (known: {', '.join(FAMILIES)})"
        )
    whole = {key: config[key] for key in WHOLE if key in config}
    ropes = _in_sections(inner, *SECTIONS[kind]) if kind in SECTIONS else {}
    values = {**DEFAULTS.get(kind, {}), **inner, **whole, **ropes, "architectures": names}
    if inner.get("rope_parameters"):  # which have it
        values.pop("rope_theta", None)
    return Part(values, FAMILIES[kind])


def _in_sections(inner: Mapping[str, Any], usual: list[int], alternate: bool) -> Mapping[str, Any]:
    """Rope parameters with `sections` and whether they alternate, as the class has them, in place of mrope_*."""
    found = {key: inner.get(key) for key in ("rope_parameters", "rope_scaling")}
    given = {key: rope for key, rope in found.items() if rope and isinstance(rope, Mapping)}
    for key, rope in (given or {"rope_parameters": {}}).items():
        kept = {name: value for name, value in rope.items() if not name.startswith("mrope_")}
        kept |= {name: "default" for name, value in kept.items() if value == "mrope"}
        found[key] = {**kept, "sections": (rope.get("mrope_section", usual), alternate)}
    return found


LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
GEMMA = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {  # Hugging Face's, for keys that published checkpoints leave out
    "deepseek_vl_v2": {"use_mla": True, "hidden_act": "silu", "rms_norm_eps": 1e-6},
    "gemma": GEMMA | {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": GEMMA | {"query_pre_attn_scalar": 256},
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
    },
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0},
    "llama": LLAMA_7B | {"num_key_value_heads": None},
    "mistral": LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8},
    "glm4v_moe_text": {"attention_bias": True},
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), {"rope_theta": 1e6}),
    "qwen3_vl_text": {"rope_theta": 5e5},
    "qwen3_vl_moe_text": {"rope_theta": 5e5, "norm_topk_prob": True},
}
