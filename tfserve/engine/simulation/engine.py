"""A whole engine in virtual time: the same EngineCore, Scheduler and KVCacheManager on simulated hardware."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.core.calibration import calibrate
from tfserve.engine.core.loop import EngineCore
from tfserve.engine.scheduling.assembly import KVMemory, make_scheduler
from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.engine.scheduling.policies import uses_host
from tfserve.engine.scheduling.qos import Served
from tfserve.engine.simulation.clock import SimClock
from tfserve.engine.simulation.runner import SimRunner, StepCost
from tfserve.engine.simulation.transfers import SimLinks, SimTransfers
from tfserve.messages import AddRequest, StepOutputs, StreamStates
from tfserve.plan import Direction, StepPlan
from tfserve.types import ConsumptionRate, EngineStats, RequestId, SamplingParams

_VOCAB_SIZE = 32000
"""Of the simulated model: token ids mean nothing there."""


class SimMachine(msgspec.Struct, frozen=True, kw_only=True):
    """A simulated machine: the duration of steps and copies, and the tokens of KV that each tier holds.

    `host_s` is the CPU time charged before each launch.
    """

    step_s: StepCost
    links: SimLinks
    kv_bytes_per_token: int
    kv_tokens: int
    host_kv_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int = 32
    host_s: Callable[[StepPlan], float] | None = None


class SimRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A future request. Its answer has `output_tokens`, at most `max_tokens`: the model stops there by itself.

    `told_rate` is the consumption rate that the request names, `rate` its reader's true one (tokens/s; NaN: no reader).
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    rate: float
    told_rate: ConsumptionRate
    priority: int = 0


class Moment(msgspec.Struct, frozen=True):
    """The engine after one step of a run; `num_waiting` have nothing yet or nothing any more, of KV."""

    time_s: float
    num_waiting: int
    num_running: int
    num_paused: int


class SimRun(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a run. `served` is in the order of the requests; a refused one has no tokens.

    `moments` has the state at the end of each stretch of `MOMENT_S`.
    """

    served: list[Served]
    num_preemptions: int
    num_refused: int
    num_steps: int
    bytes_stored: int
    bytes_loaded: int
    moments: list[Moment]


MOMENT_S = 0.25
"""Seconds between the moments of a run, at least."""


class SimEngine:
    """One run of requests on a machine under a scheduler's settings; `run` once."""

    def __init__(self, machine: SimMachine, config: SchedulerConfig, requests: Sequence[SimRequest]) -> None:
        self._clock = SimClock()
        self._requests = requests
        self._token_s: list[list[float]] = [[] for _ in requests]
        self._moments: list[Moment] = []
        self._last: EngineStats | None = None
        self._index: dict[RequestId, int] = {f"r{index}": index for index in range(len(requests))}
        memory = _memory(machine, config)
        has_host = memory.num_host_blocks > 0
        self._scheduler = make_scheduler(
            config,
            memory,
            _calibrated(machine, memory),
            max_num_seqs=machine.max_num_seqs,
            max_num_batched_tokens=machine.max_num_batched_tokens,
            transfers=SimTransfers(self._clock, machine.links, machine.kv_bytes_per_token) if has_host else None,
        )
        ends = {req: requests[i].prompt_tokens + requests[i].output_tokens - 1 for req, i in self._index.items()}
        self._core = EngineCore(
            scheduler=self._scheduler,
            runner=SimRunner(self._clock, machine.step_s, _VOCAB_SIZE, ends=ends, host_s=machine.host_s),
            clock=self._clock,
            tokenizer=None,
            eos_token_ids={0},
            seed=0,
            emit=self._emit,
        )

    def run(self) -> SimRun:
        """Until all requests have ended and so have their copies."""
        for req, index in self._index.items():
            self._announce(req, self._requests[index])
        while True:
            if not self._core.step():
                if self._clock.next_event_s is None and not self._scheduler.has_work:
                    break
                self._core.sleep()
        moved = self._scheduler.offload.bytes_moved
        return SimRun(
            served=[
                Served(request.arrival_s, request.rate, np.array(token_s))
                for request, token_s in zip(self._requests, self._token_s, strict=True)
            ],
            num_preemptions=self._scheduler.num_preemptions,
            num_refused=sum(not token_s for token_s in self._token_s),
            num_steps=self._last.step if self._last else 0,
            bytes_stored=moved[Direction.STORE],
            bytes_loaded=moved[Direction.LOAD],
            moments=self._moments,
        )

    def _announce(self, req: RequestId, request: SimRequest) -> None:
        message = AddRequest(
            req,
            [1] * request.prompt_tokens,
            SamplingParams(max_tokens=request.max_tokens),
            request.arrival_s,
            request.told_rate,
            request.priority,
        )
        self._clock.call_at(request.arrival_s, lambda: self._core.inbox.put(message))

    def _emit(self, message: StepOutputs | StreamStates) -> None:
        assert isinstance(message, StepOutputs), "a simulation gets no queries for streams"
        now_s, stats = self._clock.now(), message.stats
        for output in message.outputs:
            self._token_s[self._index[output.request_id]].extend([now_s] * len(output.token_ids))
        self._last = stats
        if not self._moments or now_s - self._moments[-1].time_s >= MOMENT_S or stats.num_running == 0:
            paused = stats.num_paused + stats.num_loading
            self._moments.append(Moment(now_s, stats.num_waiting, stats.num_running, paused))


def _memory(machine: SimMachine, config: SchedulerConfig) -> KVMemory:
    """The machine's KV memory; a host tier is for policies that use one."""
    num_host_blocks = machine.host_kv_tokens // machine.block_size
    has_host = uses_host(config) and num_host_blocks > 0
    return KVMemory(
        machine.block_size, machine.kv_tokens // machine.block_size + 1, num_host_blocks + 1 if has_host else 0
    )


def _calibrated(machine: SimMachine, memory: KVMemory) -> CostModel:
    """A cost model that has seen the steps that a real engine runs before its first request."""
    cost = CostModel(kv_bytes_per_token=machine.kv_bytes_per_token, max_num_seqs=machine.max_num_seqs)
    config = EngineConfig(
        model="simulated", max_num_seqs=machine.max_num_seqs, max_num_batched_tokens=machine.max_num_batched_tokens
    )
    clock = SimClock()
    calibrate(
        cost,
        SimRunner(clock, machine.step_s, _VOCAB_SIZE),
        clock,
        config,
        num_blocks=memory.num_blocks,
        block_size=memory.block_size,
        max_model_len=machine.kv_tokens,
    )
    return cost
