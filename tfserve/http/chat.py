"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import msgspec
from aiohttp import web

from tfserve.http.answer import Result, answer, encode, read_body
from tfserve.http.parsing import chat_parser
from tfserve.http.ports import TokenizerPort
from tfserve.http.replies import (
    UNSET,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    Delta,
    TopLogprob,
    Usage,
)
from tfserve.http.service import Service
from tfserve.http.sse import event
from tfserve.types import RequestOutput, TokenLogprob


class ChatRenderer:
    """One chat answer in OpenAI's words."""

    def __init__(self, model: str, tokenizer: TokenizerPort, include_usage: bool) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._model = model
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._usage = None if include_usage else UNSET
        self._include_usage = include_usage
        self._started: set[int] = set()
        self._encode = msgspec.json.Encoder().encode

    def chunk(self, index: int, output: RequestOutput) -> bytes:
        """Events for what is new in choice `index`: the role comes first, the finish reason with the last text."""
        if not (output.text or output.logprobs or output.finished):
            return b""
        start = b""
        if index not in self._started:
            self._started.add(index)
            start = self._event([ChatChunkChoice(index, Delta(role="assistant", content=""))])
        delta = Delta(content=output.text) if output.text else Delta()
        logprobs = self._logprobs(output.logprobs)
        return start + self._event([ChatChunkChoice(index, delta, logprobs, output.finish_reason)])

    def template(self, index: int) -> tuple[bytes, bytes] | None:
        """What surrounds the text in every further event of choice `index` that has nothing else."""
        before, after = self._event([ChatChunkChoice(index, Delta(content=self.id))]).rsplit(self._encode(self.id), 1)
        return before, after

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event with token counts; empty when the client did not ask for it."""
        return self._event([], usage) if self._include_usage else b""

    def whole(self, results: Sequence[Result], usage: Usage) -> bytes:
        """The JSON body of an answer that is not streamed."""
        choices = [
            ChatChoice(
                index,
                AssistantMessage("".join(result.text)),
                self._logprobs(result.logprobs),
                result.finish_reason,
            )
            for index, result in enumerate(results)
        ]
        return self._encode(ChatCompletion(self.id, self._created, self._model, choices, usage))

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> bytes:
        return event(
            self._encode(ChatChunk(self.id, self._created, self._model, choices, usage or self._usage)),
        )

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
        if not entries:
            return None
        return ChatLogprobs([self._token(entry) for entry in entries])

    def _token(self, entry: TokenLogprob) -> ChatTokenLogprob:
        raw = self._tokenizer.token_bytes(entry.token_id)
        top = [self._alternative(token_id, logprob) for token_id, logprob in entry.top]
        return ChatTokenLogprob(raw.decode(errors="replace"), entry.logprob, list(raw), top)

    def _alternative(self, token_id: int, logprob: float) -> TopLogprob:
        raw = self._tokenizer.token_bytes(token_id)
        return TopLogprob(raw.decode(errors="replace"), logprob, list(raw))


class ChatEndpoint:
    """Answers chat requests with a Service's engine."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = chat_parser()

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Handle one request. Raises ApiError, RequestError, QueueFullError, EngineDeadError."""
        service = self._service
        engine = service.engine
        asked = self._parser.parse(await read_body(request, service.config.server.max_body_bytes))
        service.check_model(asked.model)
        params = asked.sampling_params()
        renderer = ChatRenderer(service.model_name, engine.tokenizer, asked.include_usage)
        text = engine.tokenizer.apply_chat_template(asked.conversation())
        # The template has written the special tokens already.
        prompt = await encode(engine.tokenizer, text, add_special_tokens=False)
        rate = asked.consumption_rate
        return await answer(request, service, [prompt], params, renderer, rate=rate, stream=bool(asked.stream))
