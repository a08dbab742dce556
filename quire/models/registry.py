"""Which function describes which architecture. A family's module is imported when one of its models is."""

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from quire.errors import ModelError, UnsupportedModel
from quire.log import logger
from quire.models.composite import COMPOSITES, text_part
from quire.models.foreign import generating
from quire.models.hf import HF
from quire.models.names import SHARED_HEAD, Names
from quire.models.spec import Decoder

FAMILIES: Mapping[str, str] = {  # architecture -> module.function
    "AfmoeForCausalLM": "trinity.afmoe",
    "ApertusForCausalLM": "llama.apertus",
    "AquilaForCausalLM": "llama.llama",
    "ArceeForCausalLM": "llama.arcee",
    "BailingHybridForCausalLM": "kimi.bailing_hybrid",
    "BailingMoeForCausalLM": "bailing.bailing_moe",
    "BailingMoeLinearV2ForCausalLM": "bailing.bailing_moe_linear_v2",
    "BailingMoeV2ForCausalLM": "bailing.bailing_moe_v2",
    "BambaForCausalLM": "mamba.bamba",
    "BioGptForCausalLM": "opt.biogpt",
    "BloomForCausalLM": "bloom.bloom",
    "CTRLLMHeadModel": "opt.ctrl",
    "ChatGLMForConditionalGeneration": "respelled.chatglm",
    "ChatGLMModel": "respelled.chatglm",
    "CodeGenForCausalLM": "gpt.codegen",
    "Cohere2ForCausalLM": "cohere.cohere2",
    "Cohere2MoeForCausalLM": "cohere.cohere2_moe",
    "CohereForCausalLM": "cohere.cohere",
    "CwmForCausalLM": "llama.cwm",
    "DeepseekForCausalLM": "deepseek.deepseek",
    "DeepseekV2ForCausalLM": "deepseek.deepseek_v2",
    "DeepseekV32ForCausalLM": "deepseek.deepseek_v32",
    "DeepseekV3ForCausalLM": "deepseek.deepseek_v3",
    "Dots1ForCausalLM": "deepseek.dots1",
    "Emu3ForCausalLM": "llama.emu3",
    "Ernie4_5ForCausalLM": "llama.ernie",
    "Ernie4_5_MoeForCausalLM": "ernie.ernie_moe",
    "Exaone4ForCausalLM": "olmo.exaone4",
    "ExaoneForCausalLM": "respelled.exaone",
    "ExaoneMoeForCausalLM": "olmo.exaone_moe",
    "FalconForCausalLM": "falcon.falcon",
    "FalconH1ForCausalLM": "falcon_h1.falcon_h1",
    "FalconMambaForCausalLM": "mamba.falcon_mamba",
    "FlexOlmoForCausalLM": "olmo.flex_olmo",
    "FlintForCausalLM": "qwen.flint",
    "GPT2LMHeadModel": "gpt.gpt2",
    "GPTBigCodeForCausalLM": "gpt.gpt_bigcode",
    "GPTJForCausalLM": "gpt.gptj",
    "GPTNeoForCausalLM": "gpt.gpt_neo",
    "GPTNeoXForCausalLM": "gpt.gpt_neox",
    "GPTNeoXJapaneseForCausalLM": "gpt.gpt_neox_japanese",
    "Gemma2ForCausalLM": "gemma.gemma2",
    "Gemma3ForCausalLM": "gemma.gemma3",
    "Gemma3nForCausalLM": "gemma3n.gemma3n",
    "Gemma4ForCausalLM": "gemma4.gemma4",
    "GemmaForCausalLM": "gemma.gemma",
    "Glm4ForCausalLM": "glm.glm4",
    "Glm4MoeForCausalLM": "glm.glm4_moe",
    "Glm4MoeLiteForCausalLM": "glm.glm4_moe_lite",
    "GlmForCausalLM": "glm.glm",
    "GlmMoeDsaForCausalLM": "glm.glm_moe_dsa",
    "GptOssForCausalLM": "gpt_oss.gpt_oss",
    "GraniteForCausalLM": "granite.granite",
    "GraniteMoeForCausalLM": "granite.granite_moe",
    "GraniteMoeHybridForCausalLM": "granite.granite_moe_hybrid",
    "GraniteMoeSWAForCausalLM": "granite.granite_moe_swa",
    "GraniteMoeSharedForCausalLM": "granite.granite_moe",
    "GraniteSWAForCausalLM": "granite.granite_swa",
    "HYV3ForCausalLM": "hunyuan.hy_v3",
    "HeliumForCausalLM": "llama.helium",
    "HunYuanDenseV1ForCausalLM": "llama.hunyuan",
    "HunYuanMoEV1ForCausalLM": "hunyuan.hunyuan_moe",
    "HyperCLOVAXForCausalLM": "granite.hyperclovax",
    "IQuestCoderForCausalLM": "llama.iquest_coder",
    "InternLM2ForCausalLM": "respelled.internlm2",
    "InternLM3ForCausalLM": "llama.internlm3",
    "InternLMForCausalLM": "llama.internlm",
    "Jais2ForCausalLM": "llama.jais2",
    "JambaForCausalLM": "mamba.jamba",
    "KimiK2ForCausalLM": "deepseek.deepseek_v3",
    "KimiLinearForCausalLM": "kimi.kimi_linear",
    "Kolibri1ForCausalLM": "olmo.kolibri1",
    "LagunaForCausalLM": "trinity.laguna",
    "Lfm2ForCausalLM": "lfm.lfm2",
    "Lfm2MoeForCausalLM": "lfm.lfm2_moe",
    "Lfm3ForCausalLM": "lfm.lfm3",
    "Llama4ForCausalLM": "llama4.llama4",
    "LlamaForCausalLM": "llama.llama",
    "MPTForCausalLM": "bloom.mpt",
    "Mamba2ForCausalLM": "mamba.mamba2",
    "MambaForCausalLM": "mamba.mamba",
    "MellumForCausalLM": "qwen.mellum",
    "MiMoForCausalLM": "qwen.mimo",
    "MiMoV2FlashForCausalLM": "mimo.mimo_v2",
    "MiniCPM3ForCausalLM": "deepseek.minicpm3",
    "MiniMaxForCausalLM": "mixtral.minimax",
    "MiniMaxM1ForCausalLM": "mixtral.minimax_text_01",
    "MiniMaxM2ForCausalLM": "mixtral.minimax_m2",
    "MiniMaxText01ForCausalLM": "mixtral.minimax_text_01",
    "Ministral3ForCausalLM": "llama.ministral3",
    "MinistralForCausalLM": "llama.ministral",
    "Mistral4ForCausalLM": "deepseek.mistral4",
    "MistralForCausalLM": "llama.mistral",
    "MixtralForCausalLM": "mixtral.mixtral",
    "MptForCausalLM": "bloom.mpt",
    "NanoChatForCausalLM": "llama.nanochat",
    "NemotronForCausalLM": "nemotron.nemotron",
    "NemotronHForCausalLM": "nemotron.nemotron_h",
    "OPTForCausalLM": "opt.opt",
    "Olmo2ForCausalLM": "olmo.olmo2",
    "Olmo3ForCausalLM": "olmo.olmo3",
    "OlmoForCausalLM": "olmo.olmo",
    "OlmoHybridForCausalLM": "olmo.olmo_hybrid",
    "OlmoeForCausalLM": "olmo.olmoe",
    "OrionForCausalLM": "respelled.orion",
    "PersimmonForCausalLM": "gpt.persimmon",
    "Phi3ForCausalLM": "phi.phi3",
    "PhiForCausalLM": "phi.phi",
    "PhiMoEForCausalLM": "mixtral.phi_moe",
    "PhimoeForCausalLM": "mixtral.phi_moe",
    "Qwen2ForCausalLM": "qwen.qwen2",
    "Qwen2MoeForCausalLM": "qwen.qwen2_moe",
    "Qwen3NextForCausalLM": "qwen.qwen3_next",
    "Qwen3_5ForCausalLM": "qwen.qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen.qwen3_5_moe",
    "Qwen3ForCausalLM": "qwen.qwen3",
    "Qwen3MoeForCausalLM": "qwen.qwen3_moe",
    "RecurrentGemmaForCausalLM": "griffin.recurrent_gemma",
    "SeedOssForCausalLM": "llama.seed_oss",
    "SmolLM3ForCausalLM": "llama.smollm3",
    "SolarOpenForCausalLM": "glm.solar_open",
    "StableLmForCausalLM": "stablelm.stablelm",
    "Starcoder2ForCausalLM": "starcoder.starcoder2",
    "Step3p5ForCausalLM": "step.step3p5",
    "Step3TextForCausalLM": "step.step3",
    "Step3VLForConditionalGeneration": "step.step3",
    "VaultGemmaForCausalLM": "gemma.vault_gemma",
    "XGLMForCausalLM": "opt.xglm",
    "XverseForCausalLM": "llama.llama",
    "YoutuForCausalLM": "deepseek.youtu",
    "Zamba2ForCausalLM": "zamba.zamba2",
    "ZambaForCausalLM": "zamba.zamba",
}
NATIVE, TRANSFORMERS = "native", "transformers"
Family = Callable[[HF], tuple[Decoder, Names]]


