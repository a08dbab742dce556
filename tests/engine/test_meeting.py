"""Who may join a group over the network, and where a process stands in it."""

import re
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from quire.config import Config
from quire.engine.meeting import NONCE_BYTES, PROOF_BYTES, Meeting, join
from quire.engine.rank import FromRank, Joined
from quire.engine.site import Site, located, secret_of, site_of
from quire.engine.wire import Channel, Failed
from quire.errors import ConfigError, EngineDead, PeerLost

SECRET, ANYWHERE = b"a secret of this test", ("127.0.0.1", 0)
Found = dict[int, socket.socket]
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}
LWS = {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "leader.example"}
ENV = Config(model="m", distributed_executor_backend="env", tensor_parallel_size=4)


class Gathering:
    """Rank 0 of three, which waits for the others."""

    def __init__(self, pool: ThreadPoolExecutor):
        meeting = Meeting(ANYWHERE, SECRET)
        self.address = meeting.address
        self.found: Future[Found] = pool.submit(meeting.gather, (1, 2), 3, 30)

    def end(self) -> Found:
        """Have those come that are still missing."""
        ends = [join(self.address, SECRET, rank, 3) for rank in (1, 2)]
        found = self.found.result()
        for end in (*ends, *found.values()):
            end.close()
        return found


@pytest.fixture
def gathering() -> Iterator[Gathering]:
    with ThreadPoolExecutor() as pool:
        yield Gathering(pool)


def test_ranks_that_know_the_secret_are_found(gathering: Gathering) -> None:
    second, first = (join(gathering.address, SECRET, rank, 3) for rank in (2, 1))
    found = gathering.found.result()
    for rank, end in ((1, first), (2, second)):
        Channel(end).send(Joined())
        assert isinstance(Channel(found[rank], incoming=FromRank).receive(5), Joined)
        end.close()
        found[rank].close()
    with pytest.raises(ConnectionRefusedError):  # nobody listens any more
        join(gathering.address, SECRET, 1, 3)


def test_who_does_not_know_the_secret_is_told_so_and_disturbs_nobody(gathering: Gathering) -> None:
    with pytest.raises(ConfigError, match="another secret.*launch_secret_file"):
        join(gathering.address, SECRET + b".", 1, 3)
    assert sorted(gathering.end()) == [1, 2]


def test_strangers_disturb_nobody(gathering: Gathering) -> None:
    silent = socket.create_connection(gathering.address)
    rude = socket.create_connection(gathering.address)
    rude.sendall(b"GET / HTTP/1.1\r\n" * 10)
    gone = socket.create_connection(gathering.address)
    gone.close()
    assert sorted(gathering.end()) == [1, 2]
    silent.close()
    rude.close()


def test_what_was_overheard_opens_nothing(gathering: Gathering) -> None:
    """Neither the same words again, nor rank 0's own proof sent back to it."""
    with ThreadPoolExecutor() as pool, socket.create_server(ANYWHERE) as between:
        joining = pool.submit(join, between.getsockname(), SECRET, 1, 3)
        rank, _ = between.accept()
        leader = socket.create_connection(gathering.address)
        rank.sendall(leader.recv(NONCE_BYTES, socket.MSG_WAITALL))
        heard = rank.recv(NONCE_BYTES + PROOF_BYTES, socket.MSG_WAITALL)
        leader.close()
        rank.close()
        with pytest.raises((EngineDead, ConnectionError)):
            joining.result()
    for words in (heard, heard[NONCE_BYTES:] + heard[:NONCE_BYTES]):
        again = socket.create_connection(gathering.address)
        again.recv(NONCE_BYTES, socket.MSG_WAITALL)
        again.sendall(words)
        assert again.recv(PROOF_BYTES, socket.MSG_WAITALL) == bytes(PROOF_BYTES)
        again.close()
    gathering.end()


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        (1, 4, "a group of 4 ranks, and that of rank 0 one of 3"),
        (0, 3, "it is rank 0.*from elsewhere are 1, 2"),
    ],
)
def test_ranks_of_another_group_are_told_why(
    gathering: Gathering, rank: int, size: int, message: str
) -> None:
    wrong = join(gathering.address, SECRET, rank, size)
    answer = Channel(wrong, incoming=Failed).receive(5)
    wrong.close()
    assert re.search(message, answer.message)
    gathering.end()


