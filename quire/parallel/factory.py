"""The axes of one process: which communicator each gets. The only place that knows all of them."""

from dataclasses import dataclass

import torch
from torch.distributed import Store

from quire.errors import ConfigError
from quire.log import logger
from quire.parallel import shared_memory
from quire.parallel.axis import Axes, Axis, Communicator
from quire.parallel.mesh import SPANS, Mesh
from quire.parallel.process_groups import gloo, nccl
from quire.parallel.shared_memory import Segment, SharedMemory
from quire.parallel.symmetric import symmetric


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """How the ranks of a group find each other.

    Attributes:
        store: any of torch's that all ranks reach; it may outlive the group. Only shared memory needs none.
        generation: how often the group was started before: names in the store begin with it.
        timeout_s: how long an operation waits for the other ranks.
        host: the address of this machine at which gloo listens.
        segment: a descriptor of `shared_memory.make_segment`, made anew for each generation.
        local: the ranks of this machine, which all have the segment if one has; None for all.
    """

    store: Store | None = None
    generation: int = 0
    timeout_s: float = 300.0
    host: str = "127.0.0.1"
    segment: int | None = None
    local: tuple[int, ...] | None = None


def communicators(mesh: Mesh, rank: int, rendezvous: Rendezvous, device: torch.device) -> Axes:
    """Connect this process, which is `rank`, with the others of the mesh; all of them call this at the same time.

    CPUs of one machine exchange tensors through memory, others through gloo; GPUs do through
    NCCL, and small sums, on one machine, through memory that they map.

    Raises:
        ConfigError: there is no such rank, or no way to exchange tensors on the device.
        PeerLost: not all ranks came in time.
    """
    segment = _segment(mesh, rendezvous, device)
    made: dict[tuple[int, ...], Axis] = {}  # axes along the same ranks are the same
    for peers in (mesh.peers(name, rank) for name in SPANS):
        if peers in made:
            continue
        if len(peers) == 1:
            made[peers] = Axis()
        elif segment is not None and peers in segment.offsets:
            made[peers] = Axis(SharedMemory(segment, peers, rank, timeout_s=rendezvous.timeout_s))
        else:
            made[peers] = Axis(_group(peers, rank, rendezvous, device))
    return Axes(**{name: made[mesh.peers(name, rank)] for name in SPANS})


def _segment(mesh: Mesh, rendezvous: Rendezvous, device: torch.device) -> Segment | None:
    if device.type != "cpu" or mesh.size == 1:
        return None
    reason = "the processes were given none" if rendezvous.segment is None else shared_memory.why_not(mesh)
    if rendezvous.segment is None or reason is not None:
        logger.info("shared memory is not used between processes: %s", reason)
        return None
    return Segment(rendezvous.segment, mesh, rendezvous.local or range(mesh.size))


def _group(peers: tuple[int, ...], rank: int, rendezvous: Rendezvous, device: torch.device) -> Communicator:
    if rendezvous.store is None:
        raise ConfigError(
            f"ranks {peers} share no memory, and there is no store through which they find each other"
        )
    name = f"{rendezvous.generation}/{'-'.join(map(str, peers))}"
    place = (rendezvous.store, name, peers.index(rank), len(peers))
    if device.type == "cpu":
        return gloo(*place, timeout_s=rendezvous.timeout_s, host=rendezvous.host)
    if device.type == "cuda":
        group = nccl(*place, timeout_s=rendezvous.timeout_s, device=device)
        local = peers if rendezvous.local is None else rendezvous.local
        together = set(peers) <= set(local)
        found, reason = symmetric(group, rendezvous.store, name, device, one_machine=together)
        if found is None:
            logger.info("symmetric memory is not used between ranks %s: %s", name, reason)
        return found or group
    raise ConfigError(f"no way to exchange tensors between {device.type} devices; use cpu or cuda")
