"""Scheduler: carries a policy's decisions out on requests, rows and blocks, and writes each step's plan. Torch-free."""

from __future__ import annotations

import heapq
from collections import deque

from tfserve.engine.cost_model import CostModel
from tfserve.engine.policy import MemoryView, Policy, Snapshot
from tfserve.engine.request import Request, RequestState
from tfserve.engine.tracker import Phase, Tracker
from tfserve.memory.kv_manager import KVCacheManager
from tfserve.plan import Fence, Row, RowInit, SeqStep, StepPlan
from tfserve.types import RequestId


class Scheduler:
    """Owns the waiting queue, the running set and the rows. One call of `schedule` makes one StepPlan."""

    def __init__(self, policy: Policy, kv: KVCacheManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.waiting: deque[Request] = deque()
        self.running: dict[RequestId, Request] = {}
        self.kv = kv
        self.num_preemptions = 0
        self._policy = policy
        self._tracker = Tracker(default_rate=20.0)
        self._cost = CostModel(kv_bytes_per_token=1, max_num_seqs=max_num_seqs)
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._free_rows = [Row(row) for row in range(max_num_seqs)]
        self._released_rows: list[Row] = []
        self._entered: list[RowInit] = []

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Put a new request at the end of the queue."""
        self.waiting.append(request)
        self._tracker.add(
            request.id,
            arrival_s=request.arrival_s,
            num_prompt=request.num_prompt_tokens,
            max_tokens=request.max_tokens,
            rate=None,
        )

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is, and free its row and blocks."""
        if request.state is RequestState.RUNNING:
            self._vacate(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        self._tracker.remove(request.id, completed=True)

    def schedule(self, step: Fence, now_s: float) -> StepPlan | None:
        """Ask the policy and plan the coming step; None when nothing can run."""
        decision = self._policy.decide(self._snapshot(now_s))
        victims = [self.running[req] for req, _ in decision.preempt]
        # Youngest first to the head of the queue, so that the oldest ends up in front.
        for victim in sorted(victims, key=lambda request: request.arrival_s, reverse=True):
            self._preempt(victim, now_s)
        for req in decision.admit:
            self._admit(req, now_s)
        seqs, n_decode = self._fill(decision.decode)
        while not seqs and self.running:
            # No blocks even for one: the youngest makes room, whatever the policy hoped.
            self._preempt(next(reversed(self.running.values())), now_s)
            seqs, n_decode = self._fill(decode=True)
        if not seqs:
            return None
        plan = StepPlan(step, tuple(seqs), n_decode, tuple(self._entered), tuple(self._released_rows))
        self._entered.clear()
        self._released_rows.clear()
        return plan

    def advance(self, seq: SeqStep) -> Request | None:
        """Count a finished share of a step as computed; None if its request left meanwhile."""
        request = self.running.get(seq.req)
        if request is not None:
            request.num_computed_tokens = seq.start + seq.n
            request.device_has_token = seq.sample
        return request

    def check(self) -> None:
        """Raise AssertionError unless queue, rows and blocks agree with each other."""
        self.kv.check()
        rows = sorted([*self._free_rows, *(r.row for r in self.running.values() if r.row is not None)])
        if rows != list(range(len(rows))) or len(self._free_rows) + len(self.running) != len(rows):
            raise AssertionError("a row is both free and taken, or lost")
        for request in self.running.values():
            if self.kv.view(request.id).num_tokens != request.num_computed_tokens:
                raise AssertionError(f"{request.id}: its blocks have room for other than its computed tokens")
        for request in self.waiting:
            if request.row is not None or self.kv.view(request.id).blocks:
                raise AssertionError(f"{request.id} waits, yet holds a row or blocks")

    def _snapshot(self, now_s: float) -> Snapshot:
        running = list(self.running.values())
        ids = [request.id for request in running]
        known = self._tracker.columns(now_s)
        output = dict(zip(known.ids, known.num_output.tolist(), strict=True))
        self._tracker.on_tokens(ids, [r.num_output_tokens - output[r.id] for r in running], now_s)
        computed = [request.num_computed_tokens for request in running]
        self._tracker.update(ids, num_computed=computed, device_blocks=[self.kv.blocks_for(n) for n in computed])
        return Snapshot(
            now_s=now_s,
            columns=self._tracker.columns(now_s),
            memory=MemoryView(self.kv.block_size, self.kv.num_blocks - 1, self.kv.num_free_blocks),
            cost=self._cost,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
        )

    def _fill(self, decode: bool) -> tuple[list[SeqStep], int]:
        """Spend the token budget: decodes first, then prompts in order of admission."""
        requests = self.running.values()
        decodes: list[SeqStep] = []
        for request in requests if decode else ():
            if request.is_decoding and len(decodes) < self._max_num_batched_tokens:
                self._append_step(decodes, request, 1)
        budget = self._max_num_batched_tokens - len(decodes)
        prefills: list[SeqStep] = []
        for request in requests:
            n = min(request.num_tokens - request.num_computed_tokens, budget)
            if request.is_decoding or n == 0:
                continue
            if self._append_step(prefills, request, n):
                budget -= n
        return decodes + prefills, len(decodes)

    def _append_step(self, seqs: list[SeqStep], request: Request, n: int) -> bool:
        """Plan n tokens of a request if there are blocks for them; a request without waits for the next step."""
        start = request.num_computed_tokens
        new_blocks = self.kv.extend(request.id, n, request.num_prompt_tokens + request.max_tokens)
        if new_blocks is None or request.row is None:
            return False
        tokens = None if request.is_decoding else tuple(request.token_ids[start : start + n])
        sample = start + n == request.num_tokens
        seqs.append(SeqStep(request.id, request.row, start, n, sample, tokens, new_blocks))
        return True

    def _admit(self, req: RequestId, now_s: float) -> None:
        request = next(request for request in self.waiting if request.id == req)
        self.waiting.remove(request)
        self._tracker.set_phase(req, Phase.RUNNING, now_s)
        request.row = heapq.heappop(self._free_rows)
        request.state = RequestState.RUNNING
        if request.first_scheduled_s is None:
            request.first_scheduled_s = now_s
        self.running[req] = request
        self._entered.append(
            RowInit(
                row=request.row,
                req=req,
                params=request.params,
                seed=request.seed,
                token_ids=tuple(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                eos_token_ids=tuple(request.eos_token_ids),
            )
        )

    def _preempt(self, request: Request, now_s: float) -> None:
        """Give up a request's KV and row; it goes back to the head of the queue and recomputes."""
        self._vacate(request)
        request.state = RequestState.WAITING
        request.num_computed_tokens = 0
        request.device_has_token = False
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        self._tracker.set_phase(request.id, Phase.WAITING, now_s)
        self._tracker.update([request.id], num_computed=0, device_blocks=0)

    def _vacate(self, request: Request) -> None:
        del self.running[request.id]
        self.kv.release(request.id)
        if request.row is None:
            raise AssertionError(f"{request.id} runs without a row")
        heapq.heappush(self._free_rows, request.row)
        entering = len(self._entered)
        self._entered = [entry for entry in self._entered if entry.req != request.id]
        # A row whose entry was never sent needs no release.
        if len(self._entered) == entering:
            self._released_rows.append(request.row)
        request.row = None
