"""From a request's body to its answer: the steps that both generation endpoints take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiohttp import web

from tfserve.errors import RequestError
from tfserve.http.answer import Renderer, answer, read_body
from tfserve.http.keys import CALLER
from tfserve.http.parsing import BodyParser
from tfserve.http.ports import TokenizerPort
from tfserve.http.protocol import GenerationRequest
from tfserve.http.service import Service
from tfserve.types import SamplingParams

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
        asked = self._parser.parse(await read_body(request, service.config.server.max_body_bytes))
        service.check_model(asked.model)
        try:
            job = await self.prepare(asked, service.model_name, tokenizer)
            return await answer(
                request,
                service,
                job.prompts,
                job.samples,
                job.renderer,
                rate=asked.reading_rate,
                priority=asked.priority or 0,
                stream=bool(asked.stream),
            )
        except RequestError as error:
            raise error.renamed(asked.names) from None

    @abstractmethod
    async def prepare(self, asked: Asked, model: str, tokenizer: TokenizerPort) -> Job:
        """What to run for a parsed body, and how to word the answer. Raises RequestError."""