def families() -> list[str]:
    """Every architecture there is, by Hugging Face's class name."""
    return sorted(FAMILIES)


def family(architecture: str) -> Family:
    """The function that describes an architecture.

    Raises:
        UnsupportedModel: there is none; the message lists the closest names.
    """
    if "Eagle3" in architecture:  # no full network, so a close name would not help
        raise UnsupportedModel(
            f"{architecture} is a draft head: it proposes tokens to the model that it was trained for, in "
            "speculative decoding, and generates nothing alone. Load that model instead"
        )
    if architecture not in FAMILIES:
        close = difflib.get_close_matches(architecture, FAMILIES, n=3, cutoff=0.6)
        hint = f" The closest are {', '.join(close)}." if close else ""
        if architecture in generating():
            raise UnsupportedModel(
                f"no family describes {architecture}, so it is not native.{hint} Transformers has it: leave out"
                " --model-impl, or set it to transformers"
            )
        raise UnsupportedModel(
            f"{architecture} takes neither road: no family describes it (native), and the installed Transformers has no"
            f" class of this name that generates text (transformers).{hint} If the model computes the same as one of"
            f" the {len(FAMILIES)} that are described (`quire models` lists them), write that name into architectures"
            " in its config.json; otherwise it needs a function in quire/models, or a newer Transformers. Code that"
            " comes with a checkpoint is never run"
        )
    return _function(FAMILIES[architecture])


