"""Every mesh of up to four processes, and one of eight: the tokens of one, under continuous batching with preemption.

Of the many meshes, the slow tests have some that put every pair of axes together; `make meshes` runs all.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest

from quire.checkpoint.files import read_config
from quire.config import Config
from quire.engine.device import mesh_of
from quire.engine.groups import Groups
from quire.engine.remote import RemoteEngine
from quire.errors import ConfigError
from quire.models.registry import decoder_spec
from quire.models.spec import Decoder
from quire.resolve import resolve, whole_experts
from quire.scheduler.near import Extent
from tests.engine.test_ranks import SMALL, is_alive, pids
from tests.engine.test_remote import running
from tests.engine.test_ticks import BATCHED, LENGTH, tokens_of
from tests.models.cases import BY_NAME, build_hf
from tests.test_resolve import CPU

MOST = 4  # processes
PATIENCE_S = 600  # as many as there are may share two cores
SHARED = {"hidden_size": 192, "num_attention_heads": 12, "intermediate_size": 192}  # by 2, 3 or 4
ONE_HEAD = {"num_key_value_heads": 1}  # of keys, which all ranks have, so that they can share out positions


class Network(NamedTuple):
    """A network that 2, 3 and 4 ranks can share out every way, and options with which it is computed."""

    case: str
    values: dict[str, object]
    options: dict[str, object]


NETWORKS = {
    "dense": Network("Qwen3", ONE_HEAD, {"block_size": 16}),  # by C++ kernels, where there are any
    "experts": Network(
        "Qwen2Moe",
        ONE_HEAD | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "sliding_window": 12},
        {"block_size": 4, "all2all_backend": "allgather_reducescatter"},
    ),
    "latent": Network(
        "DeepseekV3",
        {"moe_intermediate_size": 48, "num_key_value_heads": 12},
        {"block_size": 4, "all2all_backend": "all_to_all"},
    ),
}


class Mesh(NamedTuple):
    """A network, and how many ranks share it out along each axis; `tp` counts those along `cp` too."""

    network: str
    dp: int = 1
    pp: int = 1
    tp: int = 1
    cp: int = 1
    ep: bool = False

    def __str__(self) -> str:
        sizes = zip(self._fields[1:5], self[1:5], strict=True)
        return "-".join([self.network, *(f"{axis}{n}" for axis, n in sizes if n > 1), *["ep"] * self.ep])

    @property
    def size(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def axes(self) -> set[str]:
        """Those of more than one rank; tp only if it is more than cp."""
        found = {"dp": self.dp, "pp": self.pp, "tp": self.tp // self.cp, "cp": self.cp, "ep": 1 + self.ep}
        return {axis for axis, size in found.items() if size > 1}

    @property
    def options(self) -> dict[str, object]:
        whole_blocks = {"block_size": 12} if self.cp == 3 else {}
        return (
            NETWORKS[self.network].options
            | whole_blocks
            | {
                "data_parallel_size": self.dp,
                "pipeline_parallel_size": self.pp,
                "tensor_parallel_size": self.tp,
                "decode_context_parallel_size": self.cp,
                "enable_expert_parallel": self.ep,
            }
        )


def conceivable() -> Iterator[Mesh]:
    sizes = range(1, MOST + 1)
    for network, *rest in product(NETWORKS, sizes, sizes, sizes, sizes, (False, True)):
        mesh = Mesh(network, *rest)
        if 1 < mesh.size <= MOST:
            yield mesh


EVERY = [
    mesh
    for mesh in conceivable()
    if mesh.tp % mesh.cp == 0 and (not mesh.ep or (mesh.network != "dense" and mesh.dp * mesh.tp > 1))
]
EIGHT = Mesh("latent", dp=2, pp=2, tp=2, cp=2, ep=True)
SOME = [
    Mesh("dense", dp=2, pp=2),
    Mesh("dense", dp=2, tp=2),
    Mesh("dense", tp=4, cp=2),
    Mesh("dense", pp=2, tp=2),
    Mesh("experts", pp=3),
    Mesh("experts", dp=2, pp=2, ep=True),
    Mesh("experts", tp=4, ep=True),
    Mesh("experts", pp=2, tp=2, ep=True),
    Mesh("latent", tp=3),
    Mesh("latent", dp=2, tp=2, cp=2, ep=True),
    Mesh("latent", pp=2, tp=2, cp=2),
    EIGHT,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in NETWORKS}
    for name, folder in found.items():
        case = BY_NAME[NETWORKS[name].case]
        build_hf(replace(case, values=case.values | SHARED | NETWORKS[name].values), folder)
    return found


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[list[list[int]]]]:
    """What one process says, by network."""

    class Tokens(dict[str, list[list[list[int]]]]):
        def __missing__(self, name: str) -> list[list[list[int]]]:
            async def work() -> None:
                async with running(config(folders[name], Mesh(name))) as engine:
                    self[name] = await tokens_of(engine)

            asyncio.run(asyncio.wait_for(work(), PATIENCE_S))
            return self[name]

    return Tokens()


def spec_of(folder: Path) -> Decoder:
    return decoder_spec(read_config(folder))[0]


def config(folder: Path, mesh: Mesh) -> Config:
    """With a cache of so few blocks that two requests make way for each other, and steps that cut prompts."""
    options = SMALL | mesh.options | {"max_model_len": LENGTH, "max_num_batched_tokens": BATCHED}
    whole = Config.of(model=str(folder), num_threads=1, **options)
    resolved = resolve(whole, spec_of(folder), CPU, checkpoint_dtype="float32", offline=False)
    near, block_size = resolved.memory.layout.near, whole.block_size or 1
    num_blocks = Extent(near, block_size, BATCHED).num_blocks(LENGTH) + 1
    per_block = max(memory.block_bytes for memory in resolved.memories)
    return replace(whole, kv_cache_memory_bytes=num_blocks * per_block)


def num_preemptions(engine: RemoteEngine) -> int:
    keepers = engine.keeper.keepers if isinstance(engine.keeper, Groups) else [engine.keeper]
    return sum(keeper.metrics.totals.num_preemptions for keeper in keepers)


def processes(engine: RemoteEngine) -> list[int]:
    if not isinstance(engine.keeper, Groups):
        return pids(engine)
    ready = [keeper.supervisor.ready for keeper in engine.keeper.keepers]
    return [*engine.keeper.pids, *(rank for facts in ready if facts for rank in facts.result().ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*EVERY, EIGHT] if "EVERY_MESH" in os.environ else SOME, ids=str)
def test_tokens_are_those_of_one_process(
    folders: dict[str, Path], expected: dict[str, list[list[list[int]]]], mesh: Mesh
) -> None:
    async def work() -> None:
        async with running(config(folders[mesh.network], mesh)) as engine:
            assert await tokens_of(engine) == expected[mesh.network]
            assert num_preemptions(engine) > 0 and engine.keeper.num_restarts == 0
            found = processes(engine)
            assert len(set(found)) == mesh.size and all(map(is_alive, found))
        assert not any(map(is_alive, found))

    expected[mesh.network]  # by an event loop of its own
    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


def test_every_mesh_is_one_that_options_allow(folders: dict[str, Path]) -> None:
    """And what is none of them is refused, but for experts that are spread over one rank, which changes nothing."""
    specs = {name: spec_of(folder) for name, folder in folders.items()}
    for mesh in conceivable():
        try:
            options = Config.of(model="some", **SMALL | mesh.options)
            mesh_of(options)
            resolve(options, specs[mesh.network], CPU, checkpoint_dtype="float32", offline=False)
            is_one = not mesh.ep or whole_experts(options, specs[mesh.network]) is not None
        except ConfigError:
            is_one = False
        assert is_one == (mesh in EVERY), mesh


def pairs(meshes: Sequence[Mesh]) -> set[tuple[str, ...]]:
    return {pair for mesh in meshes for pair in combinations(sorted(mesh.axes), 2)}


def test_some_meshes_have_every_pair_of_axes() -> None:
    assert pairs(SOME) == pairs(EVERY) and {mesh.network for mesh in SOME} == set(NETWORKS)
    assert {mesh for mesh in SOME if mesh.size <= MOST} <= set(EVERY)
