"""Engine: the embedding API, also used by the HTTP server. Torch-free unless the core runs in this process."""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from msgspec import UNSET, UnsetType

from tfserve.config import EngineConfig
from tfserve.engine.frontend.core_client import Connect, connect
from tfserve.engine.frontend.finish_pace import FinishPace
from tfserve.engine.frontend.lifetime import disown_in_fork, weakly
from tfserve.engine.frontend.output_router import OutputRouter, Questions, Sink
from tfserve.engine.frontend.preparation import Conversation, RequestPreparer
from tfserve.engine.frontend.prompts import Prompt, as_batch
from tfserve.engine.frontend.stream import Collector, OutputBuffer, RequestStream
from tfserve.engine.frontend.validation import all_different, as_count, as_id, check_tenant, id_in_use
from tfserve.engine.scheduling.token_buffer import resolve_rate
from tfserve.errors import EngineDeadError, EngineStalledError, QueueFullError, RequestError, failures
from tfserve.messages import (
    AbortRequest,
    AddRequest,
    ListStreams,
    ReportPlayed,
    StepOutputs,
    StreamStates,
    ToCore,
)
from tfserve.model.loading.config import load_model_config
from tfserve.model.loading.fields import loading
from tfserve.model.loading.hub import resolve_model
from tfserve.model.text.detokenizer import Detokenizer
from tfserve.model.text.thoughts import thought_counter
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.types import (
    ONE_TENANT,
    ConsumptionRate,
    EngineInfo,
    EngineStats,
    RequestId,
    RequestOutput,
    SamplingParams,
    StreamState,
    Tenant,
)

logger = logging.getLogger(__name__)

_NO_PROGRESS_S = 120.0
"""The engine is stuck if requests are outstanding and no step ends for this long (a CPU prefill step takes 1 s)."""

_OWN_IDS = "tfserve-"
"""Prefix of the ids that the engine makes; a caller's id must not begin with it."""

_DROPPED_S = 1.0
"""How long the program waits for an unreferenced engine to end; its process is then killed."""


