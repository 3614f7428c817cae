"""Scheduler: carries a policy's decisions out on requests, slots and blocks, and writes each step's plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.batch import BatchBuilder, sample_of
from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.engine.scheduling.grammar_gate import GrammarGate
from tfserve.engine.scheduling.offload_manager import OffloadManager
from tfserve.engine.scheduling.policies.tenants import Tenants
from tfserve.engine.scheduling.policy import (
    Decision,
    Policy,
    ResumeBy,
    held_on_device,
    write_order,
)
from tfserve.engine.scheduling.reasons import ReasonLog
from tfserve.engine.scheduling.request import Request
from tfserve.engine.scheduling.slots import SlotAllocator
from tfserve.engine.scheduling.snapshots import Snapshots
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.stream_states import state_before_queue, stream_states
from tfserve.engine.scheduling.tracker import Tracker
from tfserve.memory.kv_manager import KVCacheManager
from tfserve.memory.residency import PAUSED, RESUMING, KVState
from tfserve.plan import StepId, StepPlan
from tfserve.types import RequestId, RequestTimes, StreamState

_AFTER_RELEASE_S = 1e-4
"""A held-back reader is released this much late, so that it is released when the loop wakes for it."""

_KV_STATES = {
    RequestState.WAITING: (KVState.NONE,),
    RequestState.RUNNING: (KVState.DEVICE, KVState.NONE),
    RequestState.PAUSED: PAUSED,
    RequestState.LOADING: RESUMING,
}
"""Where the KV of a live request may be, in each of its states."""


class Scheduler:
    """Owns who waits, runs, is paused and is loading. One call of `schedule` makes one StepPlan.

    What is planned counts as computed from then on, so that the next step can be planned while this one runs: a request
    may have a token in flight, that only the device knows. A request preempted then gets it all the same, and comes
    back no sooner than the host knows it. `ended` says that a planned step is over.

    After `schedule`, `rejected` are requests that the policy refuses, each with the seconds after which to try again:
    the caller finishes them, and the `unservable` ones, each with the reason why its grammar could not be compiled.
    `wake_s` is when to call again, if nothing happens before; None: something will. With a `gate`, requests wait there,
    unseen by the policy, until their grammar is compiled.
    """

    def __init__(
        self,
        policy: Policy,
        kv: KVCacheManager,
        offload: OffloadManager,
        cost: CostModel,
        *,
        tracker: Tracker,
        config: SchedulerConfig,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        gate: GrammarGate | None = None,
    ) -> None:
        self._by_state: dict[RequestState, dict[RequestId, Request]] = {state: {} for state in _KV_STATES}
        self.waiting, self.running, self.paused, self.loading = self._by_state.values()
        self.kv = kv
        self.offload = offload
        self.num_dropped = 0
        self.reasons = ReasonLog()
        self.rejected: tuple[tuple[Request, float], ...] = ()
        self.unservable: Sequence[tuple[Request, str]] = ()
        self.wake_s: float | None = None
        self._gate = gate
        self._policy = policy
        self._tenants = Tenants(config)
        self._cost = cost
        self._config = config
        self._tracker = tracker
        self._snapshots = Snapshots(
            kv, tracker, cost, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self._slots = SlotAllocator(max_num_seqs)
        self._batch = BatchBuilder(kv, max_num_batched_tokens)
        self._steps_under_way = 0
        self._started: list[RequestId] = []

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self.running or self.num_waiting or self.paused or self.loading)

    @property
    def num_preemptions(self) -> int:
        """How often a request was taken off the device."""
        return self._tracker.num_preemptions

    @property
    def num_waiting(self) -> int:
        """How many requests wait, in the queue or for their grammar."""
        return len(self.waiting) + (0 if self._gate is None else self._gate.num_waiting)

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many requests wait, run, and are off the device with KV kept."""
        return self.num_waiting, len(self.running), len(self.paused) + len(self.loading)

    def add(self, request: Request) -> None:
        """Put a new request at the end of the queue, or first to where its grammar is compiled."""
        if self._gate is None or self._gate.enter(request):
            self._queue(request)

    def _queue(self, request: Request) -> None:
        self.waiting[request.id] = request
        request.entry = self._tracker.add(
            request.id,
            arrival_s=request.arrival_s,
            num_prompt=request.num_prompt_tokens,
            max_tokens=request.max_tokens,
            rate=request.rate,
            is_rate_assumed=request.is_rate_assumed,
            priority=request.priority,
            tenant=request.tenant,
            may_think=request.thoughts is not None,
        )

    def finish(self, request: Request, *, completed: bool) -> None:
        """Take a request out, wherever it is, and free its slot and blocks; `completed`: it ended as it should."""
        if self._gate is not None and self._gate.leave(request):
            request.is_finished = True
            return
        if request.slot is not None:
            self._slots.leave(request)
        self.kv.release(request.id)
        del self._by_state[request.state][request.id]
        request.is_finished = True
        self._tracker.remove(request.id, completed=completed)

    def take_started(self) -> list[RequestId]:
        """Requests that were let in, for the first time, since the last call."""
        started, self._started = self._started, []
        return started

    def on_played(self, request: Request, num_tokens: int, now_s: float) -> None:
        """The reader of a live request reports how much of it has been read."""
        if not self._is_gated(request):
            self._tracker.on_played(request.id, num_tokens, now_s)

    def times(self, request: Request, now_s: float) -> RequestTimes:
        """The time stamps of a live request that ends now."""
        if self._is_gated(request):
            return RequestTimes(request.arrival_s, finished_s=now_s)
        return RequestTimes(
            request.arrival_s,
            request.first_scheduled_s,
            request.first_token_s,
            now_s,
            request.num_preemptions,
            self._tracker.stall_s(request.id, now_s),
        )

    def streams(self, now_s: float) -> list[StreamState]:
        """Every live request, in order of arrival."""
        live = {req: request for group in self._by_state.values() for req, request in group.items()}
        has_slot = self._has_free_slot
        why = {req: self.reasons.words(request, live, has_batch_slot=has_slot) for req, request in live.items()}
        queued = stream_states(self._tracker.columns(now_s), self._tracker.is_rate_assumed, why, now_s)
        gated = () if self._gate is None else self._gate.waiting
        states = [state_before_queue(request, self._config.default_rate, now_s) for request in gated]
        return sorted([*queued, *states], key=lambda state: -state.age_s) if states else queued

    def take_acks(self, now_s: float) -> None:
        """Let requests whose KV has come back run, and queue those again that lost it to a failed copy."""
        ended, failed = self.offload.poll()
        for req in ended:
            self._settle(self.loading[req], now_s)
        for request in [*self.paused.values(), *self.loading.values()] if failed else ():
            if self.kv.view(request.id).state is KVState.NONE:
                self._move(request, RequestState.WAITING, now_s)

    def schedule(self, step: StepId, now_s: float) -> StepPlan:
        """Ask the policy and plan the coming step; a plan without `seqs` has only copies to make."""
        self._pass_gate()
        self.offload.cancel_withdrawn()
        self.kv.begin_step(step)
        snapshot = self._snapshots.take(now_s)
        columns = snapshot.columns
        held_rows, release_s = held_on_device(columns, self._config.generate_ahead_s)
        held = frozenset(columns.ids_of(held_rows))
        decision = self._tenants.decide(self._policy, snapshot)
        held |= decision.hold
        # Before anything is carried out: the columns are views.
        write_first = write_order(columns) if self.offload.enabled and self._config.ablation.priority_writes else None
        with self.reasons.carrying_out(decision):
            self._carry_out(decision, int(snapshot.next_step_blocks.sum()), now_s)
        seqs, n_decode = self._batch.build(self.running, decision, held)
        while not seqs and self._unblock(held, now_s):
            seqs, n_decode = self._batch.build(self.running, decision, held)
        if self.offload.enabled and self.running:
            work = sample_of(seqs, n_decode, 0.0)
            predicted_s = self._cost.step_s(work.n_decode, work.decode_ctx, work.n_prefill, work.prefill_ctx)
            order = columns.ids_of(columns.in_state(RequestState.RUNNING)) if write_first is None else write_first
            self.offload.write_through(order, predicted_s if seqs else None)
        refused = ((self.waiting.get(req), wait_s) for req, wait_s in decision.reject)
        # An admitted request was promised an answer.
        self.rejected = tuple((r, wait_s) for r, wait_s in refused if r is not None and r.first_scheduled_s is None)
        moments = [decision.wake_s, None if release_s is None else release_s + _AFTER_RELEASE_S]
        moments.append(None if self._gate is None else self._gate.wake_s)
        self.wake_s = min((moment for moment in moments if moment is not None), default=None)
        self._steps_under_way += bool(seqs)
        self._tracker.on_planned([seq.req for seq in seqs if seq.sample])
        entered, released = self._slots.take_changes() if seqs else ((), ())
        stores, loads = self.offload.take()
        return StepPlan(step, tuple(seqs), n_decode, entered, released, stores, loads)

    def ended(self, plan: StepPlan) -> None:
        """The oldest step under way is over, well or badly."""
        self._steps_under_way -= 1
        self.offload.complete(plan.step)

    def deliver(self, reqs: Sequence[RequestId], now_s: float) -> None:
        """Each of these requests has a new token, and its reader gets it now."""
        self._tracker.on_tokens(reqs, 1, now_s)

    def on_early_token(self, request: Request, token: int, now_s: float) -> None:
        """A token, delivered and not yet appended, of a request with none to read: of its thoughts, or the first."""
        thoughts = request.thoughts
        if thoughts is not None and not thoughts.is_over:
            thoughts.push((token,))
            if thoughts.is_over:
                self._tracker.on_answer(request.id, thoughts.num_tokens, now_s)
            if thoughts.num_tokens > request.num_output_tokens or not thoughts.is_over:
                return
        request.first_token_s = now_s

    def observe(self, plan: StepPlan, device_s: float) -> None:
        """Learn from how long a step took."""
        self._cost.observe_step(sample_of(plan.seqs, plan.n_decode, device_s))

    def check(self) -> None:
        """Raise AssertionError unless queues, slots and blocks agree with each other."""
        self._tracker.table.check()
        self.kv.check()
        self._slots.check(list(self.running.values()))
        for state, group in self._by_state.items():
            for request in group.values():
                view = self.kv.view(request.id)
                if view.num_tokens != request.num_computed_tokens:
                    raise AssertionError(f"{request.id}: its blocks have room for other than its computed tokens")
                has_slot = request.slot is not None
                if (
                    request.state is not state
                    or has_slot is not (state is RequestState.RUNNING)
                    or view.state not in _KV_STATES[state]
                ):
                    raise AssertionError(
                        f"{request.id} is {request.state.name} with KV {view.state.name}, slot {request.slot}"
                    )

    def close(self) -> None:
        """Let go of threads and memory; nothing may be scheduled after."""
        if self._gate is not None:
            self._gate.close()
        self.offload.close()

    def _is_gated(self, request: Request) -> bool:
        return self._gate is not None and self._gate.holds_back(request)

    def _pass_gate(self) -> None:
        """Queue the requests whose grammar has been compiled meanwhile."""
        if self._gate is not None:
            ready, self.unservable = self._gate.poll()
            for request in ready:
                self._queue(request)

    def _carry_out(self, decision: Decision, reserved: int, now_s: float) -> None:
        """Drop, preempt, load, resume and admit; loads leave `reserved` device blocks for the coming step.

        A request with a token in flight cannot come back yet: it would compute that token a second time.
        """
        for req in decision.drop:
            self.kv.release(req)
            self._move(self.paused[req], RequestState.WAITING, now_s)
        for req, by in decision.preempt:
            self._preempt(self.running[req], by, now_s)
        for request in list(self.loading.values()):
            self._load(request, reserved, now_s)
        for req, by in decision.resume:
            if self._has_free_slot and not self.paused[req].num_in_flight:
                self._resume(self.paused[req], by, reserved, now_s)
        for req in decision.admit:
            if self._has_free_slot and not self.waiting[req].num_in_flight:
                self._enter(self.waiting[req], now_s)

    @property
    def _has_free_slot(self) -> bool:
        """True if one more may come: a slot is kept for each loading request."""
        return self._slots.num_free > len(self.loading)

    def _preempt(self, request: Request, by: ResumeBy, now_s: float) -> None:
        """Take a request off the device; it keeps its KV if that is wanted and there is room on the host."""
        self._slots.leave(request)
        if by is ResumeBy.LOAD:
            self.offload.preempt(request.id)
        else:
            self.kv.release(request.id)
        kept = self.kv.view(request.id).state is not KVState.NONE
        self.num_dropped += not kept
        request.resume = None
        self._move(request, RequestState.PAUSED if kept else RequestState.WAITING, now_s)

    def _resume(self, request: Request, by: ResumeBy, reserved: int, now_s: float) -> None:
        if by is ResumeBy.RECOMPUTE:
            self.kv.release(request.id)
            self._enter(request, now_s)
        else:
            request.resume = ("load", now_s)
            self._move(request, RequestState.LOADING, now_s)
            self._load(request, reserved, now_s)

    def _load(self, request: Request, reserved: int, now_s: float) -> None:
        """Go on bringing a request back, but for `reserved` blocks."""
        self.offload.resume(request.id, max(0, self.kv.num_free_blocks + self.kv.num_storing_blocks - reserved))
        self._settle(request, now_s)

    def _settle(self, request: Request, now_s: float) -> None:
        """Give a slot to a loading request whose KV is all on the device; queue it if nothing of it is left."""
        state = self.kv.view(request.id).state
        if state is KVState.DEVICE:
            self._enter(request, now_s)
        elif state is KVState.NONE:
            request.resume = None
            self._move(request, RequestState.WAITING, now_s)

    def _enter(self, request: Request, now_s: float) -> None:
        """Give a request a slot; it goes on after the tokens that have KV on the device."""
        if request.num_in_flight:
            raise AssertionError(f"{request.id}: takes a slot while a step still samples for it")
        view = self.kv.view(request.id)
        request.device_has_token = False
        self._slots.enter(request, view.blocks)
        if request.first_scheduled_s is None:
            request.first_scheduled_s = now_s
            self._started.append(request.id)
        elif request.resume is None:
            request.resume = ("recompute", now_s)
        self._move(request, RequestState.RUNNING, now_s)

    def _move(self, request: Request, state: RequestState, now_s: float) -> None:
        """Change a request's state, and with it the group it is in."""
        self.reasons.on_move(request, request.state, state)
        del self._by_state[request.state][request.id]
        self._by_state[state][request.id] = request
        self._tracker.set_state(request.id, state, now_s)
        if state is RequestState.WAITING:
            request.device_has_token = False

    def _unblock(self, held: Collection[RequestId], now_s: float) -> bool:
        """Nothing runs in the coming step: change something if nothing else will; True to try again.

        Policies never mean to let it come to this. A step under way, a reader's buffer that runs down and a copy that
        ends are reasons to wait. Otherwise the youngest on the device makes room for the others, or the oldest of all
        comes onto it.
        """
        if self._steps_under_way or held or self.offload.is_busy:
            return False
        if self.loading and (self.running or len(self.loading) > 1):
            # They hold blocks that the others lack, and find no more.
            youngest = max(self.loading.values(), key=_age)
            self.offload.preempt(youngest.id)
            kept = self.kv.view(youngest.id).state is not KVState.NONE
            self._move(youngest, RequestState.PAUSED if kept else RequestState.WAITING, now_s)
        elif len(self.running) > 1:
            self._preempt(max(self.running.values(), key=_age), ResumeBy.LOAD, now_s)
        elif not self.running and not self.loading and (self.paused or self.waiting):
            oldest = min([*self.paused.values(), *self.waiting.values()], key=_age)
            if oldest.state is RequestState.PAUSED:
                self._resume(oldest, ResumeBy.LOAD, 0, now_s)
            else:
                self._enter(oldest, now_s)
        elif self.running or self.loading:
            # Alone, anything fits that was validated.
            stuck = [*self.running, *self.loading]
            raise AssertionError(f"{stuck} cannot go on, with {self.kv.num_free_blocks} blocks free")
        else:
            return False
        return True


def _age(request: Request) -> tuple[float, RequestId]:
    return request.arrival_s, request.id
