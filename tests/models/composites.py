"""Tiny random checkpoints of several networks, made by Hugging Face, one for each class whose text Quire serves."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.case import skip_unlike
from tests.models.values import (
    BASE,
    DELTA,
    EXPERTS,
    GEMMA3N,
    GEMMA4,
    GEMMA4_EXPERTS,
    GROUPED,
    GROUPS,
    LATENT,
    LLAMA4,
    LOCAL,
    MIXED,
    ONE_GROUP,
    PER_TYPE,
    PLAIN,
    SHARED_EXPERT,
    SHARING,
    theta,
    without,
)

SMALL = {  # of what sees or hears
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "vision_output_dim", "projection_dim"), 32),
    **dict.fromkeys(("depth", "num_hidden_layers", "encoder_layers", "vision_num_hidden_layers"), 2),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "mlp_dim", "projector_input_dim"), 48),
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 128,
    "vocab_size": 40,
    "num_mel_bins": 8,
    "max_source_positions": 32,
    "num_position_embeddings": 16,
    "output_channels": 32,
    "deepstack_visual_indexes": [0, 1],
    "global_attn_indexes": [0],
    "fullatt_block_indexes": [0],
    "projector_output_dim": 32,
}
SMALL_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": [1], "hidden_size": 32}
SECTIONS = {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 500.0}
HALF = SECTIONS | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
UNIFIED = without(GEMMA4, "hidden_size_per_layer_input", "vocab_size_per_layer_input")
OCR = PLAIN | EXPERTS | {"n_shared_experts": 2, "mlp_layer_types": ["dense"] + ["sparse"] * 3}
OCR_1 = {
    "architectures": ["DeepseekOCRForCausalLM"],
    "model_type": "deepseek_vl_v2",
    "mlp_layer_types": None,
    "first_k_dense_replace": 1,
    "use_mla": False,
    "projector_config": {"n_embed": 128},
    "language_config": {"hidden_size": 128},
    "lm_head": True,
}
Stored = dict[str, Tensor]


class Eyes(transformers.Gemma3nVisionConfig):
    """Gemma 3n's, whose tower is of the library timm."""


class Tower(transformers.PreTrainedModel):
    config_class = Eyes

    def __init__(self, config: Eyes):
        super().__init__(config)
        self.stem = torch.nn.Linear(3, config.hidden_size)


transformers.AutoModel.register(Eyes, Tower)


@dataclass(frozen=True, eq=False)
class Composite:
    """`text` is the text's model_type and values; `whole` those of the config around it."""

    name: str  # of classes: {}ForConditionalGeneration, or {}{model}, and {}Config
    kind: str
    text: Mapping[str, Any]
    whole: Mapping[str, Any] = field(default_factory=dict)
    published: Callable[[Stored], Stored] = dict  # from the tensors that Hugging Face saves
    is_flat: bool = False  # config.json has the keys of the text beside the others
    legacy: Mapping[str, Any] = field(default_factory=dict)  # other values in config.json
    tower: type | None = (
        None  # the config of what sees, if Hugging Face's needs a library that is not installed
    )

    model: str = "ForConditionalGeneration"
    id: str = ""  # where a class has several

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.id or self.name)

    @property
    def architecture(self) -> str:
        return f"{self.name}{self.model}"

    @property
    def config_class(self) -> str:
        return f"{self.name}Config"

    @property
    def described(self) -> str:
        """The architecture in config.json."""
        names: list[str] = self.legacy.get("architectures", [self.architecture])
        return names[0]


def _kimi(stored: Stored) -> Stored:
    return {
        name.replace("language_model.model.blocks.", "language_model.model.layers."): t
        for name, t in stored.items()
    }


def _transposed(stored: Stored) -> Stored:
    return {name: t.mT.contiguous() if ".experts." in name else t for name, t in stored.items()}


