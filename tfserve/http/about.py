"""What the server says about itself: its model, its version, and whether it can serve."""

from __future__ import annotations

from aiohttp import web

import tfserve
from tfserve.http.replies import ModelCard, ModelList, Status, Version, json_response
from tfserve.http.route import Route, register
from tfserve.http.service import SERVICE, Phase, Service


async def models(request: web.Request) -> web.Response:
    """GET /v1/models."""
    return json_response(ModelList([_card(request.app[SERVICE])]))


async def model(request: web.Request) -> web.Response:
    """GET /v1/models/{id}; 404 for a model that is not served."""
    service = request.app[SERVICE]
    card = _card(service)
    service.check_model(request.match_info["id"])
    return json_response(card)


async def health(request: web.Request) -> web.Response:
    """GET /health: the engine's counts; 503 unless it is loaded, alive and making progress."""
    status, stats = request.app[SERVICE].health()
    return json_response(Status(status), 503) if stats is None else json_response(Status(status, stats))


async def ready(request: web.Request) -> web.Response:
    """GET /ready: 503 unless new requests are admitted by an engine that makes progress."""
    status, _ = request.app[SERVICE].health()
    return json_response(Status(status), 200 if status == Phase.READY else 503)


async def version(_request: web.Request) -> web.Response:
    """GET /version."""
    return json_response(Version(tfserve.__version__))


def _card(service: Service) -> ModelCard:
    return ModelCard(service.model_name, service.created, service.engine.info.max_model_len)


register(
    Route("GET", "/v1/models", models, "The model that is served", ModelList, errors=(503,)),
    Route("GET", "/v1/models/{id:.+}", model, "One model", ModelCard, errors=(404, 503)),
    Route(
        "GET",
        "/health",
        health,
        "Whether the engine is loaded, alive and making progress",
        Status,
        also={503: "Loading, dead or stuck."},
        is_open=True,
    ),
    Route(
        "GET",
        "/ready",
        ready,
        "Whether new requests are admitted",
        Status,
        also={503: "Loading, draining, dead or stuck."},
        is_open=True,
    ),
    Route("GET", "/version", version, "The server's version", Version, is_open=True),
)
