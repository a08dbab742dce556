"""Probes, metrics and the version: what operators and their tools ask."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from quire import __version__
from quire.engine.service import Status
from quire.server.frontend import frontend_of, json_response
from quire.server.load import HEADER, Load

router = APIRouter()


@router.get("/livez")
async def livez() -> Response:
    """The server's process runs; whether its engine does is /readyz's business."""
    return PlainTextResponse("ok")


@router.get("/readyz")
async def readyz(http: HttpRequest) -> Response:
    """Send requests here now."""
    status = frontend_of(http).status
    return PlainTextResponse(status.value, 200 if status is Status.READY else 503)


@router.get("/startupz")
async def startupz(http: HttpRequest) -> Response:
    """The engine has been ready once."""
    started = frontend_of(http).service.status is not Status.STARTING
    return PlainTextResponse("started" if started else "starting", 200 if started else 503)


@router.get("/health")
@router.get("/ping")
@router.post("/ping")
async def health(http: HttpRequest) -> Response:
    """As vLLM's: 200 while requests are taken, and through restarts of the engine."""
    taken = frontend_of(http).status in (Status.READY, Status.RESTARTING)
    return Response(status_code=200 if taken else 503)


@router.get("/version")
async def version() -> Response:
    """Which Quire this is."""
    return json_response({"version": __version__})


@router.get("/load")
async def load(http: HttpRequest) -> Response:
    """How many calls wait for the engine, in all frontends at this port; in a header, how busy it is."""
    collector, num_calls = await frontend_of(http).scrape()
    response = json_response({"server_load": num_calls})
    response.headers[HEADER] = str(Load.collected(collector))
    return response


@router.get("/metrics")
async def metrics(http: HttpRequest) -> Response:
    """Prometheus' text format, under vLLM's names."""
    front = frontend_of(http)
    front.check_ready()
    collector, _ = await front.scrape()
    return Response(generate_latest(collector), media_type=CONTENT_TYPE_LATEST)
