"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence

import msgspec
from aiohttp import web

from tfserve.http.answer import Result, answer, encode, read_body
from tfserve.http.parsing import completion_parser
from tfserve.http.ports import TokenizerPort
from tfserve.http.replies import UNSET, Completion, CompletionChoice, CompletionLogprobs, Usage
from tfserve.http.service import Service
from tfserve.http.sse import event
from tfserve.types import RequestOutput, TokenLogprob


class CompletionRenderer:
    """One completion, with a choice per prompt, in OpenAI's words."""

    def __init__(self, model: str, tokenizer: TokenizerPort, include_usage: bool) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._model = model
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._usage = None if include_usage else UNSET
        self._include_usage = include_usage
        self._offsets: defaultdict[int, int] = defaultdict(int)
        self._encode = msgspec.json.Encoder().encode

    def chunk(self, index: int, output: RequestOutput) -> bytes:
        """The event for what is new in choice `index`; the finish reason comes with the last text."""
        if not (output.text or output.logprobs or output.finished):
            return b""
        logprobs = self._logprobs(index, output.logprobs)
        return self._event([CompletionChoice(index, output.text, logprobs, output.finish_reason)])

    def template(self, index: int) -> tuple[bytes, bytes] | None:
        """What surrounds the text in every further event of choice `index` that has nothing else."""
        before, after = self._event([CompletionChoice(index, self.id)]).rsplit(self._encode(self.id), 1)
        return before, after

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event with token counts; empty when the client did not ask for it."""
        return self._event([], usage) if self._include_usage else b""

    def whole(self, results: Sequence[Result], usage: Usage) -> bytes:
        """The JSON body of an answer that is not streamed."""
        choices = [
            CompletionChoice(index, "".join(result.text), self._logprobs(index, result.logprobs), result.finish_reason)
            for index, result in enumerate(results)
        ]
        return self._encode(Completion(self.id, self._created, self._model, choices, usage))

    def _event(self, choices: list[CompletionChoice], usage: Usage | None = None) -> bytes:
        return event(self._encode(Completion(self.id, self._created, self._model, choices, usage or self._usage)))

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob] | None) -> CompletionLogprobs | None:
        if not entries:
            return None
        tokens = [self._text(entry.token_id) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        chosen = [entry.logprob for entry in entries]
        tops = [self._alternatives(entry) for entry in entries] if any(entry.top for entry in entries) else None
        return CompletionLogprobs(offsets, chosen, tokens, tops)

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the chosen one; where two read the same, the likelier stands."""
        table: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            table.setdefault(self._text(token_id), logprob)
        return table

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


class CompletionEndpoint:
    """Answers completion requests with a Service's engine."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = completion_parser()

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Handle one request. Raises ApiError, RequestError, QueueFullError, EngineDeadError."""
        service = self._service
        engine = service.engine
        asked = self._parser.parse(await read_body(request, service.config.server.max_body_bytes))
        service.check_model(asked.model)
        params = asked.sampling_params()
        renderer = CompletionRenderer(service.model_name, engine.tokenizer, asked.include_usage)
        prompts = []
        for prompt in asked.prompts():
            if isinstance(prompt, str):
                prompts.append(await encode(engine.tokenizer, prompt, add_special_tokens=True))
                # Many prompts of moderate length: let other requests in between two of them.
                await asyncio.sleep(0)
            else:
                prompts.append(prompt)
        rate = asked.consumption_rate
        return await answer(request, service, prompts, params, renderer, rate=rate, stream=bool(asked.stream))