CASES = (
    Composite("AyaVision", "cohere2", GROUPED | LOCAL | {"logit_scale": 1.0}),
    Composite("Cohere2Vision", "cohere2", GROUPED | LOCAL | {"logit_scale": 1.0}),
    Composite("DeepseekOcr2", "deepseek_ocr2_text", OCR),
    Composite("DeepseekOcr2", "deepseek_ocr2_text", OCR, is_flat=True, legacy=OCR_1, id="DeepseekOCR"),
    Composite("Emu3", "emu3_text_model", GROUPED, {"vocabulary_map": {"<image>": 1}, "vq_config": SMALL_VQ}),
    Composite("Exaone4_5_", "exaone4", BASE | LOCAL),
    Composite("Fuyu", "persimmon", PLAIN | theta(500.0, partial_rotary_factor=0.5), model="ForCausalLM"),
    Composite(
        "Gemma3",
        "gemma3_text",
        BASE | LOCAL | MIXED | {"query_pre_attn_scalar": 24, "rope_parameters": PER_TYPE},
    ),
    Composite("Gemma3n", "gemma3n_text", GEMMA3N, tower=Eyes),
    Composite("Gemma4", "gemma4_text", GEMMA4 | SHARING),
    Composite("Gemma4", "gemma4_text", GEMMA4 | GEMMA4_EXPERTS, id="Gemma4-experts"),
    Composite("Gemma4Unified", "gemma4_unified_text", UNIFIED),
    Composite(
        "Glm4v", "glm4v_text", GROUPED | {"rope_parameters": SECTIONS | {"partial_rotary_factor": 0.5}}
    ),
    Composite(
        "Glm4vMoe", "glm4v_moe_text", BASE | GROUPS | {"attention_bias": True, "rope_parameters": HALF}
    ),
    Composite("GotOcr2", "qwen2", GROUPED),
    Composite("Idefics3", "llama", BASE),
    Composite("InternVL", "qwen3", BASE),
    Composite(
        "Kimi_K25", "deepseek_v3", PLAIN | GROUPS | LATENT | ONE_GROUP, {"tie_word_embeddings": False}, _kimi
    ),
    Composite("Lfm2Vl", "lfm2", GROUPED | {"layer_types": ["conv", "full_attention"] * 2}),
    Composite("Llama4", "llama4_text", BASE | LLAMA4),
    Composite("Llava", "llama", BASE),
    Composite("LlavaNext", "mistral", BASE | LOCAL),
    Composite("LlavaOnevision", "qwen2", GROUPED, {"tie_word_embeddings": True}),
    Composite("Mistral3", "mistral", BASE, {"tie_word_embeddings": False}),
    Composite("Mistral3", "ministral3", BASE, id="Mistral3-ministral"),
    Composite("Ovis2", "qwen2", GROUPED),
    Composite("PaliGemma", "gemma", BASE),
    Composite("PaliGemma", "gemma2", BASE | LOCAL | {"attn_logit_softcapping": 0.5}, id="PaliGemma2"),
    Composite("Qwen2Audio", "qwen2", GROUPED),
    Composite(
        "Qwen2VL", "qwen2_vl_text", GROUPED | {"rope_parameters": SECTIONS | {"mrope_section": [4, 6, 6]}}
    ),
    Composite(
        "Qwen2_5_VL",
        "qwen2_5_vl_text",
        GROUPED | {"rope_parameters": SECTIONS | {"mrope_section": [4, 6, 6]}},
    ),
    Composite(
        "Qwen2_5_VL",
        "qwen2_5_vl_text",
        GROUPED | {"rope_parameters": SECTIONS | {"mrope_section": [4, 6, 6]}},
        {"tie_word_embeddings": True},
        is_flat=True,
        id="Qwen2_5_VL-flat",
    ),
    Composite("Qwen3VL", "qwen3_vl_text", BASE | {"rope_parameters": SECTIONS | {"mrope_interleaved": True}}),
    Composite(
        "Qwen3VLMoe",
        "qwen3_vl_moe_text",
        BASE | EXPERTS | {"rope_parameters": SECTIONS},
        published=_transposed,
    ),
    Composite("Qwen3_5", "qwen3_5_text", BASE | DELTA | theta(500.0, partial_rotary_factor=0.5)),
    Composite("Qwen3_5Moe", "qwen3_5_moe_text", BASE | DELTA | SHARED_EXPERT),
    Composite("SmolVLM", "llama", BASE),
)


def _small(config: Mapping[str, Any]) -> dict[str, Any]:
    """What sees or hears, and networks within it, without what would follow from their sizes."""
    return {
        key: _small(value) if isinstance(value, dict) else SMALL.get(key, value)
        for key, value in config.items()
        if key != "layer_types"
    }


def config_of(case: Composite) -> Any:
    kind = getattr(transformers, case.config_class)
    usual = kind().to_dict()
    others = {
        key: _small(inner)
        for key, inner in usual.items()
        if key in ("vision_config", "audio_config") and isinstance(inner, dict)
    }
    text = {"model_type": case.kind, **case.text}
    config = kind(text_config=text, **others, **case.whole)
    if case.tower is not None:
        config.vision_config = case.tower(**others["vision_config"])
    config._attn_implementation = "eager"
    return config


def build(case: Composite, folder: Path) -> torch.nn.Module:
    """Hugging Face's model: random, float32, eager; saved into `folder` as such models are published."""
    skip_unlike(case.id)
    torch.manual_seed(0)
    model = getattr(transformers, case.architecture)(config_of(case)).eval().float()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                is_norm = name.endswith("weight") and tensor.ndim == 1
                tensor.normal_(mean=0.5 if is_norm else 0.0, std=0.3)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(case.published(load_file(file)), file)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if case.is_flat:
        config = {**config.pop("text_config"), **config}
    path.write_text(json.dumps(config | dict(case.legacy)))
    return model
