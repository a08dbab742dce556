"""Networks in words: what `quire inspect MODEL` and `quire inspect A B` print. Prints nothing itself."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from itertools import groupby, pairwise
from typing import Any

from quire.models.names import Names
from quire.models.parameters import kv_bytes_per_token, num_parameters
from quire.models.spec import Block, Decoder

MAX_ITEMS = 4  # of a long sequence of numbers
PARTS = ("attn_norm", "mixer", "attn_post_norm", "mlp_norm", "mlp", "mlp_post_norm", "altup", "embedding")


def describe(spec: Decoder, names: Names | None = None) -> str:
    """The network in a dozen lines: equal layers once, fields with their default value left out."""
    count = num_parameters(spec)
    active = "" if count.active == count.total else f", {_short(count.active)} active"
    cache = kv_bytes_per_token(spec)
    lines = [
        f"{_short(count.total)} parameters{active}; {cache / 1024:g} KiB of 16-bit cache per token",
        _compact(spec, leave_out=("blocks",)),
    ]
    for block, layers in _equal_layers(spec.blocks):
        lines.append(f"layers {_ranges(layers)}" + "".join(f", {word}" for word in _shape_words(block)))
        parts = dict(_fields(block))
        lines += [f"  {name:14} {_compact(parts[name])}" for name in PARTS if parts[name] is not None]
    return "\n".join(lines + (_name_lines(names) if names else []))


def difference(a: Decoder, b: Decoder) -> list[str]:
    """One line per field in which two networks differ, equal differences of several layers in one."""
    lines = [f"{path}: {old} -> {new}" for path, old, new in _changes("", a, b) if path != "blocks"]
    layers: dict[tuple[str, str, str], list[int]] = {}
    for i, (old_block, new_block) in enumerate(zip(a.blocks, b.blocks, strict=False)):
        for change in _changes("", old_block, new_block):
            layers.setdefault(change, []).append(i)
    lines += [f"layers {_ranges(where)} {path}: {old} -> {new}" for (path, old, new), where in layers.items()]
    if len(a.blocks) != len(b.blocks):
        lines.append(f"layers: {len(a.blocks)} -> {len(b.blocks)}")
    return lines


def _changes(path: str, a: object, b: object) -> Iterator[tuple[str, str, str]]:
    if a == b:
        return
    if type(a) is type(b) and is_dataclass(a):
        for (name, old), (_, new) in zip(_fields(a), _fields(b), strict=True):
            yield from _changes(f"{path}.{name}".lstrip("."), old, new)
    else:
        yield path, _compact(a), _compact(b)


def _equal_layers(blocks: tuple[Block, ...]) -> list[tuple[Block, list[int]]]:
    found: list[tuple[Block, list[int]]] = []
    for i, block in enumerate(blocks):
        same = next((layers for other, layers in found if other == block), None)
        if same is None:
            found.append((block, [i]))
        else:
            same.append(i)
    return found


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2 5", and [0, 2, 4, 6] as "0-6 by 2"."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) == 1 and len(numbers) > 2 and (step := steps.pop()) > 1:
        return f"{numbers[0]}-{numbers[-1]} by {step}"
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _shape_words(block: Block) -> Iterator[str]:
    if block.parallel:
        yield "parallel"
    if block.normed_residual is not None:
        yield f"normed_residual={_compact(block.normed_residual)}"
    if block.scalar:
        yield "scalar"
    if block.residual_scale != 1:
        yield f"residual_scale={block.residual_scale:g}"


def _fields(part: object) -> Iterator[tuple[str, Any]]:
    if is_dataclass(part):
        yield from ((field.name, vars(part)[field.name]) for field in fields(part))


def _compact(value: object, leave_out: tuple[str, ...] = ()) -> str:
    if is_dataclass(value):
        defaults = {field.name: field.default for field in fields(value)}
        shown = [
            f"{name}={_compact(item)}"
            for name, item in _fields(value)
            if name not in leave_out and not _is_off(item, defaults[name])
        ]
        return f"{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}={_compact(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        more = f", ... {len(value)} in all" if len(value) > MAX_ITEMS else ""
        return "(" + ", ".join(_compact(item) for item in value[:MAX_ITEMS]) + more + ")"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _is_off(value: object, default: object) -> bool:
    """Defaults say nothing, except numbers that mean something, such as an eps."""
    means_something = isinstance(value, float) and value not in (0, 1)
    return default is not MISSING and value == default and not means_something


def _name_lines(names: Names) -> list[str]:
    lines = [
        f"stored as {fused} = {' + '.join(split.parts)}"
        + (f", in {split.per_group} groups" if split.per_group > 1 else "")
        for fused, split in names.splits.items()
    ]
    lines += [f"stored as a stack: {one}" for _, one in names.stacked]
    if names.transposed:
        lines.append(f"stored transposed: {', '.join(names.transposed)}")
    if names.ignored:
        lines.append(f"not loaded: {', '.join(names.ignored)}")
    return lines


def _short(count: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
