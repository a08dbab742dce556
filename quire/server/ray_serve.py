"""A Ray Serve deployment: Serve has the port, the replicas and their number; each replica is an engine with our routes.

Serve's own proxies pass on what clients and routes say, streams included, and know nothing of what it means.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from quire.config import Config
from quire.engine.remote import RemoteEngine
from quire.engine.service import Status
from quire.errors import ConfigError, EngineDead
from quire.server.app import wrap
from quire.server.auth import admission_of
from quire.server.counts import of_server
from quire.server.frontend import Frontend
from quire.server.load import Load
from quire.server.settings import ServerSettings

SERVES = {  # options of a server's own port and processes, which are Serve's here
    *("host", "port", "ssl_certfile", "ssl_keyfile", "api_server_count", "drain_timeout"),
    *("admin_socket", "admin_host", "admin_port", "admin_key_file"),
}
POLICY = "quire.server.ray_serve:autoscale"
PRESSURE = "quire_pressure"
WAIT_S = 1.0  # expected of a new request, which is as much as a full replica without a queue
PRESSURE_WANTED = 0.7  # of a replica


def serve_app(
    model: str,
    *,
    num_replicas: int | None = None,
    autoscaling: Mapping[str, Any] | None = None,
    max_ongoing_requests: int = 256,
    server: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """An application for `ray.serve.run`, or for a Serve config that imports it: OpenAI's API over a model.

    A replica has a CPU, and a GPU for each rank, or without GPUs a CPU for each. With several ranks and
    `distributed_executor_backend="ray"` these are a placement group's bundles, on as many nodes as it takes.

    Args:
        model: see `quire.LLM`.
        num_replicas: how many engines; None: one, or as `autoscaling` finds.
        autoscaling: Serve's autoscaling options (`min_replicas`, `max_replicas`, ...). Replicas are added and removed
            by how full they are and how long a new request would wait, unless these have a `policy`.
        max_ongoing_requests: that Serve sends to a replica at once.
        server: options of `quire serve`'s HTTP, such as `api_key_file`; none of its port, which is Serve's.
        options: any field of `quire.config.Config`.

    Raises:
        ConfigError: an option is unknown or cannot work here, or Ray Serve is not installed.
    """
    from quire.engine.device import mesh_of  # loads torch
    from quire.engine.placement import find_ray

    find_ray()
    from ray import serve

    config = Config.of(model=model, **options)
    settings = dict(server or {})
    _check(config, settings, num_replicas, autoscaling)
    settings.setdefault("served_model_name", (model,))
    placed: dict[str, Any] = {}
    first, others = _bundles(config, mesh_of(config).size)
    if others:
        placed = {"placement_group_bundles": [first, *others], "placement_group_strategy": "PACK"}
    scaling: dict[str, Any] = {"num_replicas": num_replicas or 1}
    if autoscaling is not None:
        scaling = {"autoscaling_config": {"policy": {"policy_function": POLICY}, **autoscaling}}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="quire",
        ray_actor_options={"num_cpus": first.get("CPU", 0), "num_gpus": first.get("GPU", 0)},
        max_ongoing_requests=max_ongoing_requests,
        graceful_shutdown_timeout_s=ServerSettings().drain_timeout,
        **placed,
        **scaling,
    )
    return deployment.bind({**options, "model": model}, settings)


class Replica:
    """An engine in an actor of Serve's, which calls these methods."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, options: dict[str, Any], settings: dict[str, Any]
    ) -> None:
        import ray

        if options.get("distributed_executor_backend") == "ray":  # in the engine's process, too
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
            group = ray.util.get_current_placement_group()
            options = {**options, "ray_placement_group": None if group is None else group.id.hex()}
        found = ServerSettings(**settings)
        self.engine = RemoteEngine(Config.of(**options), admission=admission_of(found))
        of_server(self.engine.metrics, found)
        await self.engine.start()
        self.front = Frontend(self.engine, found)

    def __serve_build_asgi_app__(self) -> ASGIApp:  # noqa: PLW3201  Serve's name
        return without_lifespan(wrap(self.front))

    def check_health(self) -> None:
        """A replica whose engine will not come back is replaced; one whose engine is started again is not."""
        if self.engine.status is Status.DEAD:
            raise EngineDead("the engine is dead")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """How much this replica has to do; see `pressure`."""
        metrics, most = self.engine.metrics, self.engine.config.max_num_seqs or 1
        load = Load.of(metrics)
        if load is None:  # nothing was computed yet
            return {PRESSURE: 0.0}
        wait_s = metrics.steps.saturation["seconds"].value
        return {PRESSURE: pressure(max(load.kv_use, load.running / most), wait_s)}

    async def __del__(self) -> None:
        await self.front.close()
        self.engine.shutdown()


