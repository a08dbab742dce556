"""A view of Hugging Face's config.json that is strict about what is missing and remembers what was read.

It knows no architecture: which keys exist, and what a missing one means, is each family's business.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quire.errors import ModelError, UnsupportedModel

# Keys that cannot change what the network computes: bookkeeping, training, generation and token ids.
HARMLESS = re.compile(
    r"_.*|.*_token_ids?|.*_token_index|.*_dropout|.*_pdrop|.*dropout.*|output_.*|summary_.*|.*_loss_coef|.*aux_loss.*|seq_aux"
    r"|architectures|model_type|auto_map|dtype|torch_dtype|transformers_version|transformers\.js_config"
    r"|use_cache|cache_implementation|initializer_range|init_std|init_method|initializer_factor|pretraining_tp"
    r"|layerdrop|router_jitter_noise|id2label|label2id|num_labels|problem_type|task_specific_params"
    r"|tokenizer_class|prefix|chunk_size_feed_forward|is_decoder|is_encoder_decoder|return_dict|gradient_checkpointing"
    r"|return_dict_in_generate|max_window_layers|text_config|vision_config|unsloth_.*|use_flash_attn|max_length|min_length"
    r"|do_sample|temperature|top_k|top_p|n_ctx|finetuning_task|attn_implementation|scale_attn_weights|moe_layer_freq|ep_size"
)

MAX_COUNT = 2**31


class HF:
    """config.json with attribute access; a missing key reads as None, and required keys have methods.

    Raises:
        ModelError: a required key is missing or has a value of the wrong kind; the message names it.
    """

    def __init__(self, values: Mapping[str, object]):
        inner = values.get("text_config")
        merged = {**values, **inner} if isinstance(inner, Mapping) else dict(values)
        if values.get("architectures"):  # the outer model's, if a text model is nested in another
            merged["architectures"] = values["architectures"]
        self._values = merged
        self._read: set[str] = set()

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        return self.get(key)

    def get(self, key: str, default: object = None) -> Any:
        """The key's value, null included; `default`, which must be Hugging Face's, if the key is absent."""
        self._read.add(key)
        return self._values.get(key, default)

    def need(self, *keys: str) -> Any:
        """A value that must be there and not be null, under the first of these keys that has one."""
        for key in keys:
            if (value := self.get(key)) is not None:
                return value
        raise ModelError(
            f"config.json has no {' or '.join(keys)}, which {self.architecture} needs; "
            "take the file from the model's original repository"
        )

    def count(self, *keys: str) -> int:
        """A positive integer that must be there, under the first of these keys that is."""
        value = self.need(*keys)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_COUNT:
            raise ModelError(
                f"config.json: {keys[0]} is {value!r}; it must be an integer from 1 to {MAX_COUNT}"
            )
        return value

    def number(self, key: str) -> float:
        """A number that must be there."""
        value = self.need(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelError(f"config.json: {key} is {value!r}; it must be a number")
        return value

    def text(self, key: str) -> str:
        """A string that must be there."""
        value = self.need(key)
        if not isinstance(value, str):
            raise ModelError(f"config.json: {key} is {value!r}; it must be a string")
        return value

    def stated(self, key: str) -> Any:
        """A value that may be null, for none, but must be there."""
        return self.get(key) if key in self._values else self.need(key)

    @property
    def architecture(self) -> str:
        """The class that Hugging Face would load, the model's name for all our purposes."""
        names = self.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ModelError(
                f'config.json: architectures is {names!r}; it must be a list like ["LlamaForCausalLM"]'
            )
        return names[0]

    def refuse(self, unsupported: bool, what: str) -> None:
        """Raise UnsupportedModel if the config asks for something that the family cannot honour."""
        if unsupported:
            raise UnsupportedModel(f"{self.architecture}: {what} in config.json is not supported")

    def refuse_if_set(self, *keys: str) -> None:
        """Refuse keys that are supported only while absent, null, false or zero."""
        for key in keys:
            value = self.get(key)
            self.refuse(bool(value), f"{key}={value!r}")

    def skip(self, *keys: str) -> None:
        """Mark keys as known that repeat others or do not matter for this variant."""
        self._read.update(keys)

    def unread(self) -> Iterable[tuple[str, object]]:
        """Keys that nobody asked for although they might mean something; unset ones do not count."""
        for key, value in self._values.items():
            if key not in self._read and value and not HARMLESS.fullmatch(key):
                yield key, value
