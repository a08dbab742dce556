"""Transformers' modules shared out among ranks by their authors' plan, which says of each by name how it is cut.

A rank has a part of each weight that the plan cuts, and all of the others. Where a module's results are part of a sum,
or of what the next one takes, the plan says so as well.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quire.checkpoint.dummy import Made
from quire.errors import CheckpointError, ConfigError
from quire.layers.hf import experts
from quire.parallel.axis import Axis

OUTPUTS, INPUTS = -2, -1  # dimensions of weights, and of stacks of them


class Way(NamedTuple):
    """How weights are cut: along which dimension, and how many follow each other in it; vectors are outputs'."""

    dim: int
    pieces: int = 1
    pads: bool = False  # what the last parts lack is zeros, and is cut off what they make


WAYS = {
    "colwise": Way(OUTPUTS),
    "colwise_gather_output": Way(OUTPUTS, pads=True),
    "embedding_rowwise": Way(OUTPUTS, pads=True),
    "packed_colwise": Way(OUTPUTS, pieces=2),
    "packed_rowwise": Way(INPUTS, pieces=2),
    "rowwise": Way(INPUTS),
    "rowwise_split_input": Way(INPUTS),
}
EXPERTS = "moe_tp_experts"
# Of modules whose weights have plans of their own, and of training.
WHOLE = {EXPERTS, "local_params", "mla_kv_a_proj", "replicate", "replicated_with_grad_allreduce"}
ALIKE = {"MergeModulelist", "Concatenate"}  # conversions that a cut may come before


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank has of a parameter: of each of `pieces` along a dimension, counted from the last, an equal part."""

    dim: int
    length: int  # of the dimension in all
    pieces: int
    size: int
    rank: int

    @property
    def count(self) -> int:
        """Of a piece, what each rank has."""
        return -(-self.length // (self.pieces * self.size))

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's."""
        part = list(whole)
        part[self.dim] = self.pieces * self.count
        return tuple(part)

    def read(self, stored: Any) -> Tensor:
        """Only the part, of a tensor or of what becomes one when it is indexed."""
        shape = tuple(stored.shape if isinstance(stored, Tensor | Made) else stored.get_shape())
        dim, each, found = len(shape) + self.dim, self.length // self.pieces, []
        for start in range(0, self.length, each):
            first, last = (start + min(rank * self.count, each) for rank in (self.rank, self.rank + 1))
            found.append(stored[(*[slice(None)] * dim, slice(first, last))])
        part = found[0] if len(found) == 1 else torch.cat(found, dim)
        if part.shape[dim] < self.pieces * self.count:
            whole = part.new_zeros(self.shape(shape))
            whole.narrow(dim, 0, part.shape[dim]).copy_(part)
            return whole
        return part


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a stored tensor, which is read when this is indexed with `...`."""

    cut: Cut
    stored: Any

    def __getitem__(self, item: Any) -> Tensor:
        return self.cut.read(self.stored)[item]


class Imagined(Axis):
    """Ranks that are not there, for passes that compute nothing: others have what this one has."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.cat([x] * self.size, dim)


