"""EngineCore: the loop. Take acknowledgements and requests, schedule, move KV, run, commit, hand out."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Collection

import msgspec

from tfserve.engine.messages import (
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
from tfserve.engine.request import Request
from tfserve.engine.scheduler import Scheduler
from tfserve.model.detokenizer import Detokenizer
from tfserve.model.tokenizer import Tokenizer
from tfserve.plan import Clock, Direction, Fence, Runner, StepPlan, StepResult
from tfserve.types import EngineStats, FinishReason, RequestId

logger = logging.getLogger(__name__)

_LEAST_SLEEP_S = 0.002
"""The loop sleeps at least this long when nothing can run, whatever a policy asks for: it must never spin."""


class Inbox:
    """Messages on their way to the core; any thread may put."""

    def __init__(self, clock: Clock) -> None:
        self._messages: deque[ToCore] = deque()
        self._clock = clock

    def put(self, message: ToCore) -> None:
        """Leave a message and wake the loop."""
        self._messages.append(message)
        self._clock.notify()

    def take(self) -> list[ToCore]:
        """All messages so far, in order."""
        taken = []
        while self._messages:
            taken.append(self._messages.popleft())
        return taken


class EngineCore:
    """Runs requests to their end. Everything it touches is injected; `emit` gets every step's outputs.

    One request can never take it down: an exception in a step fails the requests of that batch and the loop goes on.
    Exceptions outside the runner are bugs in our own bookkeeping: they leave `run`.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        seed: int,
        emit: Callable[[StepOutputs | StreamStates], None],
        debug_checks: bool = False,
    ) -> None:
        self.inbox = Inbox(clock)
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seeds = random.Random(seed)
        self._emit = emit
        self._debug_checks = debug_checks
        self._requests: dict[RequestId, Request] = {}
        self._outputs: list[TokenOutput] = []
        self._resumed: list[tuple[str, float]] = []
        self._step = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_finished = 0
        self._stopping = False

    def run(self) -> None:
        """Loop until a Shutdown message; what is unfinished then ends as aborted."""
        try:
            while not self._stopping:
                if not self.step() and not self._stopping:
                    self.sleep()
            for request in list(self._requests.values()):
                self._finish(request, FinishReason.ABORT)
            self._flush()
        finally:
            self._scheduler.offload.close()

    def step(self) -> bool:
        """One turn of the loop; False when there was nothing to run."""
        self._scheduler.take_acks(self._clock.now())
        self._take_messages()
        if self._stopping:
            return False
        plan = self._scheduler.schedule(Fence(self._step), self._clock.now())
        for request, wait_s in self._scheduler.rejected:
            self._reject(request, wait_s)
        self._scheduler.offload.submit(plan)
        if plan.seqs:
            self._step += 1
            self._run_plan(plan)
        self._flush()
        if self._debug_checks:
            self._scheduler.check()
        return bool(plan.seqs)

    def sleep(self) -> None:
        """Wait for a message, an acknowledgement, or the moment that the scheduler wants to be asked again."""
        wake_s = self._scheduler.wake_s
        self._clock.wait(None if wake_s is None else max(wake_s, self._clock.now() + _LEAST_SLEEP_S))

    def stats(self) -> EngineStats:
        """The present state in numbers."""
        kv, moved = self._scheduler.kv, self._scheduler.offload.bytes_moved
        return EngineStats(
            now_s=self._clock.now(),
            step=self._step,
            num_waiting=len(self._scheduler.waiting),
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
            num_dropped=self._scheduler.num_dropped,
        )

    def _take_messages(self) -> None:
        for message in self.inbox.take():
            match message:
                case AddRequest():
                    self._add(message)
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

    def _add(self, message: AddRequest) -> None:
        params = message.params
        request = Request(
            id=message.request_id,
            params=params,
            token_ids=message.prompt_token_ids,
            num_prompt_tokens=len(message.prompt_token_ids),
            max_tokens=max(params.max_tokens or 0, 1),
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
            arrival_s=message.arrival_s,
            eos_token_ids=self._eos_token_ids,
            rate=message.rate,
            detokenizer=Detokenizer.for_params(self._tokenizer, params) if params.stop else None,
        )
        self._requests[request.id] = request
        self._num_prompt_tokens += request.num_prompt_tokens
        self._scheduler.add(request)

    def _run_plan(self, plan: StepPlan) -> None:
        try:
            result = self._runner.launch(plan).result()
        except Exception as error:  # whatever a kernel raises must not end other people's streams
            logger.exception("step %d failed", plan.step)
            self._scheduler.offload.complete(plan.step)
            self._fail(plan, f"{type(error).__name__}: {error}")
        else:
            self._scheduler.offload.complete(plan.step)
            self._scheduler.observe(plan, result.device_s)
            self._commit(plan, result)

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        now_s = self._clock.now()
        advanced = [(seq, self._scheduler.advance(seq)) for seq in plan.seqs]
        sampled = [request for seq, request in advanced if seq.sample]
        for scored in result.prompt_logprobs:
            if (owner := self._requests.get(scored.req)) is not None:
                owner.note_prompt(scored)
        self._scheduler.deliver([request.id for request in sampled if request is not None], now_s)
        for request, token, logprob in zip(sampled, result.tokens, result.logprobs, strict=True):
            if request is None:
                continue
            # With the first token, even if it was computed again after a preemption.
            of_prompt = request.prompt_logprobs if request.num_output_tokens == 0 else None
            if request.params.max_tokens == 0:
                self._finish(request, FinishReason.LENGTH, TokenOutput(request.id, prompt_logprobs=of_prompt))
                continue
            self._num_output_tokens += 1
            finish = request.append(token, now_s)
            if request.resume is not None:
                path, since_s = request.resume
                self._resumed.append((path, now_s - since_s))
                request.resume = None
            reason, stop = finish or (None, None)
            logprobs = None if logprob is None else [logprob]
            output = TokenOutput(request.id, [token], logprobs, stop_reason=stop, prompt_logprobs=of_prompt)
            if reason is None:
                self._outputs.append(output)
            else:
                self._finish(request, reason, output)

    def _fail(self, plan: StepPlan, error: str) -> None:
        """End every request the failed step touched; those that merely took a row in it too, for it may be unset."""
        touched = {seq.req for seq in plan.seqs} | {entry.req for entry in plan.entered}
        for req in touched:
            request = self._requests.get(req)
            if request is not None:
                self._finish(request, FinishReason.ERROR, TokenOutput(req, error=error))

    def _reject(self, request: Request, wait_s: float) -> None:
        """Refuse a request that has not started: the rates of those let in already add up to the capacity."""
        error = f"overloaded: more readers than this engine can keep supplied; try again in {max(1, round(wait_s))} s"
        self._finish(request, FinishReason.ERROR, TokenOutput(request.id, error=error, retry_after_s=wait_s))

    def _finish(self, request: Request, reason: FinishReason, last: TokenOutput | None = None) -> None:
        """Free everything the request holds and tell the front, with what it produced last."""
        request.finished_s = self._clock.now()
        request.stall_s = self._scheduler.stall_s(request, request.finished_s)
        self._scheduler.finish(request, completed=reason in (FinishReason.STOP, FinishReason.LENGTH))
        del self._requests[request.id]
        self._num_finished += 1
        last = last or TokenOutput(request.id)
        self._outputs.append(msgspec.structs.replace(last, finish_reason=reason, times=request.times))

    def _flush(self) -> None:
        started = self._scheduler.take_started()
        if self._outputs or started:
            outputs, self._outputs = self._outputs, []
            resumed, self._resumed = self._resumed, []
            self._emit(StepOutputs(outputs, self.stats(), started, resumed))
