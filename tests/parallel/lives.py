"""What ranks do in tests of communicators. Each is told how they exchange tensors and on which mesh."""

import os
import signal
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore

from quire.errors import PeerLost
from quire.kernels.cpu.calls import Memory, record
from quire.parallel.axis import Axis
from quire.parallel.factory import Axes, Rendezvous, communicators
from quire.parallel.mesh import SPANS, Mesh
from quire.parallel.process_groups import ProcessGroup, nccl
from quire.parallel.shared_memory import RING_BYTES, SLOT_BYTES, Segment, SharedMemory
from quire.parallel.symmetric import symmetric

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64)
MOVED = (*DTYPES, torch.float8_e4m3fn, torch.uint8, torch.bool)
CPU = torch.device("cpu")
KINDS = {"shared memory": SharedMemory, "gloo": ProcessGroup}
SHORT_S = 2.0  # a timeout to run into


def connect(rank: int, args: dict[str, Any], timeout_s: float = 30.0) -> tuple[Mesh, Axes]:
    mesh = Mesh(**args["mesh"])
    segment = args["segment"] if args["way"] == "shared memory" else None
    store = None if segment is not None else FileStore(args["store"], mesh.size)
    rendezvous = Rendezvous(store, generation=1, timeout_s=timeout_s, segment=segment)
    return mesh, communicators(mesh, rank, rendezvous, CPU)


