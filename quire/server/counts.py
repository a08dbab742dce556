"""What is counted of HTTP and of this process, under the names of prometheus-fastapi-instrumentator. Knows no route."""

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from starlette.types import Scope

from quire.engine.families import Families
from quire.engine.metrics import Metrics
from quire.server.settings import ServerSettings

SECONDS = (0.1, 0.5, 1.0)
METHODS = {"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"}
NO_LABELS: frozenset[str] = frozenset()
ROUTELESS = "none"  # refused before a route was found, or there is none: no label holds what a client wrote


class HttpCounts:
    """Requests by route, and how long they took until their last byte."""

    def __init__(self, families: Families):
        self.requests = families.counter(
            "http_requests",
            "HTTP requests by route, method and class of status",
            *("handler", "method", "status"),
            only=NO_LABELS,
        )
        self.seconds = families.histogram(
            "http_request_duration_seconds",
            "From an HTTP request's first byte to its answer's last",
            SECONDS,
            *("handler", "method"),
            only=NO_LABELS,
        )

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """A request that has ended; `status` is 0 if there was nobody left to tell."""
        route = scope.get("route")
        handler = ROUTELESS if route is None else route.path_format
        method = scope["method"] if scope["method"] in METHODS else ROUTELESS
        self.requests.number(handler, method, f"{status // 100 or 4}xx").value += 1
        self.seconds.tally(handler, method).observe(seconds)


def of_server(metrics: Metrics, settings: ServerSettings) -> None:
    """Make an engine's metrics a server's: the model's name is what clients call it, and the process is told of too."""
    metrics.rename(settings.served_model_name[0])
    watch_process(metrics.registry)


def watch_process(registry: CollectorRegistry) -> None:
    """Let a registry tell of this process too: memory, CPU time, descriptors, Python's version and collector."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
