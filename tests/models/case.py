"""What a case is: a tiny checkpoint of one architecture, made by Transformers or by a network of networks.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

from tests.models import networks


@dataclass(frozen=True, eq=False)
class Case:
    """`values` are arguments of Hugging Face's config class; `legacy` replaces keys of its config.json."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""  # class names; by default they follow from the case's name up to "-"
    config: str = ""
    legacy: Mapping[str, Any] = field(default_factory=dict)  # a value of None deletes the key

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


def found(name: str) -> Any:
    """A class by its name: ours, if we have it because Transformers has not."""
    return vars(networks).get(name) or getattr(transformers, name)


def alias(name: str, of: str, values: Mapping[str, Any], config: str = "", **legacy: Any) -> Case:
    """A class that Transformers lacks and that computes what another of its classes does."""
    changes = {"architectures": [f"{name}ForCausalLM"], **legacy}
    return Case(name, values, f"{of}ForCausalLM", config or f"{of}Config", changes)
