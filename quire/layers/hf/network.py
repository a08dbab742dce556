"""A network of Transformers' modules that computes flattened batches over our cache, with our products."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quire.attention.base import Backend, Ragged, layer_caches
from quire.attention.groups import Layout
from quire.attention.reference import Reference
from quire.attention.views import Place, places, seen_from
from quire.checkpoint.dummy import DummyCheckpoint, Made
from quire.errors import CheckpointError
from quire.kernels import ops
from quire.layers.base import Build
from quire.layers.hf.alone import compute
from quire.layers.hf.attention import Paged, running
from quire.layers.hf.experts import Experts, is_experts
from quire.layers.hf.latent import keep_latents
from quire.layers.hf.plan import Plan
from quire.layers.hf.source import (
    body_name,
    calm,
    empty,
    first_position,
    hf_class,
    interfaces,
    is_linear,
    register,
)
from quire.layers.hf.states import Over, computing, pieces, wrap
from quire.layers.rope import RopeTables
from quire.models.spec import Foreign
from quire.parallel.axis import Axes
from quire.parallel.vocabulary import Vocabulary

NUM_SHOWN = 5
ROUTERS = ("gate", "router", "wg", "shared_expert_gate")


class Product(nn.Module):
    """A linear layer by the fastest product, its weight packed and perhaps quantized."""

    def __init__(self, linear: Any, build: Build, bits: int | None):
        """`linear`: a module that `is_linear`."""
        super().__init__()
        weight = linear.weight.detach()
        if type(linear) is not nn.Linear:
            weight = weight.t().contiguous()
        self.packed = build.pack(weight) if bits is None else ops.quantize_linear(weight, bits)
        self.bias = None if linear.bias is None else linear.bias.detach()
        # Some ask for its type; who computes with it is known by then (source.Reads).
        self.weight = torch.empty_like(weight, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        return ops.linear(x.flatten(0, -2), self.packed, self.bias).unflatten(0, x.shape[:-1])


class Given(nn.Module):
    """Stands in for the part before the head, and for its decoder, whose output is given as embeddings."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.replaced = [body]  # in a list, so that it is no part of this one

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> "Outputs":
        return Outputs(inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        """What heads read of that part: multipliers, for one."""
        if name == "decoder":
            return self
        if name in ("replaced", "_modules", "_parameters", "_buffers"):
            return super().__getattr__(name)
        return getattr(vars(self)["replaced"][0], name)


class Outputs:
    """What heads read of that part's output; what else they might is None."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, item: int | slice) -> Any:
        return (self.last_hidden_state,)[item]


class Modules:
    """Computes flattened batches [T] over the paged cache. Holds no weights until `load`."""

    def __init__(
        self,
        s: Foreign,
        config: Any,
        *,
        backend: Backend,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        invariant: bool = False,
        bits: int | None = None,
        axes: Axes | None = None,
    ):
        """`s`: this rank's part; `config`: Transformers'; the rest as for layers.decoder."""
        if s.alone:  # modules attend themselves, so the cache has the layout that can be read
            backend = Reference(backend.block_size, quantized=backend.quantized)
        self.spec, self.config, self.backend, self.axes = s, config, backend, axes or Axes()
        device = torch.device(device)
        ropes = RopeTables(max_length or s.max_length, device)
        self.vocabulary = Vocabulary(s.vocab_size)
        self.build = Build(s.dim, dtype, device, backend, ropes, invariant, bits)
        self.plan: Plan | None = None  # of several ranks
        self.model: Any = None
        self.body: Any = None
        self.first_position = 0
        self.places = frozenset[Place]()  # of calls that see a step otherwise than as it is

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Take weights by the checkpoint's names; each has its tensor when it is indexed with `...`.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape.
        """
        info = self._take(tensors)
        lists = {
            "missing": info["missing_keys"],
            "not in the network": info["unexpected_keys"],
            "of another shape": {name for name, *_ in info["mismatched_keys"]},
        }
        if any(lists.values()):
            found = "; ".join(
                f"{len(names)} {kind}: {', '.join(sorted(names)[:NUM_SHOWN])}"
                for kind, names in lists.items()
                if names
            )
            raise CheckpointError(f"the checkpoint does not fit {self.spec.architecture}: {found}")
        self._arrange()

    def load_dummy(self, dummy: DummyCheckpoint) -> None:
        """Make all weights up."""
        state = empty(self.spec.architecture, self.config, self.spec.alone).state_dict()
        self._take({name: Made(dummy, name, t.shape) for name, t in state.items() if t.is_floating_point()})
        self._arrange()

    def _take(self, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """Transformers' account of what it did with them; it knows the layouts in which they are published."""
        register()
        kind, axis = hf_class(self.spec.architecture), self.axes.tp
        if axis.size > 1:
            whole = empty(self.spec.architecture, self.config, self.spec.alone)
            self.plan = Plan(whole, axis.size, axis.rank)
            kind, tensors = self.plan.part_of(kind), self.plan.parts(tensors)
        self.model, info = kind.from_pretrained(
            None,
            config=self.config,
            state_dict=dict(tensors),
            dtype=self.build.dtype,
            ignore_mismatched_sizes=True,  # which it names, too
            output_loading_info=True,
            **interfaces(self.spec.alone),
        )
        found: Mapping[str, Any] = info
        return found

    def _arrange(self) -> None:
        calm(self.model).to(self.build.device)
        if not self.spec.alone:
            keep_latents(self.model, self.build.pack)
        self._pack()
        if self.plan is not None:
            self.plan.connect(self.model, self.axes.tp)
        if not self.spec.alone:
            wrap(self.model)
        name = body_name(self.model)
        self.body = self.model.get_submodule(name)
        self.first_position = first_position(self.model)
        self.model.set_submodule(name, Given(self.body))

    def _pack(self) -> None:
        """Have linear layers, unless others use their weights, and experts computed by our products.

        Where weights are quantized, the head's has 8 bits at least, and what chooses experts is left as it is.
        """
        model, build, bits = self.model, self.build, self.build.bits
        head = model.get_output_embeddings()
        for name, module in [*model.named_modules()]:
            if is_linear(module) and (module is head or f"{name}.weight" in self.spec.products):
                here = None if name.rpartition(".")[2] in ROUTERS else bits
                least = max(here, 8) if here is not None and module is head else here
                model.set_submodule(name, Product(module, build, least))
            elif is_experts(module) and build.device.type == "cpu":
                model.set_submodule(name, Experts(module, build, bits))

    def caches(self, pool: Tensor, states: Tensor | None = None, layout: Layout | None = None) -> list[Any]:
        """Each attention call's view of the memory, then each state's; see `layer_caches`."""
        found = layer_caches(self.backend, self.spec, pool, states, self.build.dtype, layout)
        self.places = places(found, [None] * len(found), self.axes.cp)
        return found

    @torch.inference_mode()
    def __call__(self, token_ids: Tensor, step: Ragged, caches: Sequence[Any]) -> Tensor:
        """token_ids [T] int64 -> hidden [T, dim], or of `step.wanted` [R, dim]."""
        hidden = self._hidden(token_ids, step, caches)
        return hidden if step.wanted is None else hidden[step.wanted]

    def _hidden(self, token_ids: Tensor, step: Ragged, caches: Sequence[Any]) -> Tensor:
        if isinstance(self.backend, Reference) and self.spec.alone:
            return compute(self.body, token_ids, step, caches, self.backend, self.build.dtype)
        seen = step
        if self.places:
            seen = seen_from(step, self.places, self.backend.block_size, self.axes.cp)
        calls, kept = len(self.spec.attention), self.spec.states
        paged = Paged(self.backend, caches[:calls], seen, self.spec.spans)
        own = {name: (parts, state) for (name, parts), state in zip(kept, caches[calls:], strict=True)}
        positions = step.positions[None] + self.first_position
        with running(paged), computing(Over(own, pieces(step) if own else ())):
            found = self.body(input_ids=token_ids[None], position_ids=positions, use_cache=False)
        if paged.number != calls:
            raise RuntimeError(f"{paged.number} layers attended and {calls} have a cache")
        hidden: Tensor = found[0][0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, dim] -> [R, vocab_size] float32, by the class's own head, scale and cap."""
        found: Tensor = self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return found.float()
