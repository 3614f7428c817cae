"""The same EngineCore and Scheduler in virtual time."""

from __future__ import annotations

import pytest

from tfserve.config import SchedulerConfig
from tfserve.engine.core import EngineCore
from tfserve.engine.messages import AddRequest, StepOutputs
from tfserve.engine.policies import make_policy
from tfserve.engine.scheduler import Scheduler
from tfserve.engine.sim.clock import SimClock
from tfserve.engine.sim.runner import SimRunner, sim_token
from tfserve.memory.block_pool import BlockPool
from tfserve.memory.kv_manager import KVCacheManager
from tfserve.types import SamplingParams

VOCAB = 1000


class SimEngine:
    """A core on simulated hardware; arrivals are events of its clock."""

    def __init__(self, num_blocks: int, **scheduler) -> None:
        self.clock = SimClock()
        self.outputs: dict[str, list[int]] = {}
        self.times: dict[str, object] = {}
        kv = KVCacheManager(BlockPool(num_blocks), 16, 1024)
        policy = make_policy(SchedulerConfig(**scheduler))
        self.scheduler = Scheduler(policy, kv, max_num_seqs=8, max_num_batched_tokens=64)
        self.core = EngineCore(
            scheduler=self.scheduler,
            runner=SimRunner(self.clock, lambda n_decode, *_: 0.010 + 0.001 * n_decode, VOCAB),
            clock=self.clock,
            tokenizer=None,
            eos_token_ids={0},
            seed=0,
            emit=self._emit,
            debug_checks=True,
        )

    def arrive(self, time_s: float, req: str, num_prompt: int, max_tokens: int) -> None:
        message = AddRequest(req, [1] * num_prompt, SamplingParams(max_tokens=max_tokens), time_s)
        self.clock.call_at(time_s, lambda: self.core.inbox.put(message))

    def _emit(self, message: StepOutputs) -> None:
        for output in message.outputs:
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.times[output.request_id] = output.times

    def run(self) -> None:
        while True:
            if not self.core.step():
                if self.clock.next_event_s is None:
                    return
                self.clock.wait(None)


def test_requests_arrive_and_end_in_virtual_time():
    engine = SimEngine(64)
    engine.arrive(1.0, "a", 10, 5)
    engine.arrive(100.0, "b", 10, 2)
    engine.run()
    assert engine.outputs["a"] == [sim_token("a", 10 + i, VOCAB) for i in range(5)]
    assert engine.times["a"].first_token_s == pytest.approx(1.010)
    assert engine.times["a"].finished_s == pytest.approx(1.010 + 4 * 0.011)
    assert engine.times["b"].first_token_s == pytest.approx(100.010)


@pytest.mark.parametrize("policy", ["fcfs", "fcfs-chunked"])
def test_preempted_requests_still_get_every_position_once(policy):
    engine = SimEngine(14, policy=policy, reserve_ratio=0.0, reserve_min_ratio=0.0)
    for i in range(6):
        engine.arrive(0.1 * i, f"r{i}", 20 + i, 40)
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    for i in range(6):
        assert engine.outputs[f"r{i}"] == [sim_token(f"r{i}", 20 + i + k, VOCAB) for k in range(40)]
