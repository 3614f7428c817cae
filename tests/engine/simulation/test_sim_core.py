"""The same EngineCore and Scheduler in virtual time."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scheduler_settings import scheduler_config
from tfserve.engine.core.loop import EngineCore
from tfserve.engine.scheduling.assembly import KVMemory, make_scheduler
from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.engine.scheduling.qos import Served, score
from tfserve.engine.simulation.clock import SimClock
from tfserve.engine.simulation.runner import SimRunner, sim_token
from tfserve.engine.simulation.transfers import SimLinks, SimTransfers
from tfserve.messages import AddRequest, StepOutputs
from tfserve.plan import Direction
from tfserve.types import SamplingParams

VOCAB = 1000
TOKEN_BYTES = 10_000


def step_s(n_decode: int, decode_ctx: float, n_prefill: int, prefill_ctx: float) -> float:
    return 0.010 + 0.001 * n_decode + (n_prefill > 10) * 0.0002 * n_prefill


class SimEngine:
    """A core on simulated hardware; arrivals are events of its clock."""

    def __init__(
        self,
        num_blocks: int,
        num_host_blocks: int = 0,
        max_num_seqs: int = 8,
        depth: int = 1,
        host_s: float = 0.0,
        **scheduler,
    ) -> None:
        self.clock = SimClock()
        self.outputs: dict[str, list[int]] = {}
        self.times: dict[str, object] = {}
        self.token_s: dict[str, list[float]] = {}
        config = scheduler_config(**scheduler)
        links = SimLinks(store_bytes_per_s=1e9, load_bytes_per_s=1e9, contention=1.3)
        transfers = SimTransfers(self.clock, links, TOKEN_BYTES) if num_host_blocks else None
        self.scheduler = make_scheduler(
            config,
            KVMemory(16, num_blocks, num_host_blocks),
            CostModel(kv_bytes_per_token=TOKEN_BYTES, max_num_seqs=max_num_seqs, store_bps=1e9, load_bps=1e9),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=64,
            transfers=transfers,
        )
        self.core = EngineCore(
            scheduler=self.scheduler,
            runner=SimRunner(self.clock, step_s, VOCAB, host_s=lambda _: host_s),
            clock=self.clock,
            tokenizer=None,
            eos_token_ids={0},
            seed=0,
            emit=self._emit,
            pipeline_depth=depth,
            debug_checks=True,
        )

    def arrive(self, time_s: float, req: str, num_prompt: int, max_tokens: int, rate: float | None = None) -> None:
        message = AddRequest(req, [1] * num_prompt, SamplingParams(max_tokens=max_tokens), time_s, rate)
        self.clock.call_at(time_s, lambda: self.core.inbox.put(message))

    def _emit(self, message: StepOutputs) -> None:
        for output in message.outputs:
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            self.token_s.setdefault(output.request_id, []).extend([self.clock.now()] * len(output.token_ids))
            if output.finish_reason is not None:
                self.times[output.request_id] = output.times

    def run(self) -> None:
        """Until nothing is left to happen: all have ended, and so have their copies."""
        while True:
            if not self.core.step():
                if self.clock.next_event_s is None and not self.scheduler.has_work:
                    return
                self.core.sleep()

    def report(self, rate: float):
        served = [Served(self.times[r].arrival_s, rate, np.array(at)) for r, at in self.token_s.items()]
        return score(served)


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_arrive_and_end_in_virtual_time(depth):
    engine = SimEngine(64, depth=depth)
    engine.arrive(1.0, "a", 10, 5)
    engine.arrive(100.0, "b", 10, 2)
    engine.run()
    assert engine.outputs["a"] == [sim_token("a", 10 + i, VOCAB) for i in range(5)]
    assert engine.times["a"].first_token_s == pytest.approx(1.010)
    assert engine.times["a"].finished_s == pytest.approx(1.010 + 4 * 0.011)
    assert engine.times["b"].first_token_s == pytest.approx(100.010)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["fcfs", "fcfs-chunked"])
def test_preempted_requests_still_get_every_position_once(policy, depth):
    engine = SimEngine(14, depth=depth, policy=policy, reserve_ratio=0.0, reserve_min_ratio=0.0)
    for i in range(6):
        engine.arrive(0.1 * i, f"r{i}", 20 + i, 40)
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    for i in range(6):
        assert engine.outputs[f"r{i}"] == [sim_token(f"r{i}", 20 + i + k, VOCAB) for k in range(40)]


def burst(policy: str, num_host_blocks: int, rate: float, **settings) -> SimEngine:
    """24 readers at once, where the device has room for about six of them."""
    engine = SimEngine(6 * 10 + 1, num_host_blocks, 24, policy=policy, **settings)
    for i in range(24):
        engine.arrive(0.001 * i, f"r{i}", 48, 100, rate)
    engine.run()
    for i in range(24):
        assert engine.outputs[f"r{i}"] == [sim_token(f"r{i}", 48 + k, VOCAB) for k in range(100)]
    return engine


def test_two_deep_the_device_does_not_wait_for_the_host():
    host_s, busy_s = 0.004, 0.010 + 100 * 0.011
    stats, end_s = {}, {}
    for depth in (1, 2):
        engine = SimEngine(64, depth=depth, host_s=host_s)
        engine.arrive(1.0, "a", 10, 101)
        # The device has nothing to do between the two; that is not idle time.
        engine.arrive(50.0, "b", 10, 101)
        engine.run()
        assert engine.outputs["a"] == [sim_token("a", 10 + i, VOCAB) for i in range(101)]
        stats[depth], end_s[depth] = engine.core.stats(), engine.times["a"].finished_s - 1.0
        assert stats[depth].device_busy_s == pytest.approx(2 * busy_s)
    assert stats[1].device_idle_s == pytest.approx(200 * host_s)
    assert stats[1].device_idle_share == pytest.approx(200 * host_s / (200 * host_s + 2 * busy_s))
    assert stats[2].device_idle_share == 0.0
    assert end_s[1] == pytest.approx(busy_s + 101 * host_s)
    assert end_s[2] == pytest.approx(busy_s + host_s)


@pytest.mark.parametrize("depth", [1, 2])
def test_in_a_burst_tokenflow_brings_first_tokens_sooner_than_fcfs_without_stalls(depth):
    rate = 8.0
    fcfs = burst("fcfs", 0, rate, depth=depth).report(rate)
    sharing = {"schedule_interval_s": 0.2, "min_residency_s": 0.2, "low_buffer_s": 0.5}
    engine = burst("tokenflow", 300, rate, depth=depth, **sharing)
    flow = engine.report(rate)
    assert flow.ttft_p99_s < 0.3 * fcfs.ttft_p99_s
    assert flow.stall_share < 0.02
    assert flow.raw_throughput > fcfs.raw_throughput
    assert flow.on_time_goodput > fcfs.on_time_goodput
    assert 0 < engine.scheduler.num_preemptions < 5 * 24
    assert engine.scheduler.offload.bytes_moved[Direction.LOAD] > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_readers_far_ahead_give_their_kv_up_for_others_and_lose_no_token(depth):
    # Device and host together hold six of the sixteen that hardly read.
    engine = SimEngine(41, 31, depth=depth, policy="tokenflow")
    for i in range(16):
        engine.arrive(0.0, f"slow {i}", 30, 150, 0.01)
    for i in range(4):
        engine.arrive(1.0 + i, f"reader {i}", 30, 40, 6.0)
    engine.run()
    for req, num_tokens in [*((f"slow {i}", 150) for i in range(16)), *((f"reader {i}", 40) for i in range(4))]:
        assert engine.outputs[req] == [sim_token(req, 30 + k, VOCAB) for k in range(num_tokens)]
    assert max(engine.times[f"reader {i}"].first_token_s - 1.0 - i for i in range(4)) < 1.0
    slow = [engine.times[f"slow {i}"].finished_s for i in range(16)]
    assert sum(at < engine.times["reader 3"].finished_s for at in slow) < 16
