"""EngineCore: the loop. Take acknowledgements and requests, schedule, move KV, run and commit steps, emit outputs."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import compress

import msgspec

from tfserve.engine.core.step_trace import CopyTotals, StepTrace
from tfserve.engine.scheduling.request import Finish, Request
from tfserve.engine.scheduling.scheduler import Scheduler
from tfserve.errors import failures
from tfserve.messages import (
    AbortRequest,
    AddRequest,
    ListStreams,
    ReportPlayed,
    Shutdown,
    StepOutputs,
    StreamStates,
    ToCore,
    TokenOutput,
)
from tfserve.model.text.detokenizer import Detokenizer
from tfserve.model.text.thoughts import ThoughtCounter, thought_counter
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.plan import Clock, Direction, InFlight, Runner, StepId, StepPlan, StepResult
from tfserve.types import EngineStats, FinishReason, Place, RequestId, SamplingParams, nth_seed

logger = logging.getLogger(__name__)

_MIN_SLEEP_S = 0.002
"""Shortest sleep when nothing can run, whatever the policy asks for: the loop must never spin."""


class Inbox:
    """Queue of messages to the core; any thread may put."""

    def __init__(self, clock: Clock) -> None:
        self._messages: deque[ToCore] = deque()
        self._clock = clock

    def put(self, message: ToCore) -> None:
        """Queue a message and wake the loop."""
        self._messages.append(message)
        self._clock.notify()

    def take(self) -> list[ToCore]:
        """All messages so far, in order."""
        taken = []
        while self._messages:
            taken.append(self._messages.popleft())
        return taken


@dataclass(frozen=True, slots=True)
class _Launched:
    """A launched step and its requests. It keeps the objects: when it ends, an id may belong to another request.

    `after_sleep`: the device was idle before this step because there was nothing to run.
    """

    plan: StepPlan
    flight: InFlight
    requests: dict[RequestId, Request]
    after_sleep: bool


class EngineCore:
    """The engine's loop. All its parts are injected; `emit` gets the outputs of every step.

    Up to `pipeline_depth` steps run at once. At 2, a step is launched before the host knows the tokens of the previous
    step, so the device does not wait for the host. If a request has ended in the previous step, its extra token is
    dropped. `trace` records every step and every finished request. `tokenizer` is for stop strings and thoughts;
    None if no request has any.

    An exception in a step fails the requests of that step, and the loop continues. A request whose tokens cannot be
    decoded fails alone. Any other exception is a bug in the engine: it leaves `run`, and the caller must call `close`.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        tokenizer: Tokenizer | None,
        eos_token_ids: Collection[int],
        seed: int,
        emit: Callable[[StepOutputs | StreamStates], None],
        pipeline_depth: int = 1,
        debug_checks: bool = False,
        trace: StepTrace | None = None,
    ) -> None:
        self.inbox = Inbox(clock)
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seeds = random.Random(seed)
        self._emit = emit
        self._pipeline_depth = pipeline_depth
        self._debug_checks = debug_checks
        self._trace = trace
        self._launched: deque[_Launched] = deque()
        self._slept = True
        self._requests: dict[RequestId, Request] = {}
        self._outputs: list[TokenOutput] = []
        self._resumed: list[tuple[str, float]] = []
        self._told_free = self._num_free  # as in the last message sent
        self._step = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_finished = 0
        self._device_busy_s = 0.0
        self._device_idle_s = 0.0
        self._stopping = False

    def run(self) -> None:
        """Loop until a Shutdown message. Unfinished requests then end as aborted."""
        while not self._stopping:
            if not self.step() and not self._stopping:
                self.sleep()
        for request in list(self._requests.values()):
            self._finish(request, FinishReason.ABORT)
        self._flush()

    def close(self) -> None:
        """Wait for running steps; release threads, memory and the trace. Call it after `run`, also if that has raised.

        If the device hangs, this never returns: report errors before the call.
        """
        with ExitStack() as closing:  # closed in reverse order, each one even if another fails
            if self._trace is not None:
                closing.callback(self._trace.close)
            closing.callback(self._scheduler.close)
            closing.callback(self._runner.close)

    def step(self) -> bool:
        """One turn of the loop: launch a step, then commit until fewer than `pipeline_depth` steps are running.

        Without a new step it commits all. Returns False if there was nothing to run or to commit.
        """
        self._scheduler.take_acks(self._clock.now())
        self._take_messages()
        if self._stopping:
            return False
        plan = self._scheduler.schedule(StepId(self._step), self._clock.now())
        for request, wait_s in self._scheduler.rejected:
            self._reject(request, wait_s)
        for request, problem in self._scheduler.unservable:
            self._finish(request, FinishReason.ERROR, TokenOutput(request.id, error=problem, recurs=True))
        self._scheduler.offload.submit(plan)
        most = 0
        if plan.seqs:
            self._launch(plan)
            most = self._pipeline_depth - 1
        worked = bool(self._launched)
        while len(self._launched) > most:
            self._commit(self._launched.popleft())
        self._flush()
        if self._debug_checks:
            self._scheduler.check()
        return worked

    def sleep(self) -> None:
        """Wait for a message, an acknowledgement, or the time at which the scheduler has to decide again."""
        self._slept = True
        wake_s = self._scheduler.wake_s
        self._clock.wait(None if wake_s is None else max(wake_s, self._clock.now() + _MIN_SLEEP_S))

    def stats(self) -> EngineStats:
        """The present state in numbers."""
        kv, moved = self._scheduler.kv, self._scheduler.offload.bytes_moved
        return EngineStats(
            now_s=self._clock.now(),
            step=self._step,
            num_waiting=self._scheduler.num_waiting,
            num_running=len(self._scheduler.running),
            num_blocks=kv.num_blocks,
            num_free_blocks=kv.num_free_blocks,
            block_size=kv.block_size,
            num_preemptions=self._scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_finished=self._num_finished,
            num_paused=len(self._scheduler.paused),
            num_loading=len(self._scheduler.loading),
            num_host_blocks=kv.num_host_blocks,
            num_free_host_blocks=kv.num_free_host_blocks,
            bytes_stored=moved[Direction.STORE],
            bytes_loaded=moved[Direction.LOAD],
            device_busy_s=self._device_busy_s,
            device_idle_s=self._device_idle_s,
            num_dropped=self._scheduler.num_dropped,
        )

    def _take_messages(self) -> None:
        for message in self.inbox.take():
            match message:
                case AddRequest():
                    for number, request_id in enumerate(message.request_ids):
                        self._add(message, request_id, number)
                case AbortRequest():
                    request = self._requests.get(message.request_id)
                    if request is not None:
                        self._finish(request, FinishReason.ABORT)
                case ReportPlayed():
                    request = self._requests.get(message.request_id)
                    if request is not None:
                        self._scheduler.on_played(request, message.num_tokens, self._clock.now())
                case ListStreams():
                    self._emit(StreamStates(message.query, self._scheduler.streams(self._clock.now())))
                case Shutdown():
                    self._stopping = True

    def _add(self, message: AddRequest, request_id: RequestId, number: int) -> None:
        """Queue request `number` of a message. It gets its own copy of everything that grows."""
        params = message.params
        seed = self._seeds.getrandbits(63) if params.seed is None else nth_seed(params.seed, number)
        request = Request(
            id=request_id,
            params=params,
            token_ids=message.prompt_token_ids.copy(),
            num_prompt_tokens=len(message.prompt_token_ids),
            max_tokens=max(params.max_tokens or 0, 1),
            seed=seed,
            arrival_s=message.arrival_s,
            eos_token_ids=self._eos_token_ids,
            rate=message.rate,
            is_rate_assumed=message.is_rate_assumed,
            priority=message.priority,
            tenant=message.tenant,
            detokenizer=self._detokenizer(params) if params.stop else None,
            thoughts=None if message.begins_in is None else self._thoughts(message.begins_in),
        )
        self._requests[request.id] = request
        self._num_prompt_tokens += request.num_prompt_tokens
        self._scheduler.add(request)

    def _detokenizer(self, params: SamplingParams) -> Detokenizer:
        assert self._tokenizer is not None
        return Detokenizer.for_params(self._tokenizer, params)

    def _thoughts(self, begins_in: Place) -> ThoughtCounter | None:
        assert self._tokenizer is not None
        return thought_counter(begins_in, self._tokenizer)

    def _launch(self, plan: StepPlan) -> None:
        touched = {seq.req for seq in plan.seqs} | {entry.req for entry in plan.entered}
        requests = {req: self._requests[req] for req in touched}
        self._launched.append(_Launched(plan, self._runner.launch(plan), requests, self._slept))
        self._slept = False
        self._step += 1

    def _commit(self, launched: _Launched) -> None:
        """Wait for a step's end and emit its results."""
        plan = launched.plan
        try:
            result = launched.flight.result()
        except failures() as error:  # an error in a kernel ends only the requests of its step
            logger.exception("step %d failed", plan.step)
            self._scheduler.ended(plan)
            self._fail(launched, _words(error))
        else:
            self._scheduler.ended(plan)
            self._scheduler.observe(plan, result.device_s)
            self._device_busy_s += result.device_s
            self._device_idle_s += 0.0 if launched.after_sleep else result.idle_s
            if self._trace is not None:
                scheduler, now_s = self._scheduler, self._clock.now()
                moves = scheduler.reasons.take_moves()
                self._trace.on_step(plan, result.device_s, now_s, scheduler.counts, self._copied(), moves=moves)
            self._hand_out(launched, result)

    def _hand_out(self, launched: _Launched, result: StepResult) -> None:
        """Give each sampled request that has not finished its token, also if it has been preempted meanwhile."""
        now_s = self._clock.now()
        sampled = [launched.requests[seq.req] for seq in launched.plan.seqs if seq.sample]
        wanted = [not request.is_finished for request in sampled]
        failed = dict(result.failed)
        for scored in result.prompt_logprobs:
            launched.requests[scored.req].note_prompt(scored)
        self._scheduler.deliver([request.id for request in compress(sampled, wanted)], now_s)
        produced = zip(sampled, result.tokens, result.logprobs, strict=True)
        for request, token, logprob in compress(produced, wanted):
            if request.id in failed:
                self._finish(
                    request, FinishReason.ERROR, TokenOutput(request.id, error=failed[request.id], recurs=True)
                )
                continue
            of_prompt = request.take_prompt_logprobs()
            if request.params.max_tokens == 0:
                self._finish(request, FinishReason.LENGTH, TokenOutput(request.id, prompt_logprobs=of_prompt))
                continue
            self._num_output_tokens += 1
            finish, error = self._append(request, token, now_s)
            if request.resume is not None:
                path, since_s = request.resume
                self._resumed.append((path, now_s - since_s))
                request.resume = None
            reason, stop = finish or (None, None)
            logprobs = None if logprob is None else [logprob]
            output = TokenOutput(
                request.id, [token], logprobs, stop_reason=stop, error=error, prompt_logprobs=of_prompt
            )
            if reason is None:
                self._outputs.append(output)
            else:
                self._finish(request, reason, output)

    def _append(self, request: Request, token: int, now_s: float) -> tuple[Finish | None, str | None]:
        """Append a token to a request. Returns how the request finished with it (or None) and an error (or None)."""
        try:
            if request.first_token_s is None:
                self._scheduler.on_early_token(request, token, now_s)
            return request.append(token), None
        except failures() as error:  # the tokenizer failed while the text was searched for stop strings, or tags
            logger.exception("the text of request %s cannot be made", request.id)
            return (FinishReason.ERROR, None), _words(error)

    def _fail(self, launched: _Launched, error: str) -> None:
        """End every request of a failed step, also one that only entered a slot in it: the slot may be incomplete."""
        for req, request in launched.requests.items():
            if not request.is_finished:
                self._finish(request, FinishReason.ERROR, TokenOutput(req, error=error))

    def _reject(self, request: Request, wait_s: float) -> None:
        """Refuse a request that has not started: the rates of the admitted requests already use up the capacity."""
        error = f"overloaded: more readers than this engine can keep supplied; try again in {max(1, round(wait_s))} s"
        self._finish(request, FinishReason.ERROR, TokenOutput(request.id, error=error, retry_after_s=wait_s))

    def _finish(self, request: Request, reason: FinishReason, last: TokenOutput | None = None) -> None:
        """Free everything the request holds and emit its last output."""
        finished_s = self._clock.now()
        times = self._scheduler.times(request, finished_s)
        self._scheduler.finish(request, completed=reason in (FinishReason.STOP, FinishReason.LENGTH))
        del self._requests[request.id]
        self._num_finished += 1
        if self._trace is not None:
            self._trace.on_finished(request, finished_s, times.num_preemptions)
        last = last or TokenOutput(request.id)
        self._outputs.append(msgspec.structs.replace(last, finish_reason=reason, times=times))

    def _copied(self) -> list[CopyTotals]:
        """Totals of copies in both directions, for the trace."""
        offload = self._scheduler.offload
        return [CopyTotals(offload.bytes_moved[direction], offload.busy_s[direction]) for direction in Direction]

    @property
    def _num_free(self) -> tuple[int, int]:
        """Free blocks of both tiers."""
        return self._scheduler.kv.num_free_blocks, self._scheduler.kv.num_free_host_blocks

    def _flush(self) -> None:
        started = self._scheduler.take_started()
        free = self._num_free
        # A copy may end after the last step. Without this message the front would count its block as used for ever.
        is_stale = not self._launched and free != self._told_free
        if self._outputs or started or is_stale:
            self._told_free = free
            outputs, self._outputs = self._outputs, []
            resumed, self._resumed = self._resumed, []
            self._emit(StepOutputs(outputs, self.stats(), started, resumed))


def _words(error: BaseException) -> str:
    """An exception as the text of a request's error: valid UTF-8, since it may go to another process."""
    return f"{type(error).__name__}: {error}".encode(errors="replace").decode()