def test_of_a_rank_that_comes_twice_the_later_counts(gathering: Gathering) -> None:
    """The earlier one's machine may be gone."""
    first = join(gathering.address, SECRET, 1, 3)
    later = join(gathering.address, SECRET, 1, 3)
    last = join(gathering.address, SECRET, 2, 3)
    found = gathering.found.result()
    assert found[1].getpeername() == later.getsockname() and first.recv(1) == b""
    for end in (first, later, last, *found.values()):
        end.close()


def test_those_that_do_not_come_are_named() -> None:
    meeting = Meeting(ANYWHERE, SECRET)
    with pytest.raises(PeerLost, match="ranks 1, 2 of 3 did not come within 0.1 s"):
        meeting.gather((1, 2), 3, 0.1)


def test_an_address_that_is_none_here_is_refused() -> None:
    for address in (("192.0.2.1", 0), ("no-such-host.invalid", 0), ("0.0.0.0", 0)):
        with pytest.raises(ConfigError, match="master-addr"):
            Meeting(address, SECRET)


def test_options_say_where_a_process_stands() -> None:
    config = Config(model="m", nnodes=2, node_rank=1, master_addr="10.0.0.1", tensor_parallel_size=4)
    site = site_of(config)
    assert site == Site(1, 2, address="10.0.0.1", port=29501)
    assert site.ranks(4) == range(2, 4) and located(config) == config
    with pytest.raises(ConfigError, match="process 2 of 2, 1 on each machine, cannot be"):
        site_of(replace(config, node_rank=2))
    with pytest.raises(ConfigError, match="3 ranks, which 2 processes cannot share out"):
        site.ranks(3)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*TORCHRUN, *LWS, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_torchruns_variables_say_where_a_process_stands(environment: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    site = site_of(ENV)
    assert site == Site(3, 4, 2, 1, "10.0.0.1", 29400) and site.ranks(4) == range(3, 4)
    assert located(ENV).nnodes == 2 and located(ENV).node_rank == 1
    environment.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert site_of(ENV).port == 29401
    environment.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="process 3 of 4, 3 on each machine, cannot be"):
        site_of(ENV)
    environment.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK is 'first'"):
        site_of(ENV)


def test_leader_worker_sets_variables_say_where_a_process_stands(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="neither all of torchrun's variables .* nor of LeaderWorkerSet's"):
        site_of(ENV)
    for name, value in LWS.items():
        environment.setenv(name, value)
    site = site_of(ENV)
    assert site == Site(1, 2, address="leader.example", port=29501) and site.ranks(4) == range(2, 4)
    assert located(ENV).nnodes == 2


def test_a_secret_is_asked_for_and_has_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="launch_secret_file is not given; write"):
        secret_of(ENV)
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match="secret': No such file"):
        secret_of(replace(ENV, launch_secret_file=str(file)))
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="has 5 bytes; a secret has at least 16"):
        secret_of(replace(ENV, launch_secret_file=str(file)))
    file.write_bytes(SECRET + b"\n")
    assert secret_of(replace(ENV, launch_secret_file=str(file))) == SECRET


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nnodes": 2, "distributed_executor_backend": "ray"}, "nnodes is 2, and Ray finds"),
        ({"nnodes": 2, "data_parallel_size": 2}, "data_parallel_size is 2, and nnodes 2"),
        (
            {"data_parallel_size": 2, "enable_expert_parallel": True, "distributed_executor_backend": "ray"},
            "distributed_executor_backend is ray, and engine groups that share experts are on one machine",
        ),
        ({"master_port": 65536}, "master_port is 65536; it must be at most 65535"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.of(model="m", **options)
