"""From a request's body to its answer: the steps that both generation endpoints take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from aiohttp import web

from tfserve.errors import RequestError
from tfserve.http.answer import Job, answer, read_body
from tfserve.http.off_loop import off_loop
from tfserve.http.parsing import BodyParser
from tfserve.http.ports import EnginePort
from tfserve.http.protocol import GenerationRequest
from tfserve.http.service import Service

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
        body = await read_body(request, service.config.server.max_body_bytes)
        asked = await off_loop(len(body), self._parser.parse, body)
        service.check_model(asked.model)
        try:
            job = await self.prepare(asked, len(body), service.model_name, engine)
            return await answer(
                request,
                service,
                job,
                rate=asked.reading_rate,
                priority=asked.priority or 0,
                stream=bool(asked.stream),
            )
        except RequestError as error:
            raise error.renamed(asked.names) from None

    @abstractmethod
    async def prepare(self, asked: Asked, size: int, model: str, engine: EnginePort) -> Job:
        """What to run for a parsed body of `size` bytes, and how to word the answer. Raises RequestError."""
