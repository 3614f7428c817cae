"""From a request's body to its answer: the steps that both generation endpoints take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from aiohttp import web

from tfserve.engine.scheduling.token_buffer import exceeds
from tfserve.errors import RequestError
from tfserve.http.answer import Job, answer, read_body
from tfserve.http.keys import CALLER
from tfserve.http.off_loop import off_loop
from tfserve.http.parsing import BodyParser
from tfserve.http.ports import EnginePort
from tfserve.http.protocol import GenerationRequest
from tfserve.http.service import Service
from tfserve.types import Tenant

LOWERED_RATE = web.RequestKey("lowered_rate", float)
"""The rate that the request is served at, noted on the HTTP request where it is less than was asked for."""

Asked = TypeVar("Asked", bound=GenerationRequest)


class GenerationEndpoint(ABC, Generic[Asked]):
    """Answers POST requests with a Service's engine."""

    def __init__(self, service: Service, parser: BodyParser[Asked]) -> None:
        self._service = service
        self._parser = parser

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Handle one request. Raises ApiError, RequestError, QueueFullError, EngineDeadError."""
        service = self._service
        engine = service.engine
        caller = request[CALLER]
        caller.limits.on_request()
        with service.bodies.hold() as hold:
            body = await read_body(request, service.config.server.max_body_bytes, hold)
            asked = await off_loop(len(body), self._parser.parse, body)
            service.check_model(asked.model)
            names = asked.names
            rate, max_rate = asked.reading_rate, service.config.scheduler.max_rate
            if exceeds(rate, max_rate):
                rate = request[LOWERED_RATE] = max_rate
            try:
                job = await self.prepare(asked, len(body), service.model_name, engine, caller.tenant)
            except RequestError as error:
                raise error.renamed(names) from None
        priority, stream = asked.priority or 0, bool(asked.stream)
        answering = answer(request, service, job, rate=rate, priority=priority, stream=stream)
        # The answer may take long, and what was sent need not stay for it.
        del body, asked, job
        try:
            return await answering
        except RequestError as error:
            raise error.renamed(names) from None

    @abstractmethod
    async def prepare(self, asked: Asked, size: int, model: str, engine: EnginePort, tenant: Tenant) -> Job:
        """What to run for a parsed body of `size` bytes, and how to word the answer. Raises RequestError."""
