"""One API request's streams in the engine, read together and ended together."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence

from msgspec import UNSET, UnsetType

from tfserve.engine.engine import Engine
from tfserve.engine.frontend.stream import RequestStream
from tfserve.http.errors import ApiError, too_many, unavailable
from tfserve.http.replies import Usage
from tfserve.types import (
    ONE_TENANT,
    ConsumptionRate,
    FinishReason,
    RequestOutput,
    RequestTimes,
    SamplingParams,
    Tenant,
)


class RequestGroup:
    """The streams of one API request of `tenant`, numbered in the order of `submit`.

    Read it by `next`, or `listen` and `take`. `on_end` gets every stream that has ended, with its last output.
    """

    def __init__(
        self, engine: Engine, on_end: Callable[[RequestStream, RequestOutput], None], tenant: Tenant = ONE_TENANT
    ) -> None:
        self.tenant = tenant
        self._engine = engine
        self._on_end = on_end
        self._streams: list[RequestStream] = []
        self._unfinished: set[int] = set()
        self._fresh: dict[int, None] = {}
        self._news = asyncio.Event()
        self._listener: Callable[[], None] = self._news.set
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._times: list[RequestTimes] = []
        self._abort_reason = ""
        self._is_over_for_good = False

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        num_choices: int,
        request_id: str,
        *,
        rate: ConsumptionRate | UnsetType,
        priority: int,
    ) -> None:
        """Queue a prompt once for each of its choices. Raises RequestError, QueueFullError, EngineDeadError."""
        begin = len(self._streams)
        names = [f"{request_id}-{number}" for number in range(begin, begin + num_choices)]
        streams = self._engine.submit_choices(prompt, params, names, rate=rate, priority=priority, tenant=self.tenant)
        for stream in streams:
            number = len(self._streams)
            stream.on_output = functools.partial(self._note, number)
            self._unfinished.add(number)
            self._streams.append(stream)
        self._num_prompt_tokens += self._streams[-1].num_prompt_tokens

    @property
    def finished(self) -> bool:
        """True once every stream has given its last output."""
        return not self._unfinished

    @property
    def has_more(self) -> bool:
        """True while there is something to take."""
        return bool(self._fresh)

    @property
    def unfinished(self) -> Sequence[int]:
        """Numbers of the streams that have more to give."""
        return sorted(self._unfinished)

    @property
    def streams(self) -> Sequence[RequestStream]:
        """The streams, by their numbers."""
        return self._streams

    @property
    def num_generated(self) -> int:
        """Tokens that have come of all streams, taken or not."""
        return sum(len(stream.token_s) for stream in self._streams)

    @property
    def usage(self) -> Usage:
        """Tokens so far over all streams; a prompt counts once. Preemptions and waits are of ended streams."""
        prompt, output = self._num_prompt_tokens, self._num_output_tokens
        usage = Usage(prompt, output, prompt + output)
        if self._times:
            usage.num_preemptions = sum(times.num_preemptions for times in self._times)
            stalls = [times.stall_s for times in self._times if times.stall_s is not None]
            usage.stall_s = round(sum(stalls), 3) if stalls else UNSET
            firsts = [times.first_token_s - times.arrival_s for times in self._times if times.first_token_s is not None]
            usage.ttft_s = round(max(firsts), 4) if firsts else UNSET
        return usage

    async def admitted(self) -> None:
        """Wait until every stream has been let in. Raises ApiError (429) if one is refused, else as `take`."""
        while not all(stream.started for stream in self._streams):
            await self._news.wait()
            self._news.clear()
            for index, stream in enumerate(self._streams):
                if stream.is_refused and (output := stream.take()) is not None:
                    self._end(index, output)
            self.check_aborted()

    async def next(self) -> list[tuple[int, RequestOutput]]:
        """Wait for something new. Raises as `take`."""
        while True:
            batch = self.take()
            if batch or self.finished:
                return batch
            await self._news.wait()
            self._news.clear()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener`, on the event loop, whenever there is something to take; from now on `next` is of no use."""
        self._listener = listener

    def take(self, index: int | None = None, most: int | None = None) -> list[tuple[int, RequestOutput]]:
        """What is new, as (stream number, output) in stream order.

        Of one stream only, if so asked, and at most `most` tokens of each; `has_more` tells of what is left.
        Raises EngineDeadError, and ApiError when a stream ended by an error or an abort.
        """
        if index is None:
            fresh, self._fresh = sorted(self._fresh), {}
        else:
            fresh = [index]
        batch: list[tuple[int, RequestOutput]] = []
        for number in fresh:
            if number in self._unfinished:
                stream = self._streams[number]
                output = stream.take(most)
                if output is not None:
                    batch.append((number, output))
                    self._num_output_tokens += len(output.token_ids)
                    if output.finish_reason is not None:
                        self._end(number, output)
                    elif most is not None and stream.num_waiting:
                        self._fresh[number] = None
        self.check_aborted()
        return batch

    def check_aborted(self) -> None:
        """Raise ApiError if `abort` was called before everything had ended."""
        if self._abort_reason and self._unfinished:
            raise self._aborted()

    def abort(self, reason: str, *, for_good: bool = False) -> None:
        """Stop what is unfinished; its reader gets an ApiError with `reason`, at once, even if the engine is busy.

        `for_good`: the request is not wanted any more, here or elsewhere.
        """
        self._abort_reason = reason
        self._is_over_for_good = for_good
        for index in sorted(self._unfinished):
            self._streams[index].abort()
        self._listener()

    def close(self) -> None:
        """Stop the unfinished streams without waiting for their end; nothing more is read."""
        for index, stream in enumerate(self._streams):
            stream.on_output = None
            if index in self._unfinished:
                stream.abort()
        self._unfinished.clear()

    def _note(self, index: int) -> None:
        self._fresh[index] = None
        self._listener()

    def _end(self, index: int, output: RequestOutput) -> None:
        """Count a stream's end; raise if it is not a good one."""
        self._unfinished.discard(index)
        self._on_end(self._streams[index], output)
        if output.times is not None:
            self._times.append(output.times)
        if output.retry_after_s is not None:
            raise too_many(output.error or "The server is overloaded.", "overloaded", output.retry_after_s)
        if output.finish_reason is FinishReason.ERROR:
            message = output.error or "The engine failed on this request."
            raise ApiError(500, message, kind="server_error", code="generation_failed", recurs=output.recurs)
        if output.finish_reason is FinishReason.ABORT:
            raise self._aborted()

    def _aborted(self) -> ApiError:
        # Without a reason, the engine itself has aborted it.
        reason = self._abort_reason or "The request was aborted."
        return unavailable(reason, "aborted", recurs=self._is_over_for_good)