class Engine:
    """A model being served. Safe to use from several threads; two engines can live in one process.

    Blocks while the model loads. Raises ConfigError for settings this machine cannot meet, ModelError for a checkpoint
    that cannot be loaded. Use as a context manager, or call `shutdown`. An engine that is garbage collected, or still
    open at exit, ends too. After a fork it works only in the parent process. `config` may be just the model: a
    directory, a hub id, or "demo", which is downloaded if it is missing. `connect` starts the core; benchmarks give
    theirs.
    """

    def __init__(self, config: EngineConfig | str | Path, connect: Connect = connect) -> None:
        if not isinstance(config, EngineConfig):
            config = EngineConfig(model=str(config))
        with loading(Path(config.model)):
            path = resolve_model(config.model)
        self.config = msgspec.structs.replace(
            config,
            model=str(path),
            served_model_name=config.served_model_name or config.model.rstrip("/").split("/")[-1],
        )
        # Read here too: if the directory is not a checkpoint, the error comes before anything slow starts.
        with loading(path):
            load_model_config(path)
            self.tokenizer = Tokenizer.from_dir(path, self.config.server.control_tokens_in_messages)
        self._router = OutputRouter()
        self._own_ids = map(f"{_OWN_IDS}{{}}".format, itertools.count())
        self._questions = Questions()
        self._on_step: list[Callable[[StepOutputs], None]] = []
        self._stats: EngineStats | None = None
        self._last_news_s = time.monotonic()
        self._finish_pace = FinishPace(self._last_news_s)
        self._death: str | None = None
        self._on_death: list[Callable[[str], None]] = []
        self._state_lock = threading.Lock()
        # The client holds weak references to this object: when it is collected, the core ends.
        self._client = connect(self.config, weakly(self._deliver), weakly(self._die))
        self._end = weakref.finalize(self, self._client.close, _DROPPED_S)
        disown_in_fork(self)
        self.info: EngineInfo = self._client.info
        self._prepare = RequestPreparer(self.tokenizer, self.info, config.scheduler.default_rate)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | list[SamplingParams] | tuple[SamplingParams, ...] | None = None,
        *,
        rate: ConsumptionRate = None,
    ) -> list[RequestOutput]:
        """Run prompts to their end and return one output each, in order; blocks.

        A prompt is text or token ids (integers, an array or a tensor); `params` is one for all or one for each. Without
        `rate` the requests have no reader. Raises RequestError before anything runs if one of the prompts cannot be
        served, EngineDeadError if the engine ends meanwhile. A request that fails alone has `finish_reason` ERROR.
        """
        batch = as_batch(prompts)
        each = list(params) if isinstance(params, list | tuple) else [params] * len(batch)
        if len(each) != len(batch):
            raise RequestError("params", f"{len(batch)} prompts need as many SamplingParams (or one), got {len(each)}")
        messages = [
            self._prepare.message(prompt, one, rate, [next(self._own_ids)])
            for prompt, one in zip(batch, each, strict=True)
        ]
        collectors = [Collector(self._buffer(message, message.request_id)) for message in messages]
        try:
            for message, collector in zip(messages, collectors, strict=True):
                self._send(message, [collector])
            return [collector.result() for collector in collectors]
        except BaseException:
            for message in messages:  # the engine makes all ids
                self.abort(message.request_id)
            raise

    def chat(
        self, messages: Conversation, params: SamplingParams | None = None, *, rate: ConsumptionRate = None
    ) -> RequestOutput:
        """Answer a conversation, formatted by the model's chat template; blocks. Otherwise as `generate`."""
        return self.generate([self._prepare.prompt_of(messages, params)], params, rate=rate)[0]

    def stream_chat(
        self, messages: Conversation, params: SamplingParams | None = None, *, rate: ConsumptionRate | UnsetType = UNSET
    ) -> AsyncIterator[RequestOutput]:
        """Yield the answer to a conversation as it is generated. Otherwise as `stream`."""
        return self.stream(self._prepare.prompt_of(messages, params), params, rate=rate)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        rate: ConsumptionRate | UnsetType = UNSET,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yield a request's output as it is generated; leaving the loop early aborts it. Otherwise as `submit`."""
        stream = self.submit(prompt, params, rate=rate, priority=priority)
        try:
            while True:
                output = await stream.next()
                if output is not None:
                    yield output
                    if output.finished:
                        return
        finally:
            stream.abort()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: RequestId | None = None,
        rate: ConsumptionRate | UnsetType = UNSET,
        priority: int = 0,
        tenant: Tenant = ONE_TENANT,
    ) -> RequestStream:
        """Start a request; must be called on a running event loop.

        `request_id` names it; with None the engine makes an id, which begins with "tfserve-".
        `rate` is the reader's speed (default: `scheduler.default_rate`), for policies that schedule by buffers. They
        serve requests with rate None by `priority` (64 bits), the smallest first. Tenants share the device by their
        weights. A request that the policy refuses ends with `finish_reason` ERROR and a `retry_after_s`. Raises
        RequestError with the name of the wrong field, QueueFullError if `server.max_queued_requests` already wait,
        EngineDeadError, and EngineStalledError if the engine takes no messages; it never blocks.
        """
        self._check_queue(1, tenant)
        name = next(self._own_ids) if request_id is None else self._free_id(request_id)
        return self._start(prompt, params, [name], rate, priority=priority, tenant=tenant)[0]

    def submit_choices(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_ids: Sequence[RequestId],
        *,
        rate: ConsumptionRate | UnsetType = UNSET,
        priority: int = 0,
        tenant: Tenant = ONE_TENANT,
    ) -> list[RequestStream]:
        """Start a request for each of `request_ids`, all for one prompt, which is checked and sent once.

        A seed in `params` grows by 1 from request to request. Otherwise as `submit`; if one is refused, all are.
        """
        self._check_queue(len(request_ids), tenant)
        names = all_different([self._free_id(name) for name in request_ids])
        return self._start(prompt, params, names, rate, priority=priority, tenant=tenant)

    def abort(self, request_id: RequestId) -> None:
        """Stop a request and free what it holds; unknown and finished ids are ignored. Its stream ends as aborted."""
        self._tell(request_id, AbortRequest(request_id))

    def report_played(self, request_id: RequestId, num_tokens: int) -> None:
        """Report that the reader has read `num_tokens` of the answer. The report replaces the scheduler's estimate.

        With rate "auto" the reports also set the rate. Unknown and finished ids are ignored.
        Raises RequestError unless `num_tokens` is an integer, EngineStalledError if the engine takes no more reports.
        """
        self._tell(request_id, ReportPlayed(request_id, as_count(num_tokens, "num_tokens")))

    async def streams(self) -> list[StreamState]:
        """The state of every live request, read after the current step, without a time limit.

        Raises EngineDeadError, EngineStalledError.
        """
        query, answer = self._questions.ask()
        try:
            # Check after the query is registered: if the engine ends later, the query fails with an error.
            if self._death is not None:
                raise EngineDeadError(self._death)
            self._client.send(ListStreams(query))
            return await answer
        finally:
            self._questions.forget(query)

    def stats(self) -> EngineStats:
        """The engine's state after its last step."""
        return self._stats or EngineStats.at_start(self.info, time.monotonic())

    def check_health(self) -> None:
        """Raise EngineDeadError when the engine has ended.

        Raises EngineStalledError if it takes no messages, or if requests are outstanding and no step ends.
        """
        if self._death is not None:
            raise EngineDeadError(self._death)
        silent_s = time.monotonic() - self._last_news_s
        if self._client.is_full:
            raise EngineStalledError(
                f"no progress: the engine takes no messages, the last step was {silent_s:.0f} s ago"
            )
        if self._router and silent_s > _NO_PROGRESS_S:
            raise EngineStalledError(f"no progress for {silent_s:.0f} s with {len(self._router)} requests outstanding")

    def on_step(self, callback: Callable[[StepOutputs], None]) -> None:
        """Call `callback` with every step's message, for metrics. It runs in the client's thread and must not block."""
        self._on_step.append(callback)

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)`, from any thread, when the engine ends unexpectedly; at once if it already has."""
        with self._state_lock:
            self._on_death.append(callback)
            reason = self._death
        if reason is not None:
            callback(reason)

    def shutdown(self, timeout_s: float = 10.0) -> None:
        """Abort all requests and end the engine; idempotent. Returns when it has ended."""
        with self._state_lock:
            self._death = self._death or "the engine was shut down"
        if self._end.detach() is None:
            return
        self._client.close(timeout_s)
        self._release("the engine was shut down")

    def disown(self) -> None:
        """Mark the engine as dead in a forked child: the core and its threads are in the parent."""
        self._end.detach()
        self._state_lock = threading.Lock()  # at the fork another thread may have held the old lock
        self._death = "this process is a fork of the one that the engine belongs to; make an Engine of its own"

    def _start(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_ids: Sequence[RequestId],
        rate: ConsumptionRate | UnsetType,
        *,
        priority: int,
        tenant: Tenant,
    ) -> list[RequestStream]:
        message = self._prepare.message(prompt, params, rate, request_ids, priority=priority, tenant=tenant)
        tokens_per_s = resolve_rate(message.rate, self.config.scheduler.default_rate)
        buffers = [self._buffer(message, name) for name in request_ids]
        streams = [RequestStream(buffer, tokens_per_s, self.abort, self.report_played) for buffer in buffers]
        self._send(message, streams)
        return streams

    def _free_id(self, request_id: RequestId) -> RequestId:
        if (name := as_id(request_id, _OWN_IDS)) in self._router:
            raise id_in_use(name)
        return name

    def _buffer(self, message: AddRequest, request_id: RequestId) -> OutputBuffer:
        detokenizer = Detokenizer.for_params(self.tokenizer, message.params)
        thoughts = thought_counter(message.begins_in, self.tokenizer)
        return OutputBuffer(request_id, len(message.prompt_token_ids), detokenizer, thoughts)

    def _send(self, message: AddRequest, sinks: Sequence[Sink]) -> None:
        """Send a message; the outputs of its requests go to `sinks`, one each."""
        with self._state_lock:
            if self._death is not None:
                raise EngineDeadError(self._death)
            if not self._router:
                self._last_news_s = time.monotonic()
                self._finish_pace.on_work(self._last_news_s)
            # Check again under the lock: another thread may have used an id meanwhile.
            for request_id in message.request_ids:
                if request_id in self._router:
                    raise id_in_use(request_id)
            for request_id, sink in zip(message.request_ids, sinks, strict=True):
                self._router.add(request_id, sink, message.tenant)
        try:
            # A blocking caller may wait for room; an event loop must not.
            self._client.send(message, None if sink.loop is None else 0.0)
        except BaseException:
            for request_id in message.request_ids:
                self._router.discard(request_id)
            raise

    def _tell(self, request_id: RequestId, message: ToCore) -> None:
        """Send a message about a request, if it is live. Raises EngineStalledError."""
        if request_id in self._router and self._death is None:
            try:
                self._client.send(message)
            except EngineStalledError:
                raise
            except EngineDeadError:
                logger.debug("%s: the engine is gone", message)

    def _check_queue(self, num_new: int, tenant: Tenant) -> None:
        """Raise QueueFullError if the queue is full and the tenant's share used; RequestError for a wrong tenant."""
        check_tenant(tenant)
        limit = self.config.server.max_queued_requests
        stats = self.stats()
        num_live = len(self._router) + num_new - 1
        waiting = num_live - stats.num_running - stats.num_paused - stats.num_loading
        # A burst that is not scheduled yet counts as waiting, although there may be room to run it.
        room = self.info.max_num_seqs + limit
        if waiting >= limit and num_live >= room and self._router.has_share(tenant, num_new, room):
            retry_after_s = self._finish_pace.wait_s(waiting - limit + 1)
            raise QueueFullError(f"{waiting} requests wait already (limit {limit}); try again later", retry_after_s)

    def _deliver(self, message: StepOutputs | StreamStates) -> None:
        """Handle a message of the core, in the client's thread."""
        if isinstance(message, StreamStates):
            self._questions.answer(message)
            return
        self._stats = message.stats
        self._last_news_s = time.monotonic()
        for callback in self._on_step:
            callback(message)
        for output in message.outputs:
            if output.finish_reason is not None:
                self._finish_pace.on_finish(self._last_news_s)
        for request_id in self._router.hand_out(message, self._last_news_s):
            self.abort(request_id)

    def _die(self, reason: str) -> None:
        with self._state_lock:
            if self._death is not None:
                return
            self._death = reason
            callbacks = list(self._on_death)
        logger.error("engine dead: %s", reason)
        self._release(reason)
        for callback in callbacks:
            try:
                callback(reason)
            except failures():
                logger.exception("%r failed on the news of the engine's end", callback)

    def _release(self, reason: str) -> None:
        """End every open stream and every query with an error."""
        self._router.release_all(reason)
        self._questions.release_all(reason)
