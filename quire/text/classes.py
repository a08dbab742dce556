"""What transformers' tokenizer classes change about a tokenizer.json, so that both give the same ids.

Follows transformers 5: the post-processor of tokenizer.json decides about BOS and EOS (`add_bos_token` and
`add_eos_token` of tokenizer_config.json count only where there is no tokenizer.json).
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

# classes whose names for the special tokens are not always written down
_SAME = "<|endoftext|>"
DEFAULT_TOKENS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": {"bos_token": _SAME, "eos_token": _SAME, "unk_token": _SAME},
    "GPTNeoXTokenizer": {"bos_token": _SAME, "eos_token": _SAME, "unk_token": _SAME},
    "Qwen2Tokenizer": {"eos_token": _SAME, "unk_token": _SAME, "pad_token": _SAME},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    },
    "BertTokenizer": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
}
CLASS_OF_MODEL: Mapping[str, str] = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt"), "GPT2Tokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
    "bert": "BertTokenizer",
}
# models whose checkpoints say LlamaTokenizer and mean their tokenizer.json
# fmt: off
JSON_RULES = frozenset((
    "glm", "glm4", "glm4_moe", "granite", "granitemoe", "granitemoehybrid", "internlm2", "internlm3",
    "jamba", "kimi_linear", "llava", "llava_next", "minicpm3", "minicpmv", "minimax_m2", "ministral",
    "ministral3", "mistral", "mistral3", "mixtral", "nemotron", "olmo2", "olmo3", "persimmon", "phi3",
    "phi3_v", "phimoe", "pixtral", "stablelm", "voxtral",
))
# fmt: on


def tokenizer_class(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """The class's name without "Fast"; "" if nothing names it."""
    name = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    name = name or CLASS_OF_MODEL.get(str(model_config.get("model_type")), "")
    return str(name).removesuffix("Fast")


def state(part: object) -> str:
    """A component of a tokenizer as the JSON that tokenizer.json holds; "" for none."""
    if isinstance(part, decoders.Decoder | pre_tokenizers.PreTokenizer | normalizers.Normalizer):
        text: bytes = part.__getstate__()
        return text.decode("utf-8")
    return ""


def adjust(backend: Tokenizer, name: str, config: Mapping[str, Any], model_type: str) -> None:
    """Applies what class `name` builds from tokenizer_config.json instead of reading tokenizer.json."""
    if name == "LlamaTokenizer" and model_type not in JSON_RULES:
        _llama(backend, config)
    elif name == "BertTokenizer":
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            strip_accents=config.get("strip_accents"),
            lowercase=config.get("do_lower_case", True),
        )
    elif name in ("GPT2Tokenizer", "RobertaTokenizer") and "add_prefix_space" in config:
        rule = json.loads(state(backend.pre_tokenizer) or "{}")
        if rule.get("type") == "ByteLevel":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(
                add_prefix_space=bool(config["add_prefix_space"]), use_regex=rule.get("use_regex", True)
            )


def _llama(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    """`legacy` puts a space before each stretch of text between special tokens, otherwise only the first."""
    if "ByteLevel" in state(backend.pre_tokenizer) + state(backend.decoder):
        return  # Llama 3 and its kin
    spaced = config.get("add_prefix_space")
    spaced = True if spaced is None else bool(spaced)
    scheme = ("always" if config.get("legacy", False) else "first") if spaced else "never"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if spaced else steps)
