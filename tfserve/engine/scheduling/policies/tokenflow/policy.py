"""TokenFlow: schedule by what readers have left to read (docs/scheduling.md)."""

from __future__ import annotations

import msgspec
import numpy as np

from tfserve.arrays import Floats, RowIndex
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies.counted import as_counted, stream_share
from tfserve.engine.scheduling.policies.fcfs import admissible
from tfserve.engine.scheduling.policies.headroom import headroom_s
from tfserve.engine.scheduling.policies.registry import register
from tfserve.engine.scheduling.policies.sharing import Ticker, out_of_blocks
from tfserve.engine.scheduling.policies.tokenflow.admission import AdmissionLimit, estimate_capacity, predicted_wait_s
from tfserve.engine.scheduling.policies.tokenflow.far_ahead import to_drop
from tfserve.engine.scheduling.policies.tokenflow.prefill_budget import PrefillBudget, pending_tokens, prefill_order
from tfserve.engine.scheduling.policies.tokenflow.swaps import SwapPlanner
from tfserve.engine.scheduling.policy import Decision, Snapshot
from tfserve.engine.scheduling.reasons import Cause
from tfserve.types import RequestId

_ROUNDING_S = 1e-6
"""Buffers are looked at this much earlier than need be: times are rounded."""


@register("tokenflow", pauses=True, ignores=())
class TokenFlow:
    """Two steps: which requests are admitted (the working set), and which of them are on the device (the swaps).

    It remembers when it last looked, what one stream then got of a full device, whether a newcomer then lacked memory,
    until when no buffer can be low, how large the working set is, whether admission has fallen back, and what share of
    the time prompts are owed; everything else is a function of the snapshot.
    `num_passes` counts full passes.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._ticker = Ticker(config.schedule_interval_s)
        self._admission = AdmissionLimit()
        self._prefill_budget = PrefillBudget(config)
        self._calm_until_s = -np.inf
        self._calm_since = (-1, -1)
        self._hurry_s = np.inf
        self._recompute_s = -np.inf
        self._stream_share = np.inf
        self.num_passes = 0

    @property
    def is_fallback(self) -> bool:
        """True while the rates add up to more than the capacity and admission is first come, first served."""
        return self._admission.is_fallback

    def decide(self, snapshot: Snapshot) -> Decision:
        """A full pass under stress when one is due, or when blocks run out; the share of prompts in every step."""
        if not len(snapshot.columns):
            return Decision()
        taken, snapshot = snapshot, as_counted(snapshot, self._stream_share)
        c = snapshot.columns
        stressed = self._is_stressed(snapshot)
        is_due = stressed and self._ticker.due(snapshot.now_s, c.num_events, is_urgent=self._wants_prompts(snapshot))
        if not is_due and not out_of_blocks(snapshot):
            return self._go_on(snapshot, Decision(wake_s=self._ticker.next_s if stressed else None))
        self._ticker.ran(snapshot.now_s, c.num_events)
        self.num_passes += 1
        self._stream_share = stream_share(taken, self._config.default_rate)
        snapshot = as_counted(taken, self._stream_share)
        return self._go_on(snapshot, self._pass(snapshot))

    def _is_stressed(self, snapshot: Snapshot) -> bool:
        """As `is_stressed`, but buffers are only looked at when one of them may have got low.

        Without news of a reader, no buffer gets shorter by more than the time that goes by.
        """
        c = snapshot.columns
        if snapshot.now_s < self._calm_until_s and self._calm_since == (c.num_events, c.num_readings):
            # A request that leaves the device comes back with an event, or is seen here.
            return bool(np.count_nonzero(c.is_running) < len(c))
        if is_stressed(snapshot, self._config.tokenflow.low_buffer_s):
            return True
        min_unread_s = float(c.time_to_empty_s[c.has_started].min(initial=np.inf))
        self._calm_until_s = snapshot.now_s + min_unread_s - self._config.tokenflow.low_buffer_s - _ROUNDING_S
        self._calm_since = (c.num_events, c.num_readings)
        return False

    def _wants_prompts(self, snapshot: Snapshot) -> bool:
        """True if a newcomer lacked memory, for an interval, and prompts are left for less than a step.

        Then any step may make a victim that it need not wait longer for.
        """
        return snapshot.now_s >= self._hurry_s and pending_tokens(snapshot) < snapshot.max_num_batched_tokens

    def _pass(self, snapshot: Snapshot) -> Decision:
        c, config = snapshot.columns, self._config
        capacity = estimate_capacity(snapshot, config)
        self._admission.update(capacity, snapshot, config)
        planner = SwapPlanner(snapshot, config, may_recompute=snapshot.now_s >= self._recompute_s)
        planner.evict_overflow()
        planner.resume_due()
        if planner.recompute_pays_s:
            self._recompute_s = snapshot.now_s + planner.recompute_pays_s
        newcomers = _newcomers(snapshot, planner.headroom)
        room = self._admission.num_admissible(newcomers, capacity, snapshot, config)
        self._hurry_s = np.inf
        if planner.admit(newcomers[:room]):
            # A request without a reader is in want once its patience ends. Without readers no step makes a victim.
            if c.has_reader.any():
                wanted_s = snapshot.now_s + float(planner.headroom[newcomers[:room]].min())
                self._hurry_s = wanted_s + config.schedule_interval_s
        else:
            planner.backfill()
        decision = planner.decision()
        if self._admission.is_fallback and not planner.leaving and not planner.coming:
            fitting = admissible(snapshot, config.fcfs.reserve_ratio, config.fcfs.reserve_clip_tokens)
            if config.overload != "shed":
                # What first come, first served would let in beside the whole output of all running requests is no risk.
                decision = Decision(admit=fitting)
            elif not decision.admit and not snapshot.is_member.any():
                # No reader stalls if one request is served whose rate is beyond the device.
                decision = Decision(admit=fitting[:1])
        refused = self._refused(snapshot, newcomers, room, decision)
        self._ticker.timer_s = planner.next_return_s()
        returning = {req for req, _ in decision.resume}
        drop = tuple(req for req in to_drop(snapshot) if req not in returning)
        waits = Cause.CAPACITY if self._admission.is_fallback else None
        return msgspec.structs.replace(decision, drop=drop, reject=refused, wake_s=self._ticker.next_s, waits=waits)

    def _refused(
        self, snapshot: Snapshot, newcomers: RowIndex, room: int, decision: Decision
    ) -> tuple[tuple[RequestId, float], ...]:
        """Under `shed`: the newcomers beyond the first `room`, and in how many seconds there may be room for them."""
        c, config = snapshot.columns, self._config
        if not self._admission.is_fallback or config.overload != "shed":
            return ()
        admitted = set(decision.admit)
        # A request without a reader adds nothing to the sum of rates: it waits for what is left over.
        late = [row for row in newcomers[room:].tolist() if c.has_reader[row] and c.ids[row] not in admitted]
        joining = newcomers[:room]
        return tuple((c.ids[row], predicted_wait_s(snapshot, config, ahead, joining)) for ahead, row in enumerate(late))

    def _go_on(self, snapshot: Snapshot, decision: Decision) -> Decision:
        """Add who gets prompt tokens and how many."""
        c, config = snapshot.columns, self._config
        if np.count_nonzero(c.is_running) == np.count_nonzero(snapshot.is_decoding):
            self._prefill_budget.rest()
            return decision
        headroom = headroom_s(c, snapshot.now_s, config.tokenflow.background_slack_s)
        order = prefill_order(snapshot, headroom)
        tokens = self._prefill_budget.tokens(snapshot, headroom)
        return msgspec.structs.replace(decision, order=c.ids_of(order), prefill_tokens=tokens)


def is_stressed(snapshot: Snapshot, low_buffer_s: float) -> bool:
    """True if a request waits, is off the device, or has less than `low_buffer_s` to read."""
    c = snapshot.columns
    if np.count_nonzero(c.is_running) < len(c):
        return True
    return bool((c.has_started & (c.time_to_empty_s < low_buffer_s)).any())


def _newcomers(snapshot: Snapshot, headroom: Floats) -> RowIndex:
    """Requests not let in yet: first come first served, those without a reader behind until their patience is over."""
    rows = np.flatnonzero(~snapshot.is_member)
    if not len(rows):
        return rows
    c = snapshot.columns
    priority = np.where(np.isnan(c.rate[rows]) & (headroom[rows] > 0), c.priority[rows], np.iinfo(np.int64).min)
    return rows[np.lexsort((c.seq[rows], headroom[rows], priority))]
