"""From a request's body to its answer: the steps that both generation endpoints take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiohttp import web

from tfserve.engine.token_buffer import exceeds
from tfserve.errors import RequestError
from tfserve.http.answer import Renderer, answer, read_body
from tfserve.http.keys import CALLER
from tfserve.http.parsing import BodyParser
from tfserve.http.ports import TokenizerPort
from tfserve.http.protocol import GenerationRequest
from tfserve.http.service import Service
from tfserve.types import SamplingParams

LOWERED_RATE = web.RequestKey("lowered_rate", float)
"""The rate that the request is served at, noted on the HTTP request where it is less than was asked for."""

Asked = TypeVar("Asked", bound=GenerationRequest)


@dataclass(frozen=True, slots=True)
class Job:
    """A request ready for the engine: each prompt runs once for each of `samples`, and `renderer` words the answer."""

    prompts: Sequence[Sequence[int]]
    samples: Sequence[SamplingParams]
    renderer: Renderer


class GenerationEndpoint(ABC, Generic[Asked]):
    """Answers POST requests with a Service's engine."""

    def __init__(self, service: Service, parser: BodyParser[Asked]) -> None:
        self._service = service
        self._parser = parser

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Handle one request. Raises ApiError, RequestError, QueueFullError, EngineDeadError."""
        service = self._service
        tokenizer = service.engine.tokenizer
        request[CALLER].limits.on_request()
        with service.bodies.hold() as hold:
            asked = self._parser.parse(await read_body(request, service.config.server.max_body_bytes, hold))
            service.check_model(asked.model)
            names = asked.names
            rate, max_rate = asked.reading_rate, service.config.scheduler.max_rate
            if exceeds(rate, max_rate):
                rate = request[LOWERED_RATE] = max_rate
            try:
                job = await self.prepare(asked, service.model_name, tokenizer)
            except RequestError as error:
                raise error.renamed(names) from None
        answering = answer(
            request,
            service,
            job.prompts,
            job.samples,
            job.renderer,
            rate=rate,
            priority=asked.priority or 0,
            stream=bool(asked.stream),
        )
        # The answer may take long, and what was sent need not stay for it.
        del asked, job
        try:
            return await answering
        except RequestError as error:
            raise error.renamed(names) from None

    @abstractmethod
    async def prepare(self, asked: Asked, model: str, tokenizer: TokenizerPort) -> Job:
        """What to run for a parsed body, and how to word the answer. Raises RequestError."""