def _function(path: str) -> Family:
    module, name = path.split(".")
    found: Family = getattr(importlib.import_module(f"quire.models.{module}"), name)
    return found


def is_native(architecture: str) -> bool:
    """Whether a family describes it, or the part of it that computes text."""
    return architecture in FAMILIES or architecture in COMPOSITES


def road(config: Mapping[str, object], wanted: str = "auto") -> str:
    """native or transformers: by what a network's config.json says, and the option model_impl.

    Raises:
        UnsupportedModel: neither can be taken, or not the wanted one.
    """
    architecture = HF(config).architecture
    native = is_native(architecture)
    if wanted == "auto":
        wanted = TRANSFORMERS if not native and architecture in generating() else NATIVE
    if not native and (wanted == NATIVE or architecture not in generating()):
        family(architecture)  # which says why not
    if wanted == TRANSFORMERS and architecture not in generating():
        raise UnsupportedModel(
            f"model_impl is transformers, and the installed Transformers has no {architecture} that generates text."
            " It is native: leave out --model-impl"
        )
    refuse_quantized(HF(config))
    return wanted


def refuse_quantized(c: HF) -> None:
    """Raise UnsupportedModel if the checkpoint's weights are in a format that nobody reads yet."""
    if quantization := c.quantization_config:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModel(
            f"{c.architecture}: quantization_config with quant_method={method!r} in config.json is not "
            "supported; use the model's bfloat16 or float16 checkpoint"
        )


def decoder_spec(config: Mapping[str, object]) -> tuple[Decoder, Names]:
    """The network that a config.json describes, and how its checkpoint spells the parameters.

    Warns once about keys that the family does not read and that might mean something.

    Raises:
        UnsupportedModel: nobody knows the architecture, or it asks for something its family cannot honour.
        ModelError: a required key is missing or wrong.
    """
    part = text_part(config)
    c = HF(config if part is None else part.config)
    describe = family(c.architecture) if part is None else _function(part.family)
    refuse_quantized(c)
    try:
        spec, names = describe(c)
    except UnsupportedModel as error:
        if part is not None or c.architecture not in generating():
            raise
        raise UnsupportedModel(
            f"{error}. Transformers' modules may compute it: --model-impl transformers"
        ) from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"config.json: {c.architecture} cannot be described: {error}") from error
    if ignored := ", ".join(f"{key}={value!r:.60}" for key, value in c.unread()):
        logger.warning("config.json: %s does not know %s; ignored", c.architecture, ignored)
    if spec.tied:
        names = replace(names, ignored=(*names.ignored, SHARED_HEAD))
    return spec, names if part is None else part.names(names)
