"""How checkpoints spell our parameter names. Knows patterns and row counts; no files, no tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Split:
    """A fused tensor to cut apart along its output rows: `parts` gives names and rows, in order.

    With `per_group` groups the parts repeat in each: GPT-NeoX stores q, k and v of head 0, then of head 1...
    """

    parts: Mapping[str, int]
    per_group: int = 1

    def segments(self, part: str, start: int, stop: int) -> list[slice]:
        """Where rows [start, stop) of a part lie in the fused tensor, in order, in as few slices as that takes."""
        before = 0
        for name, rows in self.parts.items():
            if name == part:
                break
            before += rows // self.per_group
        step = self.parts[part] // self.per_group
        period = sum(self.parts.values()) // self.per_group
        found: list[slice] = []
        if step == 1 and period > 1 and start < stop:  # row by row: GPT-OSS's gates and ups
            return [slice(start * period + before, (stop - 1) * period + before + 1, period)]
        while start < stop:
            group, inside = divmod(start, step)
            taken = min(step - inside, stop - start)
            at = group * period + before + inside
            if found and found[-1].stop == at:
                found[-1] = slice(found[-1].start, at + taken)
            else:
                found.append(slice(at, at + taken))
            start += taken
        return found


@dataclass(frozen=True, kw_only=True)
class Names:
    """Regular expressions from a checkpoint's names to ours, applied in order, and cuts of fused tensors."""

    renames: tuple[tuple[str, str], ...] = ()
    splits: Mapping[str, Split] = field(default_factory=dict)  # by the fused module's name
    # Patterns of our names of matrices that are stored (in, out), because GPT-2 computes x @ w.
    transposed: tuple[str, ...] = ()
    # Patterns of our names that a checkpoint may hold and the network does not use.
    ignored: tuple[str, ...] = ()
    # Patterns of tensors that hold several, and one's name: {} counts.
    stacked: tuple[tuple[str, str], ...] = ()

    def ours(self, theirs: str) -> str:
        """Our name of a checkpoint's tensor; a fused one keeps its module's name."""
        for pattern, to in self.renames:
            theirs = re.sub(pattern, to, theirs)
        return theirs

    def in_stack(self, ours: str, count: int) -> list[str] | None:
        """Our names of the `count` tensors that one holds along its first dimension; None if it is a single one."""
        for pattern, one in self.stacked:
            if re.search(pattern, ours):
                return [re.sub(pattern, one, ours).format(i) for i in range(count)]
        return None

    def is_transposed(self, ours: str) -> bool:
        return any(re.search(pattern, ours) for pattern in self.transposed)

    def is_ignored(self, ours: str) -> bool:
        return any(re.search(pattern, ours) for pattern in self.ignored)


LLAMA = (
    (r"^model\.", ""),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
    (r"\.self_attn\.", ".mixer."),
)
SHARED_HEAD = r"^lm_head\.weight$"  # which some checkpoints store although it is the embedding
CORRECTION = (r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias")
STACKED = ((r"\.experts\.(gate_up_proj|down_proj)$", r".experts.{}.\1.weight"),)  # experts of a layer
SANDWICH = (
    (r"^model\.", ""),
    (r"\.self_attn\.", ".mixer."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".attn_post_norm."),
    (r"\.pre_feedforward_layernorm\.", ".mlp_norm."),
    (r"\.post_feedforward_layernorm\.", ".mlp_post_norm."),
)