def tensor(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What a rank brings along; every rank can tell what the others do."""
    chance = torch.Generator("cpu").manual_seed(1000 + rank)
    numbers = (torch.randn(shape, generator=chance, device="cpu") * 100).to(torch.get_default_device())
    if dtype is torch.float8_e4m3fn:  # which has no infinity: what is too large would not be equal to itself
        numbers = numbers.clamp(-448, 448)
    return numbers.bool() if dtype is torch.bool else numbers.to(dtype)


def added(tensors: list[Tensor]) -> Tensor:
    """In the order of ranks, in float32."""
    if not tensors[0].is_floating_point():
        return torch.stack(tensors).sum(0).to(tensors[0].dtype)
    total = torch.zeros(tensors[0].shape)
    for x in tensors:
        total += x.float()
    return total.to(tensors[0].dtype)


def all_alike(x: Tensor, axis: Axis) -> None:
    """The same bits on all ranks."""
    rows = axis.all_gather(x.reshape(1, -1).contiguous())
    assert all(torch.equal(row, x.flatten()) for row in rows)


def exchange(rank: int, args: dict[str, Any]) -> str:
    """Every operation of every axis, twice."""
    mesh, axes = connect(rank, args)
    by_name = {"dp": axes.dp, "pp": axes.pp, "cp": axes.cp, "tp": axes.tp, "ep": axes.ep, "world": axes.world}
    assert by_name.keys() == SPANS.keys()
    for name, axis in by_name.items():
        peers = mesh.peers(name, rank)
        assert (axis.size, axis.rank) == (len(peers), peers.index(rank))
        kind = KINDS[args["way"]] if axis.size > 1 else type(None)
        assert type(axis.communicator) is kind
        for number in (1, 7, args["large"]) if name in args["axes"] else ():
            sums(axis, peers, number)
            moves(axis, peers, number)
        rows_to_all(axis, peers)
        nothing(axis)
        neighbours(axis, peers, args["large"])
        axis.check()
    return "well"


def sums(axis: Axis, peers: tuple[int, ...], number: int) -> None:
    for dtype in DTYPES:
        wanted = added([tensor(p, (number, 3), dtype) for p in peers])
        x = tensor(peers[axis.rank], (number, 3), dtype)
        found = axis.all_reduce(x)
        assert found.dtype is dtype and torch.equal(found, wanted)
        all_alike(found, axis)
        across = tensor(peers[axis.rank], (number, 3), dtype).T
        assert torch.equal(axis.all_reduce(across), found.T)
        wide = [tensor(p, (2, number * axis.size), dtype) for p in peers]
        part = axis.reduce_scatter(wide[axis.rank], 1)
        assert torch.equal(part, added(wide).chunk(axis.size, 1)[axis.rank])
        assert torch.equal(axis.reduce_scatter(wide[axis.rank], -1), part)


def moves(axis: Axis, peers: tuple[int, ...], number: int) -> None:
    for dtype in MOVED:
        all_of_them = [tensor(p, (2, number, 3), dtype) for p in peers]
        x = all_of_them[axis.rank]
        for dim in (0, 1, -1):
            found = axis.all_gather(x, dim)
            assert found.is_contiguous() and found.dtype is dtype
            assert torch.equal(found.float(), torch.cat([y.float() for y in all_of_them], dim))
        for source in range(axis.size):
            found = axis.broadcast(x.clone(), source)
            assert torch.equal(found.float(), all_of_them[source].float())


def rows_to_all(axis: Axis, peers: tuple[int, ...]) -> None:
    """Rank i sends (i + j) % 3 rows to rank j, some of them none at all, and a rank may have nothing to send."""
    for least in (0, 1000):
        counts = [[(least + i) * ((i + j) % 3) for j in range(axis.size)] for i in range(axis.size)]
        rows = [tensor(p, (sum(counts[i]), 5), torch.bfloat16) for i, p in enumerate(peers)]
        send, recv = counts[axis.rank], [counts[i][axis.rank] for i in range(axis.size)]
        found = axis.all_to_all(rows[axis.rank], send, recv)
        parts = [rows[i].split(counts[i])[axis.rank] for i in range(axis.size)]
        assert torch.equal(found, torch.cat(parts))


def nothing(axis: Axis) -> None:
    """Empty tensors have their shapes, and nobody waits for anybody."""
    empty = torch.empty(0, 4)
    assert axis.all_reduce(empty).shape == axis.broadcast(empty, 0).shape == (0, 4)
    assert axis.all_gather(empty, 1).shape == (0, 4 * axis.size)
    assert axis.reduce_scatter(torch.empty(2, 0, 4 * axis.size), 2).shape == (2, 0, 4)
    assert axis.all_to_all(torch.empty(axis.size, 0), [1] * axis.size, [1] * axis.size).shape == (
        axis.size,
        0,
    )
    axis.barrier()
    try:
        axis.all_reduce(torch.ones(2, dtype=torch.float64))
    except TypeError:
        return
    raise AssertionError("a sum that not all ways can make")


def neighbours(axis: Axis, peers: tuple[int, ...], number: int) -> None:
    """Several tensors are on their way to the next rank before it takes the first one."""
    shapes = [(3,), (number, 2), (0, 2), (1, 1)]
    if axis.rank + 1 < axis.size:
        for shape in shapes:
            axis.send(tensor(peers[axis.rank], shape, torch.float32), axis.rank + 1)
    if torch.get_default_device().type == "cpu":  # a GPU's stream waits until the next one takes it
        axis.barrier()
    if axis.rank:
        for shape in shapes:
            found = axis.receive(torch.empty(shape), axis.rank - 1)
            assert torch.equal(found, tensor(peers[axis.rank - 1], shape, torch.float32))
    axis.barrier()


def around(rank: int, args: dict[str, Any]) -> str:
    """More than a ring holds: both ranks write and read while it goes round, and what comes after it is whole."""
    _, axes = connect(rank, args)
    number = RING_BYTES // 8 * 3 // 2
    for turn in range(2):
        x = torch.arange(2 * number) * (rank + 1 + turn)
        found = axes.tp.all_to_all(x, [number, number], [number, number])
        mine = torch.arange(number) + rank * number
        assert torch.equal(found, torch.cat([mine * (r + 1 + turn) for r in range(2)]))
        small = torch.tensor([rank, turn])
        assert axes.tp.all_to_all(small, [1, 1], [1, 1]).tolist() == [(0, turn)[rank], (1, turn)[rank]]
    return "well"


def two_machines(rank: int, args: dict[str, Any]) -> str:
    """Ranks 0 and 1 share memory, and so do 2 and 3, but not with them: one axis goes through it, the other by gloo."""
    mesh, here = Mesh(pp=2, tp=2), rank // 2
    segment, local = args["other" if here else "segment"], (2 * here, 2 * here + 1)
    rendezvous = Rendezvous(FileStore(args["store"], 4), timeout_s=30, segment=segment, local=local)
    axes = communicators(mesh, rank, rendezvous, CPU)
    assert type(axes.tp.communicator) is SharedMemory and axes.ep is axes.tp
    assert type(axes.pp.communicator) is type(axes.world.communicator) is ProcessGroup
    for name, axis in (("tp", axes.tp), ("pp", axes.pp), ("world", axes.world)):
        sums(axis, mesh.peers(name, rank), 100)
    return "well"


def on_gpus(rank: int, args: dict[str, Any]) -> str:
    """NCCL, and memory that GPUs map: all operations, and sums in a graph that is replayed."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.set_default_device(device)
    size = args["size"]
    store = FileStore(args["store"], size)
    ranks = tuple(range(size))
    group = nccl(store, "1/tp", rank, size, timeout_s=60, device=device)
    axes = [Axis(group)]
    if size > 1:
        fast, reason = symmetric(group, store, "1/tp", device, one_machine=True)
        assert fast is not None, reason
        axes.append(Axis(fast))
    for axis in axes:
        for number in (1, 7, 1000, 30_000, LARGE):
            sums(axis, ranks, number)
            moves(axis, ranks, number)
        rows_to_all(axis, ranks)
        nothing(axis)
        neighbours(axis, ranks, LARGE)
        for number in (64, 1 << 15, 1 << 18, 1 << 21):
            sums_in_a_graph(axis, ranks, number)
    group.close()
    return "well"


def sums_in_a_graph(axis: Axis, peers: tuple[int, ...], number: int) -> None:
    x = torch.ones(number, dtype=torch.bfloat16)
    axis.all_reduce(x.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = axis.all_reduce(x * 1)
    for turn in range(3):
        x.fill_(turn + axis.rank)
        graph.replay()
        assert torch.equal(total, torch.full_like(x, sum(turn + peer for peer in peers)))


def special(rank: int, args: dict[str, Any]) -> str:
    """Every number of 16 bits, with nothing added to it, and halves of the last place, to be rounded to even.

    bf16's smallest numbers may become 0: AVX512-BF16 has no others below 2**-126.
    """
    _, axes = connect(rank, args)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        for other in (torch.zeros(1, dtype=dtype), torch.tensor([2**-11 * 1.5], dtype=dtype)):
            x = numbers.clone() if rank == 0 else other.expand_as(numbers).contiguous()
            wanted = (numbers.float() + other.float()).to(dtype)
            found = axes.world.all_reduce(x)
            flushed = (dtype == torch.bfloat16) & (wanted.abs() < 2**-126) & (found == 0)
            finite = ~wanted.isnan() & ~flushed
            assert torch.equal(found.isnan(), wanted.isnan())
            assert torch.equal(found.view(torch.int16)[finite], wanted.view(torch.int16)[finite])
    return "well"


def replay(rank: int, args: dict[str, Any]) -> str:
    """Operations are kept with the other calls of a step, and made again on other numbers."""
    _, axes = connect(rank, args)
    world = axes.world
    x, given, sent = torch.empty(4, 6), torch.empty(2), torch.empty(4, 6 * world.size)
    with record(Memory()) as step:
        total = world.all_reduce(x)
        columns = world.all_gather(total, -1)
        if rank == 0:
            world.send(columns, 1)
        elif rank == 1:
            world.receive(sent, 0)
        world.broadcast(given, 2)
    assert step.refused is None, step.refused
    for turn in range(3):
        x.fill_(rank + turn)
        given.fill_(rank + turn)
        step.replay()
        wanted = torch.full((4, 6), float(sum(r + turn for r in range(world.size))))
        assert torch.equal(total, wanted) and torch.equal(columns, wanted.repeat(1, world.size))
        assert rank != 1 or torch.equal(sent, columns)
        assert torch.equal(given, torch.full((2,), 2.0 + turn))
    if rank == 2:  # dies once the others have seen all that
        for other in (0, 1):
            world.receive(given, other)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        world.send(given, 2)
        step.replay()
        axes.check()
    except PeerLost:
        return "well"
    return "a step's results were used though a rank was lost"


def lose(rank: int, args: dict[str, Any]) -> str:
    """The last rank dies, or stops; what others say who wait for it."""
    _, axes = connect(rank, args, SHORT_S if args["after"] == "timeout" else 600.0)
    x = torch.ones(100)
    try:
        axes.world.all_reduce(x)
        if rank == axes.world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL if args["after"] == "death" else signal.SIGSTOP)
        if args["operation"] == "all_reduce":
            axes.world.all_reduce(x)
        else:
            axes.world.receive(x, axes.world.size - 1)
    except PeerLost as error:
        return "lost" if "has to be started again" in str(error) else str(error)
    return "well"


def watch_replay(args: dict[str, Any]) -> None:
    watch_lose(args)


def watch_lose(args: dict[str, Any]) -> None:
    """Whoever sees a rank die tells those who share memory with it."""
    Segment(args["segment"], mesh := Mesh(**args["mesh"]), range(mesh.size)).poison()


LARGE = 2 * SLOT_BYTES // 3 // 4 + 5  # rows of three numbers, float32, that fill two slots and some