def pressure(occupied: float, wait_s: float) -> float:
    """1 is a replica that is full, and where nobody waits.

    Args:
        occupied: share of its cache, or of the sequences that may run at once, that is in use.
        wait_s: that a new request has to expect.
    """
    return occupied + wait_s / WAIT_S


def num_wanted(pressures: list[float]) -> int:
    """How many replicas would have as much to do as they should, of what these have."""
    return max(math.ceil(sum(pressures) / PRESSURE_WANTED), 1)


def autoscale(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's policy: `context` is its AutoscalingContext. Serve keeps to limits and delays."""
    found = (context.aggregated_metrics or {}).get(PRESSURE)
    return (num_wanted(list(found.values())) if found else context.target_num_replicas), {}


def without_lifespan(app: ASGIApp) -> ASGIApp:
    """An application over one that begins and ends without being told, and knows only requests."""

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await app(scope, receive, send)
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        return await send({"type": "lifespan.shutdown.complete"})

    return answering


def _bundles(config: Config, size: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What a replica needs, with the ranks that are on its machine; and each of the others."""
    cpus = float(max((config.num_threads or size) // size, 1))
    rank, own = ({"CPU": cpus}, 0.0) if config.device == "cpu" else ({"GPU": 1.0}, 1.0)
    if config.distributed_executor_backend == "ray":
        return {"CPU": own, **rank}, [rank] * (size - 1)
    return {"CPU": own, **{name: n * size for name, n in rank.items()}}, []


def _check(
    config: Config,
    server: Mapping[str, Any],
    num_replicas: int | None,
    autoscaling: Mapping[str, Any] | None,
) -> None:
    if wrong := sorted(SERVES & server.keys()):
        raise ConfigError(
            f"server has {', '.join(wrong)}, which Ray Serve decides; say it to Serve, and leave it out"
        )
    if unknown := sorted(server.keys() - ServerSettings.__dataclass_fields__.keys()):
        raise ConfigError(
            f"server has {', '.join(unknown)}, and there are no such options; see quire serve --help"
        )
    found = ServerSettings(**server)
    if found.response_store_bytes and (autoscaling is not None or (num_replicas or 1) > 1):
        raise ConfigError(
            f"response_store_bytes is {found.response_store_bytes}, and a replica does not find the responses of"
            " another; use one replica, or leave it out"
        )
    if num_replicas is not None and autoscaling is not None:
        raise ConfigError(
            f"num_replicas is {num_replicas}, and autoscaling is given, which finds their number; leave one of them out"
        )
    for name in ("data_parallel_size", "nnodes"):
        if (value := getattr(config, name)) > 1:
            raise ConfigError(
                f"{name} is {value}, and a replica is one engine group that Ray places; use num_replicas"
            )
    if config.distributed_executor_backend == "env":
        raise ConfigError("distributed_executor_backend is env, and Ray starts replicas; use ray or local")
    if config.ray_placement_group is not None:
        raise ConfigError("ray_placement_group is given, and each replica has one of its own; leave it out")
