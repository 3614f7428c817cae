"""Runs a policy on synthetic requests, step by step in virtual time, with a linear step time and two simple links.

Not the engine: tokens are counts, blocks are numbers. It is here to try policies in seconds, and to hold them to
account.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tests.engine.scene import set_kv
from tests.scheduler_settings import scheduler_config
from tfserve.engine.scheduling.cost_model import CostModel, StepCoefficients
from tfserve.engine.scheduling.policies import make_policy
from tfserve.engine.scheduling.policy import MemoryView, ResumeBy, Snapshot, held_back, held_on_device, write_order
from tfserve.engine.scheduling.qos import Served, score
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.tracker import Tracker


@dataclass(frozen=True)
class Ask:
    arrival_s: float
    prompt: int
    output: int
    rate: float | None = 20.0
    max_tokens: int | None = None
    priority: int = 0
    thoughts: int = 0
    """Tokens of the output that come before the answer."""


H200 = StepCoefficients(4e-3, 2e-5, 2.7e-8, 2.9e-5, 1e-9)


@dataclass(frozen=True)
class Machine:
    """Defaults: Llama-3-8B on an H200 of which 30 % is used, as a linear model."""

    coefficients: StepCoefficients = H200
    kv_bytes_per_token: int = 131072
    block_size: int = 256
    num_blocks: int = 780
    num_host_blocks: int = 8000
    bps: float = 5e10
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 8192


RTX_4090 = Machine(StepCoefficients(1.8e-2, 4e-5, 1.4e-7, 1.4e-4, 4e-9), num_blocks=168, bps=2e10, max_num_seqs=128)
CPU = Machine(
    StepCoefficients(0.05, 1.5e-3, 1e-6, 1.8e-3, 1e-7), 46080, 32, 130, 2000, 2e9, max_num_seqs=64,
    max_num_batched_tokens=512,
)  # fmt: skip


class Driver:
    def __init__(self, asks: list[Ask], machine: Machine = Machine(), **scheduler) -> None:
        self.config = scheduler_config(**scheduler)
        self.policy = make_policy(self.config)
        self.machine = machine
        self.cost = CostModel(
            kv_bytes_per_token=machine.kv_bytes_per_token,
            max_num_seqs=machine.max_num_seqs,
            prior=machine.coefficients,
            store_bps=machine.bps,
            load_bps=machine.bps,
        )
        self.tracker = Tracker(self.config.default_rate)
        self.asks = {f"r{i}": ask for i, ask in enumerate(sorted(asks, key=lambda a: a.arrival_s))}
        self.pending = list(reversed(self.asks))
        self.now = 0.0
        self.steps = 0
        self.free = machine.num_blocks
        self.times: dict[str, list[float]] = {req: [] for req in self.asks}
        self.preemptions = dict.fromkeys(self.asks, 0)
        self.rejected: dict[str, float] = {}
        self.admitted: list[str] = []
        self.loads: dict[str, float] = {}
        self.evictions: dict[str, tuple[float, int, int]] = {}
        self.link_s = {"out": 0.0, "in": 0.0}
        self.moved = {"out": 0, "in": 0}
        self.forced = 0
        self.passes: list = []

    # -- running

    def run(self, max_steps: int = 200_000) -> Driver:
        while self.step():
            assert self.steps < max_steps, "no end in sight"
        return self

    def step(self) -> bool:
        self._take_events()
        if not len(self.tracker):
            if not self.pending:
                return False
            self.now = self.asks[self.pending[-1]].arrival_s
            return True
        decision = self.policy.decide(self.snapshot())
        self._apply(decision)
        self.steps += 1
        if not self._run_step(decision):
            self._sleep(decision)
        return True

    def snapshot(self) -> Snapshot:
        m, c = self.machine, self.tracker.columns(self.now)
        host = int(np.ceil(c.host_tokens / m.block_size).sum())
        memory = MemoryView(m.block_size, m.num_blocks, self.free, m.num_host_blocks, m.num_host_blocks - host)
        return Snapshot(self.now, c, memory, self.cost, m.max_num_seqs, m.max_num_batched_tokens)

    def _take_events(self) -> None:
        while self.pending and self.asks[self.pending[-1]].arrival_s <= self.now:
            req = self.pending.pop()
            ask = self.asks[req]
            self.tracker.add(
                req,
                arrival_s=ask.arrival_s,
                num_prompt=ask.prompt,
                max_tokens=ask.max_tokens or ask.output,
                rate=ask.rate,
                priority=ask.priority,
                may_think=ask.thoughts > 0,
            )
        for req, (end, blocks, tokens) in list(self.evictions.items()):
            if end <= self.now:
                del self.evictions[req]
                self.free += blocks
                set_kv(self.tracker, [req], host_tokens=tokens, device_blocks=0)
        for req, end in list(self.loads.items()):
            if end <= self.now:
                del self.loads[req]
                self.tracker.set_state(req, RequestState.RUNNING, self.now)

    # -- carrying out

    def _column(self, name: str, req: str):
        c = self.tracker.columns(self.now)
        return getattr(c, name)[c.ids.index(req)]

    def _apply(self, decision) -> None:
        c = self.tracker.columns(self.now)
        row = {req: i for i, req in enumerate(c.ids)}
        bs = self.machine.block_size
        for req, wait in decision.reject:
            self.rejected[req] = wait
            self.tracker.remove(req, completed=False)
        for req in decision.drop:
            assert c.state[row[req]] == RequestState.PAUSED
            _, blocks, _ = self.evictions.pop(req, (0.0, 0, 0))
            self.free += blocks
            set_kv(self.tracker, [req], num_computed=0, device_blocks=0, host_tokens=0)
            self.tracker.set_state(req, RequestState.WAITING, self.now)
        for req, by in decision.preempt:
            i = row[req]
            assert c.state[i] == RequestState.RUNNING
            self.preemptions[req] += 1
            computed, blocks, host = int(c.num_computed[i]), int(c.device_blocks[i]), int(c.host_tokens[i])
            if by is ResumeBy.RECOMPUTE:
                self.free += blocks
                set_kv(self.tracker, [req], num_computed=0, device_blocks=0, host_tokens=0)
                self.tracker.set_state(req, RequestState.WAITING, self.now)
                continue
            clean = min(blocks, host // bs if host < computed else blocks)
            self.free += clean
            self.tracker.set_state(req, RequestState.PAUSED, self.now)
            set_kv(self.tracker, [req], device_blocks=blocks - clean)
            if blocks > clean:
                end = self._transfer("out", computed - host)
                self.evictions[req] = (end, blocks - clean, computed)
        for req, by in decision.resume:
            i = row[req]
            assert c.state[i] == RequestState.PAUSED
            if req in self.evictions:  # the rest is still going out: let it, then come back
                continue
            if by is ResumeBy.RECOMPUTE:
                set_kv(self.tracker, [req], num_computed=0, host_tokens=0)
                self.tracker.set_state(req, RequestState.RUNNING, self.now)
                continue
            blocks = math.ceil(int(c.host_tokens[i]) / bs)
            if blocks > self.free:
                continue
            self.free -= blocks
            set_kv(self.tracker, [req], device_blocks=blocks)
            self.tracker.set_state(req, RequestState.LOADING, self.now)
            self.loads[req] = self._transfer("in", int(c.host_tokens[i]))
        for req in decision.admit:
            assert c.state[row[req]] == RequestState.WAITING
            self.admitted.append(req)
            self.tracker.set_state(req, RequestState.RUNNING, self.now)

    def _transfer(self, way: str, tokens: int) -> float:
        start = max(self.link_s[way], self.now)
        self.link_s[way] = start + tokens * self.machine.kv_bytes_per_token / self.machine.bps
        self.moved[way] += tokens
        return self.link_s[way]

    def _run_step(self, decision) -> bool:
        c, snap = self.tracker.columns(self.now), self.snapshot()
        bs = self.machine.block_size
        decoding = snap.is_decoding & ~held_back(c, self.config.generate_ahead_s)
        waits_for_decode = not decision.decode and bool(((c.state == RequestState.RUNNING) & ~snap.is_decoding).any())
        rows = [] if waits_for_decode else np.flatnonzero(decoding).tolist()
        blocks_new = snap.next_step_blocks
        batch = []
        for i in rows:
            if blocks_new[i] <= self.free and len(batch) < self.machine.max_num_batched_tokens:
                self.free -= int(blocks_new[i])
                batch.append(i)
        budget = self.machine.max_num_batched_tokens - len(batch)
        if decision.prefill_tokens is not None:
            budget = min(budget, decision.prefill_tokens)
        where = {req: i for i, req in enumerate(c.ids)}
        first = [where[req] for req in decision.order if req in where]
        others = [
            i for i in c.in_state(RequestState.RUNNING).tolist() if not snap.is_decoding[i] and i not in set(first)
        ]
        chunks: list[tuple[int, int]] = []
        for i in first + others:
            if c.state[i] != RequestState.RUNNING or snap.is_decoding[i]:
                continue
            n = min(int(c.num_uncomputed[i]), budget)
            need = math.ceil((int(c.num_computed[i]) + n) / bs) - int(c.device_blocks[i])
            if n <= 0 or need > self.free:
                continue
            self.free -= need
            budget -= n
            chunks.append((i, n))
        if not batch and not chunks:
            return False
        ctx = float(c.num_tokens[batch].sum())
        n_prefill = sum(n for _, n in chunks)
        pairs = sum(n * (float(c.num_computed[i]) + n / 2) for i, n in chunks)
        seconds = self.cost.step_s(len(batch), ctx, n_prefill, pairs)
        self.now += seconds
        self._commit(c, batch, chunks, seconds)
        return True

    def _commit(self, c, batch, chunks, seconds: float) -> None:
        bs = self.machine.block_size
        ids = list(c.ids)
        done = batch + [i for i, _ in chunks]
        n = np.array([1] * len(batch) + [k for _, k in chunks])
        computed = c.num_computed[done] + n
        sampled = [i for i, k in zip(done, computed.tolist(), strict=True) if k == c.num_tokens[i]]
        set_kv(self.tracker, [ids[i] for i in done], num_computed=computed, device_blocks=np.ceil(computed / bs))
        self.tracker.on_tokens([ids[i] for i in sampled], 1, self.now)
        if self.config.ablation.offload and self.config.ablation.write_through:
            self._write_through(seconds)
        for i in sampled:
            req = ids[i]
            self.times[req].append(self.now)
            if len(self.times[req]) == self.asks[req].thoughts:
                self.tracker.on_answer(req, self.asks[req].thoughts, self.now)
            if len(self.times[req]) == self.asks[req].output:
                self._finish(req)

    def _write_through(self, seconds: float) -> None:
        c, bs = self.tracker.columns(self.now), self.machine.block_size
        budget = int(seconds * self.machine.bps / self.machine.kv_bytes_per_token)
        dirty = (c.num_computed // bs - c.host_tokens // bs) * bs
        if not (dirty[c.state == RequestState.RUNNING] > 0).any():
            return
        where = {req: i for i, req in enumerate(c.ids)}
        order = write_order(c) if self.config.ablation.priority_writes else c.ids_of(c.in_state(RequestState.RUNNING))
        for req in order:
            n = min(int(dirty[where[req]]), budget // bs * bs)
            if n > 0:
                budget -= n
                self.moved["out"] += n
                set_kv(self.tracker, [req], host_tokens=int(c.host_tokens[where[req]]) // bs * bs + n)

    def _finish(self, req: str) -> None:
        self.free += int(self._column("device_blocks", req))
        self.tracker.remove(req, completed=True)

    def _sleep(self, decision) -> None:
        ends = [*self.loads.values(), *(end for end, _, _ in self.evictions.values())]
        if self.pending:
            ends.append(self.asks[self.pending[-1]].arrival_s)
        if decision.wake_s is not None:
            ends.append(decision.wake_s)
        _, release = held_on_device(self.tracker.columns(self.now), self.config.generate_ahead_s)
        ends += [] if release is None else [release + 1e-6]
        later = [t for t in ends if t > self.now]
        running = self.tracker.columns(self.now).in_state(RequestState.RUNNING)
        if len(running) and release is None and not self.loads and not self.evictions:
            c = self.tracker.columns(self.now)
            self._give_up(c.ids[running[-1]])
        elif later:
            self.now = min(later)
        elif len(self.tracker):
            raise AssertionError(f"deadlock at {self.now}: nothing runs, nothing will happen")

    def _give_up(self, req: str) -> None:
        """As the real scheduler: no blocks even for one, the youngest makes room."""
        self.forced += 1
        self.preemptions[req] += 1
        self.free += int(self._column("device_blocks", req))
        set_kv(self.tracker, [req], num_computed=0, device_blocks=0, host_tokens=0)
        self.tracker.set_state(req, RequestState.WAITING, self.now)

    # -- accounts

    def check(self) -> None:
        c = self.tracker.columns(self.now)
        held = int(c.device_blocks.sum())
        assert held + self.free == self.machine.num_blocks, "a block is lost or counted twice"
        assert self.free >= 0

    def served(self) -> list[Served]:
        return [
            Served(ask.arrival_s, math.nan if ask.rate is None else ask.rate, np.array(self.times[req][ask.thoughts :]))
            for req, ask in self.asks.items()
            if req not in self.rejected
        ]

    def report(self):
        return score(self.served())

    @property
    def mean_preemptions(self) -> float:
        return sum(self.preemptions.values()) / max(len(self.preemptions), 1)


def burst(n: int, prompt: int, output: int, rate: float | None = 20.0, seed: int = 0) -> list[Ask]:
    """All at once; lengths normal around the mean, sigma 20 %, clamped to [16, 2x]."""
    rng = np.random.default_rng(seed)
    return [Ask(0.0, _length(rng, prompt), _length(rng, output), rate) for _ in range(n)]


def poisson(n: int, per_s: float, prompt: int, output: int, rate: float | None = 20.0, seed: int = 0) -> list[Ask]:
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / per_s, n))
    return [Ask(float(t), _length(rng, prompt), _length(rng, output), rate) for t in at]


def _length(rng, mean: int) -> int:
    return int(np.clip(rng.normal(mean, 0.2 * mean), 16, 2 * mean))
