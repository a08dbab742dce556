"""Ranks that Ray places: a bundle of its cluster for each, and an actor that is the rank, in all but the first.

Ray starts and ends processes; what ranks say to each other goes over connections of their own, which also show at once
when one is gone. Rank 0 is in the engine's process, wherever that is, and its bundle with it.
"""

import os
import secrets
from dataclasses import dataclass
from typing import Any

from quire.config import Config
from quire.engine.meeting import GATHER_S, Address, Meeting, join
from quire.engine.rank import CONNECT_S, Seat, serve
from quire.errors import CapacityError, ConfigError, EngineDead
from quire.log import logger

SECRET_BYTES = 32


class RankActor:
    """A process of Ray's that becomes a rank."""

    def gpus(self) -> list[str]:
        """Those that Ray gave it."""
        ray = find_ray()
        return list(map(str, ray.get_runtime_context().get_accelerator_ids().get("GPU", [])))

    def live(self, address: Address, secret: bytes, rank: int, size: int) -> None:
        """The rank's whole life."""
        serve(join(address, secret, rank, size), Seat(0, range(rank, rank + 1)))


@dataclass(slots=True)
class Placement:
    """What a group has of a cluster.

    Attributes:
        actors: the other ranks, and perhaps one that holds rank 0's GPU.
        group: the placement group, if it was made for this; None if it was there before.
        connected: whether this process was connected with the cluster for this.
    """

    actors: list[Any]
    group: Any
    connected: bool

    def close(self) -> None:
        """End the actors, and give back what was taken."""
        ray = find_ray()
        if not ray.is_initialized():  # nothing is left of it
            return
        for actor in self.actors:
            ray.kill(actor)
        if self.group is not None:
            ray.util.remove_placement_group(self.group)
        if self.connected:
            ray.shutdown()


def find_ray() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
        import ray.util
    except ImportError:
        raise ConfigError(
            "distributed_executor_backend is ray, which is not installed; pip install 'quire[ray]', or use local"
        ) from None
    return ray


def place(config: Config, size: int) -> tuple[Placement, Meeting]:
    """Have Ray start ranks 1 to size - 1; they come to the meeting.

    Raises:
        ConfigError: there is no cluster, or its placement group does not fit.
        CapacityError: it has no room.
        EngineDead: processes could not be started.
    """
    ray = find_ray()
    connected = not ray.is_initialized()
    if connected:
        try:
            ray.init(address="auto", logging_level="WARNING")
        except ConnectionError:
            raise ConfigError(
                "there is no Ray cluster on this machine, nor is one named by RAY_ADDRESS; ray start --head makes one"
            ) from None
    placement = Placement([], None, connected)
    try:
        meeting = _start(ray, placement, config, size)
    except BaseException:
        placement.close()
        raise
    return placement, meeting


def _start(ray: Any, placement: Placement, config: Config, size: int) -> Meeting:
    here = ray.util.get_node_ip_address()
    group = _given(ray, config)
    if group is None:
        group = placement.group = _made(ray, config, size, here)
    _check(ray, group, size, here)
    kind = ray.remote(RankActor)
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Strategy

    def actor(bundle: int) -> Any:
        needs = {name: n for name, n in group.bundle_specs[bundle].items() if not name.startswith("node:")}
        cpus, gpus = needs.pop("CPU", 0), needs.pop("GPU", 0)
        where = Strategy(placement_group=group, placement_group_bundle_index=bundle)
        made = kind.options(
            num_cpus=cpus, num_gpus=gpus, resources=needs, max_restarts=0, scheduling_strategy=where
        )
        placement.actors.append(made.remote())
        return placement.actors[-1]

    if placement.group is not None and group.bundle_specs[0].get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ray.get(actor(0).gpus.remote()))
    others = {rank: actor(rank) for rank in range(1, size)}
    try:
        ray.get([other.gpus.remote() for other in others.values()], timeout=CONNECT_S)
    except ray.exceptions.RayError as error:
        raise EngineDead(
            f"Ray could not start the ranks; is Quire installed on its machines? {error}"
        ) from None
    secret = secrets.token_bytes(SECRET_BYTES)
    meeting = Meeting((here, 0), secret)
    for rank, other in others.items():
        other.live.remote(meeting.address, secret, rank, size)
    return meeting


def _given(ray: Any, config: Config) -> Any:
    """The placement group that was asked for, or that this process is in."""
    from ray.util.placement_group import PlacementGroup, get_current_placement_group

    if config.ray_placement_group is None:
        return get_current_placement_group()
    try:
        name = ray.PlacementGroupID(bytes.fromhex(config.ray_placement_group))
    except ValueError as error:
        raise ConfigError(
            f"ray_placement_group {config.ray_placement_group!r} is no id of one: {error}; PlacementGroup.id.hex() is"
        ) from None
    return PlacementGroup(name)


def _made(ray: Any, config: Config, size: int, here: str) -> Any:
    gpu = config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    each = {"GPU": 1.0} if gpu else {"CPU": float(max((config.num_threads or size) // size, 1))}
    bundles = [{**each, f"node:{here}": 0.001}, *([each] * (size - 1))]
    group = ray.util.placement_group(bundles, strategy="PACK")
    logger.info("asking Ray for %d bundles of %s, one of them at %s", size, each, here)
    if not group.wait(GATHER_S):
        ray.util.remove_placement_group(group)
        raise CapacityError(
            f"Ray has no room for {size} bundles of {each}, of which one is at {here}; it has"
            f" {ray.available_resources()}"
        )
    return group


def _check(ray: Any, group: Any, size: int, here: str) -> None:
    if group.bundle_count < size:
        raise ConfigError(
            f"the placement group has {group.bundle_count} bundles, and an engine group {size} ranks, of which each"
            " needs one; make it as large, or leave it out"
        )
    table = ray.util.placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    if (first := addresses.get(table[0])) != here:
        raise ConfigError(
            f"bundle 0 of the placement group is at {first}, and rank 0 is in this process, at {here}; start this there"
        )
