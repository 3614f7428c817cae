"""Cost of a scheduling pass, including the snapshot: `python -m benchmarks.micro.scheduler_cost [--seconds N]`.

n requests are live, half of them on the device, with their KV counters in a real KVCacheManager; a step every 20 ms
gives each running one a token. Before every step the policy is asked, as the Scheduler does. Most of the time nothing
is to be decided (steady); every `schedule_interval_s`, and soon after an event, a full pass decides which requests are
on the device (deciding). With --burst, a share of the requests has just arrived and waits. A finished request is
replaced by a new one. Every pass is timed whole, in CPU time of this thread, so that a busy machine counts as little as
possible. The aim is a median of at most 0.4 ms at 1,000 live requests.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.columns import Columns
from tfserve.engine.scheduling.cost_model import CostModel, StepCoefficients
from tfserve.engine.scheduling.policies.tenants import Tenants
from tfserve.engine.scheduling.policies.tokenflow.policy import TokenFlow
from tfserve.engine.scheduling.policy import Decision, ResumeBy, Snapshot
from tfserve.engine.scheduling.snapshots import Snapshots
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.tracker import Tracker
from tfserve.memory.block_pool import BlockPool
from tfserve.memory.kv_manager import KVCacheManager
from tfserve.memory.residency import KVState
from tfserve.plan import Ack, Copy, StepId
from tfserve.types import RequestId, Tenant

BLOCK = 256
RATE = 20.0
STEP_S = 0.02
PROMPT = 512
SETTINGS = SchedulerConfig(policy="tokenflow", overload="share")


class Bench:
    """A steady state of n requests; copies end at once."""

    def __init__(self, n: int, waiting: float, num_tenants: int = 1, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        # A device that gives each of n / 2 running requests 50 tokens/s, a little more than n readers need.
        step = StepCoefficients(0.01, 0.01 / (n / 2), 0.0, 1e-6, 0.0)
        self.cost = CostModel(kv_bytes_per_token=131072, max_num_seqs=n, prior=step, load_bps=5e10, store_bps=5e10)
        self.tracker = Tracker(RATE)
        self.policy = TokenFlow(SETTINGS)
        self.tenants = Tenants(SETTINGS)
        self.num_tenants = num_tenants
        self.now_s = 100.0
        self.step = 0
        self.num_added = 0
        outputs = self.rng.integers(100, 1500, n)
        running = np.arange(n) < n // 2
        blocks = -(-(PROMPT + outputs) // BLOCK)
        self.kv = KVCacheManager(
            self.tracker.table, BlockPool(int(blocks[running].sum() * 1.02) + 20), BLOCK, 4096, BlockPool(40 * n + 2)
        )
        self.snapshots = Snapshots(self.kv, self.tracker, self.cost, max_num_seqs=n, max_num_batched_tokens=8192)
        # Paused ones first: they leave the device again.
        for is_running, output in sorted(zip(running.tolist(), outputs.tolist(), strict=True)):
            self._started(output, is_running=is_running)
        for _ in range(int(waiting * n)):
            self._arrive()

    def _arrive(self) -> RequestId:
        req = f"request-{self.num_added}"
        self.num_added += 1
        tenant = Tenant(str(self.num_added % self.num_tenants))
        self.tracker.add(req, arrival_s=self.now_s, num_prompt=PROMPT, max_tokens=2000, rate=RATE, tenant=tenant)
        return req

    def _started(self, output: int, *, is_running: bool) -> None:
        """A request in the middle of its life, with 0.5 to 20 s unread."""
        req = self._arrive()
        self.tracker.on_tokens([req], output, self.now_s - 50.0)
        self.tracker.on_played(req, output - int(self.rng.integers(10, min(output, 400))), self.now_s)
        self.tracker.set_state(req, RequestState.RUNNING, self.now_s - 30.0)
        self._compute([req], [PROMPT + output - 1])
        if not is_running:
            self._preempt(req, ResumeBy.LOAD)

    def one(self) -> tuple[float, bool]:
        """Seconds of one pass, and whether it was a full one; then a step goes by."""
        passes = self.policy.num_passes
        start = time.thread_time()
        snapshot = self.snapshots.take(self.now_s)
        decision = self.tenants.decide(self.policy, snapshot)
        seconds = time.thread_time() - start
        self._carry_out(decision, snapshot)
        self._run_step()
        return seconds, self.policy.num_passes > passes

    def _carry_out(self, decision: Decision, snapshot: Snapshot) -> None:
        for req, by in decision.preempt:
            self._preempt(req, by)
        for req, by in decision.resume:
            if by is ResumeBy.LOAD:
                self._end(self.kv.resume(req, self.kv.num_free_blocks))
            else:
                self.kv.release(req)
            done = by is ResumeBy.RECOMPUTE or self.kv.view(req).state is KVState.DEVICE
            self.tracker.set_state(req, RequestState.RUNNING if done else RequestState.LOADING, self.now_s)
        for req in snapshot.columns.ids_of(snapshot.columns.in_state(RequestState.LOADING)):
            self._end(self.kv.resume(req, self.kv.num_free_blocks))
            if self.kv.view(req).state is KVState.DEVICE:
                self.tracker.set_state(req, RequestState.RUNNING, self.now_s)
        for req in decision.admit:
            self.tracker.set_state(req, RequestState.RUNNING, self.now_s)

    def _preempt(self, req: RequestId, by: ResumeBy) -> None:
        if by is ResumeBy.LOAD:
            self._end(self.kv.preempt(req))
        else:
            self.kv.release(req)
        kept = self.kv.view(req).state is not KVState.NONE
        self.tracker.set_state(req, RequestState.PAUSED if kept else RequestState.WAITING, self.now_s)

    def _run_step(self) -> None:
        """Every running request computes its missing tokens and gets a token; new KV is stored to the host."""
        c = self._columns()
        rows = np.flatnonzero(c.state == RequestState.RUNNING)
        ids, missing = c.ids_of(rows), c.num_uncomputed[rows].tolist()
        done = self._compute(ids, missing)
        self.now_s += STEP_S
        self.tracker.on_tokens(done, 1, self.now_s)
        self._end(self.kv.plan_stores(done, 10**9))
        c = self._columns()
        for req in c.ids_of(np.flatnonzero(c.num_remaining <= 0)):
            self.kv.release(req)
            self.tracker.remove(req, completed=True)
            self._arrive()

    def _columns(self) -> Columns:
        return self.snapshots.take(self.now_s).columns

    def _compute(self, reqs: list[RequestId] | tuple[RequestId, ...], tokens: list[int]) -> list[RequestId]:
        """Extend the requests by these tokens. Returns those with room for them."""
        self.step += 1
        self.kv.begin_step(StepId(self.step))
        return [req for req, n in zip(reqs, tokens, strict=True) if self.kv.extend(req, n, 4096) is not None]

    def _end(self, copies: list[Copy]) -> None:
        for copy in copies:
            self.kv.ack(Ack(copy.id, True, copy.num_tokens, 0.0, 1e-6))


def measure(n: int, waiting: float, seconds: float, num_tenants: int) -> dict[str, float]:
    """Run for so many seconds of virtual time, after a quarter as many that do not count."""
    bench = Bench(n, waiting, num_tenants)
    steps = int(seconds / STEP_S)
    for _ in range(0 if waiting else steps // 4):
        bench.one()
    before = bench._columns().total_preemptions
    passes = [bench.one() for _ in range(steps)]
    moved = bench._columns().total_preemptions - before
    times = {
        kind: np.array([took for took, is_full in passes if is_full is full]) * 1e3
        for kind, full in (("steady", False), ("deciding", True))
    }
    found = {
        f"{kind}_{name}": round(float(value), 4)
        for kind, all_ms in times.items()
        for name, value in (("median_ms", np.median(all_ms)), ("p99_ms", np.percentile(all_ms, 99)))
    }
    every = np.array([took for took, _ in passes]) * 1e3
    found |= {
        "median_ms": round(float(np.median(every)), 4),
        "p99_ms": round(float(np.percentile(every, 99)), 4),
        "deciding_share": len(times["deciding"]) / len(passes),
        "preemptions_per_deciding_pass": moved / max(len(times["deciding"]), 1),
    }
    print(
        f"{n:6d} live, {waiting:.0%} just arrived: steady {found['steady_median_ms']:.3f} ms (P99 "
        f"{found['steady_p99_ms']:.3f}), deciding {found['deciding_median_ms']:.3f} ms (P99 "
        f"{found['deciding_p99_ms']:.3f}), {found['deciding_share']:.1%} of passes decide, with "
        f"{found['preemptions_per_deciding_pass']:.1f} preemptions each",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of virtual time")
    parser.add_argument("--burst", type=float, default=0.3, help="share of requests that wait, in the second run")
    parser.add_argument("--tenants", type=int, default=1, help="whose requests they are, in turn")
    parser.add_argument("--live", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    found = {
        f"{n} live, {waiting:.0%} just arrived": measure(n, waiting, args.seconds, args.tenants)
        for n in args.live
        for waiting in (0.0, args.burst)
    }
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