class Plan:
    """How one network is shared out.

    Attributes:
        cuts: by the parameter's name; tied ones have several.
        styles: the plan's words, by the name of the module or the parameter.
    """

    def __init__(self, model: Any, size: int, rank: int):
        """`model`: without weights and not yet cut.

        Raises:
            ConfigError: it has no plan, or none that can be followed with so many ranks.
        """
        self.model, self.size, self.rank = model, size, rank
        stated = model.tp_plan or {}
        if not stated:
            raise self.refusal("its authors made no plan for several ranks")
        if unknown := sorted({*stated.values()} - WAYS.keys() - WHOLE):
            raise self.refusal(f"its plan has {', '.join(unknown)}, which is not followed here")
        self.styles = dict(self._expanded(stated))
        self.cuts = {name: cut for name, tensor in self._parameters() if (cut := self._cut(name, tensor))}
        self._leave_tied_whole()
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        outside = {id(p) for end in ends if end is not None for p in end.parameters()}
        if all(id(tensor) in outside for name, tensor in self._parameters() if name in self.cuts):
            raise self.refusal("its authors' plan cuts no layer")

    def cut(self, model: Any) -> None:
        """Give a network of the kind, without weights, parameters of this rank's shapes."""
        made: dict[int, nn.Parameter] = {}
        for name, cut in self.cuts.items():
            module, _, parameter = name.rpartition(".")
            owner = model.get_submodule(module)
            whole = owner.get_parameter(parameter)
            if id(whole) not in made:
                made[id(whole)] = nn.Parameter(
                    whole.new_empty(cut.shape(tuple(whole.shape))), requires_grad=False
                )
            owner.register_parameter(parameter, made[id(whole)])

    def part_of(self, kind: Any) -> Any:
        """A class whose networks are this rank's part of those of `kind`."""

        def begin(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            kind.__init__(self, config, *args, **kwargs)
            plan.cut(self)

        plan = self
        return type(kind.__name__, (kind,), {"__init__": begin, "__module__": kind.__module__})

    def parts(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Of tensors by the checkpoint's names, what this rank reads of each.

        Raises:
            CheckpointError: what is to be cut is stored in a layout that is not understood.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        model, found = self.model, dict(tensors)
        mapping, state = get_model_conversion_mapping(model), model.state_dict()
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        steps = {
            p: {type(o).__name__ for o in one.operations} for one in converters for p in one.source_patterns
        }
        for name, stored in tensors.items():
            ours, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if ours not in state and name in state:
                ours, pattern = name, None
            cut = self.cuts.get(ours)
            if cut is None:
                continue
            if pattern is not None:
                if not steps[pattern] <= ALIKE:
                    raise CheckpointError(
                        f"{name} becomes {ours} by {', '.join(sorted(steps[pattern] - ALIKE))}, of which ranks cannot"
                        " read a part each; leave out tensor_parallel_size, or save it with Transformers' newest layout"
                    )
                cut = replace(cut, length=cut.length // cut.pieces, pieces=1)
            found[name] = Part(cut, stored)
        return found

    def connect(self, model: Any, axis: Axis) -> None:
        """Have this rank's modules, which have their weights, exchange what the plan says."""
        modules: dict[str, Any] = dict(model.named_modules())
        for name, style in self.styles.items():
            if name not in modules or style not in JOINS:
                continue
            module, cut = modules[name], self.cuts.get(f"{name}.weight")
            vars(module)["forward"] = partial(JOINS[style], module.forward, axis, cut and cut.length)
            if style.startswith("rowwise") and module.bias is not None and axis.rank:
                module.bias.zero_()  # it is added once

    def refusal(self, why: str) -> ConfigError:
        """Of so many ranks."""
        return ConfigError(
            f"tensor_parallel_size is {self.size}, and {type(self.model).__name__} runs through Transformers' modules:"
            f" {why}. Leave it out, take another, or a native architecture (`quire models`)"
        )

    def _expanded(self, stated: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """Of modules, and of parameters, for which their module's word counts where they have none."""
        for name, module in self.model.named_modules():
            style = stated.get(_wild(name))
            if style is not None:
                self._check(name, module, style)
                yield name, style
            for inner, _ in module.named_parameters(recurse=False):
                whole = f"{name}.{inner}"
                if own := stated.get(_wild(whole), style):
                    yield whole, own

    def _check(self, name: str, module: nn.Module, style: str) -> None:
        kind = nn.Embedding if style == "embedding_rowwise" else nn.Linear
        fits = experts.is_experts(module) if style == EXPERTS else isinstance(module, kind)
        if not fits and (style in WAYS or style == EXPERTS):
            raise self.refusal(
                f"its plan has {style} for {name}, a {type(module).__name__}, which is no such layer"
            )
        if style == EXPERTS and vars(module)["has_bias"]:
            raise self.refusal(f"its experts ({name}) have biases, which its plan does not cut")

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters(remove_duplicate=False)

    def _cut(self, name: str, tensor: Tensor) -> Cut | None:
        way = WAYS.get(self.styles.get(name, ""))
        if way is None or (tensor.ndim == 1 and way.dim == INPUTS):
            return None
        dim = INPUTS if tensor.ndim == 1 else way.dim
        cut = Cut(dim, tensor.shape[dim], way.pieces, self.size, self.rank)
        if not way.pads and cut.length % (cut.pieces * cut.size):
            raise self.refusal(f"{name} has {cut.length} rows or columns, which cannot be shared out evenly")
        return cut

    def _leave_tied_whole(self) -> None:
        """Of a weight that several modules have, of which the plan cuts some."""
        names: dict[int, list[str]] = {}
        for name, tensor in self._parameters():
            names.setdefault(id(tensor), []).append(name)
        for several in names.values():
            if len({self.cuts.get(name) for name in several}) > 1:
                for name in several:
                    self.cuts.pop(name, None)
                    self.styles.pop(name.rpartition(".")[0], None)


def _wild(name: str) -> str:
    """As plans write it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


Forward = Callable[..., Any]


def _summed(forward: Forward, axis: Axis, _: int | None, *args: Any, **kwargs: Any) -> Tensor:
    return axis.all_reduce(forward(*args, **kwargs))


def _split_and_summed(forward: Forward, axis: Axis, _: int | None, x: Tensor) -> Tensor:
    return axis.all_reduce(forward(x.chunk(axis.size, -1)[axis.rank].contiguous()))


def _gathered(forward: Forward, axis: Axis, width: int | None, x: Tensor) -> Tensor:
    return axis.all_gather(forward(x), -1)[..., :width]


def _embedded(forward: Forward, axis: Axis, num_rows: int | None, token_ids: Tensor) -> Tensor:
    """Each token is in one rank's rows."""
    count = -(-(num_rows or 0) // axis.size)
    local = token_ids - axis.rank * count
    here = (local >= 0) & (local < count)
    found = forward(torch.where(here, local, 0))
    return axis.all_reduce(torch.where(here[..., None], found, 0))


JOINS: Mapping[str, Callable[..., Tensor]] = {
    "colwise_gather_output": _gathered,
    "embedding_rowwise": _embedded,
    EXPERTS: _summed,
    "rowwise": _summed,
    "rowwise_split_input": _split_and_summed,
}
