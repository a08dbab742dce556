"""Where a process stands among those that were started, on several machines, for one engine. Loads no torch.

Whoever starts them says it by options (`--nnodes` and `--node-rank`), or by the variables of torchrun or of Kubernetes'
LeaderWorkerSet. The first one has rank 0, the scheduler and the server; the others have ranks, and obey.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quire.config import Config
from quire.errors import ConfigError

SECRET_BYTES = 16  # at least
PORT = 29501
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LWS = ("LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "LWS_LEADER_ADDRESS")


@dataclass(frozen=True, slots=True)
class Site:
    """One of `num_processes` that are given the same number of ranks each, in their order.

    Attributes:
        process: which of them; 0 leads.
        beside: how many of them are on this machine.
        index: which of those this one is.
        address, port: where the others meet the first one.
    """

    process: int = 0
    num_processes: int = 1
    beside: int = 1
    index: int = 0
    address: str = ""
    port: int = 0

    @property
    def num_machines(self) -> int:
        return self.num_processes // self.beside

    def ranks(self, size: int) -> range:
        """Of a group of so many, those that this process has.

        Raises:
            ConfigError: they cannot be shared out.
        """
        each, rest = divmod(size, self.num_processes)
        if rest:
            raise ConfigError(
                f"an engine group has {size} ranks, which {self.num_processes} processes cannot share out equally;"
                " start as many as divide it, or change the sizes of its axes (tensor_parallel_size)"
            )
        return range(self.process * each, (self.process + 1) * each)


def site_of(config: Config) -> Site:
    """Where this process stands, by its options or, with the launcher `env`, by its environment.

    Raises:
        ConfigError: something is missing, or contradicts the rest.
    """
    if config.distributed_executor_backend == "env":
        site = _of_environment(config)
    else:
        port = config.master_port or PORT
        site = Site(config.node_rank, config.nnodes, address=config.master_addr, port=port)
    if site.beside < 1 or not 0 <= site.process < site.num_processes or site.num_processes % site.beside:
        raise ConfigError(
            f"process {site.process} of {site.num_processes}, {site.beside} on each machine, cannot be: numbers begin"
            " at 0"
        )
    return site


def located(config: Config) -> Config:
    """The options, with what the environment says of machines.

    Raises:
        ConfigError: it says nothing, or what cannot be.
    """
    site = site_of(config)
    if config.data_parallel_size > 1 and site.num_processes > 1:
        raise ConfigError(
            f"data_parallel_size is {config.data_parallel_size}, and {site.num_processes} processes have the ranks of"
            " one engine group; start a server for each group, and quire router in front of them"
        )
    return dataclasses.replace(config, nnodes=site.num_machines, node_rank=site.process // site.beside)


def secret_of(config: Config) -> bytes:
    """What all processes of a launch know and nobody else.

    Raises:
        ConfigError: there is no such file, or too little in it.
    """
    if config.launch_secret_file is None:
        raise ConfigError(
            "the ranks are started in several places, and launch_secret_file is not given; write a secret into a file"
            " (head -c 32 /dev/urandom | base64 > FILE), and give that to all of them"
        )
    try:
        secret = Path(config.launch_secret_file).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"launch_secret_file {config.launch_secret_file!r}: {error.strerror}") from None
    if len(secret) < SECRET_BYTES:
        raise ConfigError(
            f"launch_secret_file {config.launch_secret_file!r} has {len(secret)} bytes; a secret has at least"
            f" {SECRET_BYTES}"
        )
    return secret


def _of_environment(config: Config) -> Site:
    found = {
        "RANK": os.environ.get("RANK"),
        "WORLD_SIZE": os.environ.get("WORLD_SIZE"),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK"),
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE"),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR"),
        "MASTER_PORT": os.environ.get("MASTER_PORT"),
        "LWS_WORKER_INDEX": os.environ.get("LWS_WORKER_INDEX"),
        "LWS_GROUP_SIZE": os.environ.get("LWS_GROUP_SIZE"),
        "LWS_LEADER_ADDRESS": os.environ.get("LWS_LEADER_ADDRESS"),
    }
    if all(found[name] for name in TORCHRUN):
        port = _number(found, "MASTER_PORT")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun itself listens there
            port += 1
        return Site(
            _number(found, "RANK"),
            _number(found, "WORLD_SIZE"),
            _number(found, "LOCAL_WORLD_SIZE"),
            _number(found, "LOCAL_RANK"),
            address=str(found["MASTER_ADDR"]),
            port=config.master_port or port,
        )
    if all(found[name] for name in LWS):
        place = _number(found, "LWS_WORKER_INDEX"), _number(found, "LWS_GROUP_SIZE")
        return Site(*place, address=str(found["LWS_LEADER_ADDRESS"]), port=config.master_port or PORT)
    raise ConfigError(
        "distributed_executor_backend is env, and the environment has neither all of torchrun's variables"
        f" ({', '.join(TORCHRUN)}) nor of LeaderWorkerSet's ({', '.join(LWS)}); use local, with --nnodes and"
        " --node-rank"
    )


def _number(found: Mapping[str, str | None], name: str) -> int:
    try:
        return int(found[name] or "")
    except ValueError:
        raise ConfigError(f"the environment's {name} is {found[name]!r}; it must be a whole number") from None
