"""From a request's body to its answer: the steps that both generation endpoints take."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiohttp import web

from tfserve.engine.engine import Engine
from tfserve.engine.scheduling.token_buffer import exceeds
from tfserve.errors import RequestError
from tfserve.http.answer import Job, answer
from tfserve.http.keys import CALLER
from tfserve.http.parsing import BodyParser
from tfserve.http.protocol import GenerationRequest
from tfserve.http.reading import ASKED_ERRORS, asked_of
from tfserve.http.service import SERVICE
from tfserve.types import Tenant

ERRORS = (*ASKED_ERRORS, 500)
"""Statuses of generation endpoints, beside those of reading a body."""

LOWERED_RATE = web.RequestKey("lowered_rate", float)
"""The rate that the request is served at, noted on the HTTP request where it is less than was asked for."""

Asked = TypeVar("Asked", bound=GenerationRequest)

Prepare = Callable[[Asked, int, str, Engine, Tenant], Awaitable[Job]]
"""What to run for a parsed body of so many bytes, and how to word the answer of the model of this name."""


async def generate(request: web.Request, parser: BodyParser[Asked], prepare: Prepare[Asked]) -> web.StreamResponse:
    """Answer one request. Raises ApiError, RequestError, QueueFullError, EngineDeadError."""
    service = request.app[SERVICE]
    engine = service.engine
    async with asked_of(request, parser) as (asked, size):
        names = asked.names
        rate, max_rate = asked.reading_rate, service.config.scheduler.max_rate
        if exceeds(rate, max_rate):
            rate = request[LOWERED_RATE] = max_rate
        try:
            job = await prepare(asked, size, service.model_name, engine, request[CALLER].tenant)
        except RequestError as error:
            raise error.renamed(names) from None
    priority, stream = asked.priority or 0, bool(asked.stream)
    answering = answer(request, service, job, rate=rate, priority=priority, stream=stream)
    # The answer may take long, and what was sent need not stay for it.
    del asked, job
    try:
        return await answering
    except RequestError as error:
        raise error.renamed(names) from None
