"""A checkpoint read by our names: layers pull what they own, and only the rows they own.

Knows files, spellings and fused tensors; nothing of devices, parallelism or what a tensor is for.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quire.checkpoint.files import read_header, weight_files
from quire.errors import CheckpointError
from quire.models.names import Names, Split

# Constants that older checkpoints saved along with the weights, by the checkpoint's own names.
EXTRAS = re.compile(
    r"\.rotary_emb\.inv_freq$"
    r"|\.attn\.(masked_)?bias$"  # GPT-2 and GPT-J: the causal mask
    r"|\.attention\.(masked_)?bias$"  # GPT-NeoX
)
MAX_CANDIDATES = 2000  # names searched for a close match
NUM_SHOWN = 5
MAPPED_BYTES = 64 * 2**20  # read through one mapping of a file: its pages are this process's until it is gone


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one of our tensors lies, and its shape; with `split`, rows of `part` in a fused tensor.

    With `item`, all that is in that item of a stack.
    """

    file: Path
    theirs: str
    shape: tuple[int, ...]
    split: Split | None = None
    part: str = ""
    transposed: bool = False
    item: int | None = None


class Checkpoint:
    """The safetensors files of a folder as a mapping from our names to tensors, read lazily.

    Raises:
        CheckpointError: no weights, damaged files, or a tensor found twice.
    """

    def __init__(self, folder: Path, names: Names):
        self.folder = folder
        self._index: dict[str, Entry] = {}
        self._used: set[str] = set()
        self._open_files: dict[Path, Any] = {}
        self._mapped: dict[Path, int] = {}  # bytes read since a file was opened
        for file in weight_files(folder):
            for theirs, stored in read_header(file).items():
                if EXTRAS.search(theirs):
                    continue
                ours = names.ours(theirs)
                if not names.is_ignored(ours):
                    self._add_all(ours, Entry(file, theirs, stored.shape), names)

    def _add_all(self, ours: str, entry: Entry, names: Names) -> None:
        stack = names.in_stack(ours, sum(entry.shape[:1]))
        if stack is None:
            self._add(ours, entry, names)
            return
        for i, name in enumerate(stack):
            self._add(name, replace(entry, shape=entry.shape[1:], item=i), names)

    def _add(self, ours: str, entry: Entry, names: Names) -> None:
        module = ours.rsplit(".", 2)[-2] if ours.count(".") > 1 else ""
        shape, transposed = entry.shape, names.is_transposed(ours) and len(entry.shape) == 2
        if transposed:
            shape = shape[::-1]
        split = names.splits.get(module)
        if split is None:
            self._put(ours, replace(entry, shape=shape, transposed=transposed))
            return
        if not shape or shape[0] != sum(split.parts.values()):
            raise CheckpointError(
                f"{entry.file}: {entry.theirs} has shape {shape}; the config asks for "
                f"{sum(split.parts.values())} rows ({', '.join(f'{k} {v}' for k, v in split.parts.items())})"
            )
        for part, rows in split.parts.items():
            name = ours.replace(f".{module}.", f".{part}.")
            inside = replace(entry, shape=(rows, *shape[1:]), split=split, part=part, transposed=transposed)
            self._put(name, inside)

    def _put(self, name: str, entry: Entry) -> None:
        if other := self._index.get(name):
            raise CheckpointError(
                f"{self.folder}: {name} is there twice, as {other.theirs} in {other.file.name} "
                f"and as {entry.theirs} in {entry.file.name}"
            )
        self._index[name] = entry

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> torch.Tensor:
        """One of our tensors, or its `rows` (a contiguous range of the first dimension), as stored.

        The result may be a view of the memory-mapped file, and strided: copy it, do not change it.

        Args:
            shape: what the whole tensor must have; checked before anything is read.

        Raises:
            CheckpointError: missing, of another shape, or unreadable.
        """
        entry = self._index.get(name)
        if entry is None:
            raise CheckpointError(self._explain_missing(name))
        if entry.shape != tuple(shape):
            raise CheckpointError(
                f"{entry.file}: {entry.theirs} gives {name} the shape {entry.shape}; "
                f"the config asks for {tuple(shape)}"
            )
        self._used.add(name)
        try:
            found = _read(self._open(entry.file), entry, rows)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry.file}: {entry.theirs} cannot be read: {error}") from error
        self._mapped[entry.file] += found.nbytes
        return found

    def _open(self, file: Path) -> Any:
        if self._mapped.get(file, 0) > MAPPED_BYTES:
            del self._open_files[file]  # its mapping is gone with the last tensor of it
        if file not in self._open_files:
            self._open_files[file], self._mapped[file] = safe_open(file, "pt"), 0
        return self._open_files[file]

    def check(self, expected: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Compare headers with what a network needs, before anything is read.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape; names all kinds at once.
        """
        wanted = dict(expected)
        missing = sorted(wanted.keys() - self._index.keys())
        extra = sorted(self._index[name].theirs for name in self._index.keys() - wanted.keys())
        wrong = [
            f"{name} is {self._index[name].shape} instead of {shape}"
            for name, shape in wanted.items()
            if name in self._index and self._index[name].shape != shape
        ]
        if missing or extra or wrong:
            lists = (("missing", missing), ("not in the network", extra), ("of another shape", wrong))
            found = "; ".join(f"{len(names)} {kind}: {_shown(names)}" for kind, names in lists if names)
            raise CheckpointError(
                f"{self.folder} does not fit its config.json: {found}. Is config.json from the same model?"
            )

    def unused(self) -> list[str]:
        """Our names of the tensors that nobody has pulled."""
        return sorted(self._index.keys() - self._used)

    def finish(self, elsewhere: Iterable[str] = ()) -> None:
        """Declare loading over. `elsewhere`: what other processes load.

        Raises:
            CheckpointError: tensors are left over, so the network is not the one that was trained.
        """
        if left := sorted(set(self.unused()).difference(elsewhere)):
            places = [
                f"{name} ({self._index[name].theirs} in {self._index[name].file.name})" for name in left
            ]
            raise CheckpointError(
                f"{self.folder}: {len(left)} tensors belong to no layer of the network: {_shown(places)}"
            )

    def _explain_missing(self, name: str) -> str:
        message = f"{self.folder} has no tensor for {name}"
        if likely := self._likely_spelling(name):
            message += f", which it would call {likely}"
        head = name.rsplit(".", 1)[0].rsplit(".", 1)[0]
        near = [other for other in self._index if other.startswith(head)] or list(self._index)
        close = difflib.get_close_matches(name, near[:MAX_CANDIDATES], n=3)
        return f"{message}; closest: {', '.join(close)}" if close else message

    def _likely_spelling(self, name: str) -> str | None:
        """How a tensor that differs only in its numbers is spelled, with this one's numbers."""
        numbers, pattern = re.findall(r"\d+", name), re.sub(r"\d+", "#", name)
        for other, entry in self._index.items():
            words = re.split(r"\d+", entry.theirs)
            if len(words) == len(numbers) + 1 and re.sub(r"\d+", "#", other) == pattern:
                return "".join(map("".join, zip(words, [*numbers, ""], strict=True)))
        return None


def stored_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder by the checkpoint's own names, for a loader of others': `[...]` reads one.

    Raises:
        CheckpointError: no weights, damaged files, or a tensor found twice.
    """
    found: dict[str, Any] = {}
    for file in weight_files(folder):
        stored = safe_open(file, "pt")
        for name in read_header(file):
            if name in found:
                raise CheckpointError(f"{folder}: {name} is there twice, the second time in {file.name}")
            if not EXTRAS.search(name):
                found[name] = stored.get_slice(name)
    return found


def _shown(names: list[str]) -> str:
    more = len(names) - NUM_SHOWN
    return ", ".join(names[:NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _read(file: Any, entry: Entry, rows: slice | None) -> torch.Tensor:
    if not entry.shape:
        scalar: torch.Tensor = file.get_tensor(entry.theirs)
        return scalar if entry.item is None else scalar[entry.item]
    start, stop, step = (rows or slice(None)).indices(entry.shape[0])
    if step != 1:
        raise ValueError(f"rows {rows} are not contiguous")
    stored = file.get_slice(entry.theirs)
    spans = entry.split.segments(entry.part, start, stop) if entry.split else [slice(start, stop)]
    pieces = [_rows(stored, entry, span) for span in spans or [slice(0, 0)]]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _rows(stored: Any, entry: Entry, span: slice) -> torch.Tensor:
    """One span of an entry's rows."""
    whole = slice(span.start, span.stop)  # safetensors has no steps
    at = (slice(None), whole) if entry.transposed else (whole,)
    found: torch.Tensor = stored[at if entry.item is None else (entry.item, *at)]
    return (found.t() if entry.transposed else found)[:: span.step or 1]
