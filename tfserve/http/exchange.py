"""One API request's streams in the engine, read together and ended together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec import UnsetType

from tfserve.http.errors import ApiError, unavailable
from tfserve.http.ports import EnginePort, StreamPort
from tfserve.http.replies import Usage
from tfserve.types import ConsumptionRate, FinishReason, RequestOutput, SamplingParams


class Exchange:
    """The streams of one API request, numbered in the order of `submit`."""

    def __init__(self, engine: EnginePort) -> None:
        self._engine = engine
        self._streams: list[StreamPort] = []
        self._unfinished: set[int] = set()
        self._reads: dict[asyncio.Task[RequestOutput | None], int] = {}
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._patience: asyncio.Timeout | None = None
        self._abort_reason = ""

    def submit(
        self,
        prompt: str | Sequence[int],
        samples: Sequence[SamplingParams],
        request_id: str,
        rate: ConsumptionRate | UnsetType,
    ) -> None:
        """Queue a prompt once for each of `samples`. Raises RequestError, QueueFullError, EngineDeadError."""
        for params in samples:
            number = len(self._streams)
            stream = self._engine.submit(prompt, params, request_id=f"{request_id}-{number}", rate=rate)
            self._unfinished.add(number)
            self._streams.append(stream)
        self._num_prompt_tokens += self._streams[-1].num_prompt_tokens

    @property
    def finished(self) -> bool:
        """True once every stream has given its last output."""
        return not self._unfinished

    @property
    def usage(self) -> Usage:
        """Tokens so far over all streams; a prompt of several streams counts once."""
        prompt, output = self._num_prompt_tokens, self._num_output_tokens
        return Usage(prompt, output, prompt + output)

    async def next(self, timeout_s: float | None) -> list[tuple[int, RequestOutput]]:
        """What is new, as (stream number, output) in stream order; empty after `timeout_s` of silence.

        Raises EngineDeadError, and ApiError when a stream ended by an error or an abort.
        """
        batch: list[tuple[int, RequestOutput]] = []
        try:
            async with asyncio.timeout(timeout_s) as self._patience:
                batch = await (self._read_one() if len(self._streams) == 1 else self._read_many())
        except TimeoutError:
            pass
        finally:
            self._patience = None
        for index, output in batch:
            self._num_output_tokens += len(output.token_ids)
            if output.finished:
                self._unfinished.discard(index)
            if output.finish_reason is FinishReason.ERROR:
                message = output.error or "The engine failed on this request."
                raise ApiError(500, message, kind="server_error", code="generation_failed")
            if output.finish_reason is FinishReason.ABORT:
                raise unavailable(self._abort_reason or "The request was aborted.", "aborted")
        if self._abort_reason and self._unfinished:
            raise unavailable(self._abort_reason, "aborted")
        return batch

    async def _read_one(self) -> list[tuple[int, RequestOutput]]:
        output = await self._streams[0].next()
        return [] if output is None else [(0, output)]

    async def _read_many(self) -> list[tuple[int, RequestOutput]]:
        for index in self._unfinished - set(self._reads.values()):
            self._reads[asyncio.ensure_future(self._streams[index].next())] = index
        done, _ = await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
        for read in done:
            read.exception()  # marks it as seen: where several streams fail at once, one is reported
        outputs = [(self._reads.pop(read), read.result()) for read in done]
        return sorted(((index, output) for index, output in outputs if output is not None), key=lambda pair: pair[0])

    def abort(self, reason: str) -> None:
        """Stop what is unfinished; `next` raises ApiError with `reason`, at once, even if the engine is busy."""
        self._abort_reason = reason
        for index in self._unfinished:
            self._streams[index].abort()
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())

    def close(self) -> None:
        """Stop whatever is unfinished without waiting for it; nothing more is read."""
        for index in self._unfinished:
            self._streams[index].abort()
        self._unfinished.clear()
        for read in self._reads:
            if not read.cancel():
                read.exception()
        self._reads.clear()
