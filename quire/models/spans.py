"""Spans of a prompt whose positions see each other, later ones too: by config.json, whoever computes the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from quire.models.hf import HF

GEMMA3_IMAGE, GEMMA4_IMAGE, GEMMA4_VIDEO = 262_144, 258_880, 258_884
SPANNED = frozenset(  # composites whose layers may have some
    f"{name}ForConditionalGeneration" for name in ("Gemma3", "Gemma4", "Gemma4Unified", "PaliGemma")
)
GEMMA4: Mapping[str, str | None] = {  # how tokens of images see each other, where config.json does not say
    "Gemma4ForConditionalGeneration": None,
    "Gemma4UnifiedForConditionalGeneration": "vision",
}


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Positions of a prompt that see each other, later ones too."""

    tokens: tuple[int, ...] | None  # each run of these; None: the whole prompt
    wide: bool = False  # they do so beyond a layer's window


def spans_of(c: HF, local: bool = True) -> Spans | None:
    """What a layer has, which is `local` or sees all positions; None: every position sees those before it only."""
    name = c.architecture
    if name == "PaliGemmaForConditionalGeneration":
        return Spans(tokens=None, wide=True)
    if name == "HrmTextForCausalLM":
        return Spans(tokens=None) if c.get("prefix_lm", True) else None
    if name == "Gemma3ForConditionalGeneration":
        return Spans(tokens=(c.get("image_token_id", c.get("image_token_index", GEMMA3_IMAGE)),))
    if name in GEMMA4 and local and c.get("use_bidirectional_attention", GEMMA4[name]) == "vision":
        image, video = c.get("image_token_id", GEMMA4_IMAGE), c.get("video_token_id", GEMMA4_VIDEO)
        return Spans(tokens=(image, video))
    return None


def find_spans(rule: Spans | None, prompt: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """From and up to which position each goes, in order. One position sees itself anyway."""
    if rule is None or len(prompt) < 2:
        return ()
    if rule.tokens is None:
        return ((0, len(prompt)),)
    found: list[tuple[int, int]] = []
    if any(token in prompt for token in rule.tokens):
        tokens = frozenset(rule.tokens)
        for is_one, run in groupby(range(len(prompt)), lambda p: prompt[p] in tokens):
            first, *rest = run
            if is_one and rest:
                found.append((first, rest[-1] + 1))
    return tuple(found)
