"""What one tokenflow pass costs, snapshot building included: `python benchmarks/scheduler_cost.py [--passes N]`.

Half of the requests run and half are paused; those that finish make room for new ones, and every pass is a full one.
CPU time of this thread, so that a busy machine does not count. The aim is a median of at most 0.4 ms at 1,000 live
requests (tokenflow.md section 5).
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from tfserve.config import SchedulerConfig
from tfserve.engine.cost_model import CostModel
from tfserve.engine.policies.tokenflow import TokenFlow
from tfserve.engine.policy import Decision, MemoryView, ResumeBy, Snapshot
from tfserve.engine.tracker import Phase, Tracker
from tfserve.types import RequestId

BLOCK = 256
RATE = 20.0


class Bench:
    """A steady state of n requests, in which running ones gain tokens and decisions are carried out at once."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.cost = CostModel(kv_bytes_per_token=131072, max_num_seqs=n, load_bps=5e10, store_bps=5e10)
        self.tracker = Tracker(RATE)
        self.policy = TokenFlow(SchedulerConfig(policy="tokenflow"))
        self.now_s = 100.0
        self.max_num_seqs = n
        running = self._populate(n)
        self.num_blocks = int(sum(self._blocks(req) for req in running) * 1.02) + 2

    def _populate(self, n: int) -> list[RequestId]:
        running = []
        for i in range(n):
            req = f"request-{i}"
            state = i % 2
            self.tracker.add(req, arrival_s=self.now_s - 60.0, num_prompt=512, max_tokens=4000, rate=RATE)
            output = int(self.rng.integers(100, 1500))
            self.tracker.on_tokens([req], output, self.now_s - 50.0)
            self.tracker.on_played(req, output - int(self.rng.integers(10, min(output, 400))), self.now_s)
            self.tracker.set_phase(req, Phase.RUNNING if state == 0 else Phase.PAUSED, self.now_s - 30.0)
            computed = 512 + output - 1
            blocks = -(-computed // BLOCK) if state == 0 else 0
            self.tracker.update([req], num_computed=computed, host_tokens=computed, device_blocks=blocks)
            if state == 0:
                running.append(req)
        return running

    def one(self) -> float:
        """Seconds that one full pass took; then half a second goes by."""
        start = time.thread_time()
        columns = self.tracker.columns(self.now_s)
        used = int(columns.device_blocks.sum())
        memory = MemoryView(BLOCK, self.num_blocks, max(self.num_blocks - used, 0), 10**6, 10**6)
        decision = self.policy.decide(
            Snapshot(self.now_s, columns, memory, self.cost, self.max_num_seqs, max_num_batched_tokens=8192)
        )
        seconds = time.thread_time() - start
        self._carry_out(decision)
        return seconds

    def _carry_out(self, decision: Decision) -> None:
        for req, by in decision.preempt:
            self.tracker.set_phase(req, Phase.PAUSED if by is ResumeBy.LOAD else Phase.WAITING, self.now_s)
            self.tracker.update([req], device_blocks=0)
        for req in [*(req for req, _ in decision.resume), *decision.admit]:
            self.tracker.set_phase(req, Phase.RUNNING, self.now_s)
            self.tracker.update([req], device_blocks=self._blocks(req))
        self.now_s += 0.5
        c = self.tracker.columns(self.now_s)
        running = c.ids_of(c.in_phase(Phase.RUNNING))
        self.tracker.on_tokens(running, self.rng.integers(15, 30, len(running)), self.now_s)
        c = self.tracker.columns(self.now_s)
        computed = (c.num_tokens - 1)[c.phase == Phase.RUNNING]
        ids = c.ids_of(np.flatnonzero(c.phase == Phase.RUNNING))
        self.tracker.update(ids, num_computed=computed, device_blocks=-(-computed // BLOCK), host_tokens=computed)
        for req in c.ids_of(np.flatnonzero(c.num_remaining < 100)):
            self._replace(req)

    def _replace(self, req: RequestId) -> None:
        self.tracker.remove(req, completed=True)
        self.tracker.add(req, arrival_s=self.now_s, num_prompt=512, max_tokens=4000, rate=RATE)

    def _blocks(self, req: RequestId) -> int:
        c = self.tracker.columns(self.now_s)
        return -(-int(c.num_tokens[c.ids.index(req)]) // BLOCK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=200)
    passes = parser.parse_args().passes
    for n in (100, 1_000, 10_000):
        bench = Bench(n)
        times = np.array([bench.one() for _ in range(passes)]) * 1e3
        moved = bench.tracker.columns(bench.now_s).total_preemptions / passes
        print(
            f"{n:6d} live: median {np.median(times):.3f} ms, P99 {np.percentile(times, 99):.3f} ms, "
            f"{moved:.1f} preemptions per pass"
        )


if __name__ == "__main__":
    main()
