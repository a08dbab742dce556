"""What a case is: a tiny checkpoint of one architecture, made by Transformers or by a network of networks.py."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.models import networks


@dataclass(frozen=True, eq=False)
class Spelling:
    """How a checkpoint was published that Transformers' class would name otherwise.

    Modules that make one: by its name, their names; with several groups it holds a share of each, in turn.
    """

    renames: Mapping[str, str]  # regular expressions, in order
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: int = 1

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Transformers' tensors by Transformers' names -> the published ones."""
        left = dict(tensors)
        for whole, (first, *others) in self.fused.items():
            for name in [name for name in left if f".{first}." in name]:
                parts = [left.pop(name.replace(f".{first}.", f".{part}.")) for part in (first, *others)]
                shares = [part.unflatten(0, (self.groups, -1)) for part in parts]
                left[name.replace(f".{first}.", f".{whole}.")] = torch.cat(shares, 1).flatten(0, 1)
        return {self._renamed(name): tensor for name, tensor in unstacked(left).items()}

    def _renamed(self, name: str) -> str:
        for pattern, to in self.renames.items():
            name = re.sub(pattern, to, name)
        return name


def unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with each expert's weights by themselves."""
    apart = {}
    for name, tensor in tensors.items():
        module, part = name.rsplit(".", 1)
        ups = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(part)
        for i, one in enumerate(tensor if ups else ()):
            for up, weight in zip(ups, one.chunk(len(ups)), strict=True):
                apart[f"{module}.{i}.{up}.weight"] = weight.contiguous()
        if not ups:
            apart[name] = tensor
    return apart


@dataclass(frozen=True, eq=False)
class Case:
    """`values` are arguments of Hugging Face's config class; `legacy` replaces keys of its config.json."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""  # class names; by default they follow from the case's name up to "-"
    config: str = ""
    legacy: Mapping[str, Any] = field(default_factory=dict)  # a value of None deletes the key
    spelling: Spelling | None = None

    @property
    def architecture(self) -> str:
        return self.model or f"{self.name.split('-')[0]}ForCausalLM"

    @property
    def described(self) -> str:
        """The architecture in config.json."""
        names: list[str] = self.legacy.get("architectures", [self.architecture])
        return names[0]

    @property
    def config_class(self) -> str:
        return self.config or f"{self.name.split('-')[0]}Config"


EARLIEST = "5.17.0"  # version of Transformers that is supported; `make oracles` has it
IS_EARLIEST = transformers.__version__ == EARLIEST
# Cases that it computes otherwise than the classes' authors do, or cannot compute: norms of states see all heads, not a
# group's; heads that are rotated in part fail; gelu is taken at its word, by which checkpoints mean its approximation;
# logits of a composite have no cap.
UNLIKE = {
    *("Bamba", "GraniteMoeHybrid", "GraniteMoeHybrid-dense", "Mamba2"),
    *("GPTNeoXJapanese", "Gemma", "PaliGemma2"),
}


def is_installed(name: str) -> bool:
    """Whether there is a class of this name: ours, or of the Transformers that is installed."""
    return name in vars(networks) or hasattr(transformers, name)


def found(name: str) -> Any:
    """A class by its name: ours, if we have it because Transformers has not. Where there is none, a test is skipped."""
    if not is_installed(name):
        pytest.skip(f"Transformers {transformers.__version__} has no {name}")
    return vars(networks).get(name) or getattr(transformers, name)


def comparable(case: Case) -> Case:
    """The same; where Transformers' numbers are not what they should be, a test is skipped."""
    skip_unlike(case.name)
    return case


def skip_unlike(name: str) -> None:
    """Skips a test of such a case."""
    if IS_EARLIEST and name in UNLIKE:
        pytest.skip(f"Transformers {EARLIEST} computes {name} otherwise")


def alias(name: str, of: str, values: Mapping[str, Any], config: str = "", **legacy: Any) -> Case:
    """A class that Transformers lacks and that computes what another of its classes does."""
    changes = {"architectures": [f"{name}ForCausalLM"], **legacy}
    return Case(name, values, f"{of}ForCausalLM", config or f"{of}Config", changes)
