"""TokenFlow: schedule by what readers have left to read (tokenflow.md section 5)."""

from __future__ import annotations

import msgspec
import numpy as np

from tfserve.config import SchedulerConfig
from tfserve.engine.policies.balance import Balance
from tfserve.engine.policies.fcfs import admissible
from tfserve.engine.policies.headroom import headroom_s
from tfserve.engine.policies.prefill import prefill_order, prefill_tokens
from tfserve.engine.policies.sharing import Ticker, out_of_blocks
from tfserve.engine.policies.working_set import WorkingSet, measure, members, predicted_wait_s
from tfserve.engine.policy import Decision, Snapshot
from tfserve.engine.table import Rows
from tfserve.engine.token_buffer import Floats
from tfserve.types import RequestId


class TokenFlow:
    """Two steps: who is let in (the working set), and who of them is on the device (the balance of buffers).

    It remembers when it last looked, how large the working set is and whether admission has fallen back; everything
    else is a function of the snapshot.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._ticker = Ticker(config.schedule_interval_s)
        self._working_set = WorkingSet()

    @property
    def is_fallback(self) -> bool:
        """True while the rates add up to more than the capacity and admission is first come, first served."""
        return self._working_set.is_fallback

    def decide(self, snapshot: Snapshot) -> Decision:
        """A full pass under stress when one is due, or when blocks run out; the share of prompts in every step."""
        c = snapshot.columns
        if not len(c):
            return Decision()
        stressed = is_stressed(snapshot, self._config.critical_s)
        if not (stressed and self._ticker.due(snapshot.now_s, c.num_events)) and not out_of_blocks(snapshot):
            return self._go_on(snapshot, Decision(wake_s=self._ticker.next_s if stressed else None))
        self._ticker.ran(snapshot.now_s, c.num_events)
        return self._go_on(snapshot, self._pass(snapshot))

    def _pass(self, snapshot: Snapshot) -> Decision:
        c, config = snapshot.columns, self._config
        load = measure(snapshot, config)
        self._working_set.move(load, snapshot, config)
        balance = Balance(snapshot, config)
        balance.shrink()
        balance.bring_back()
        newcomers = _newcomers(snapshot, balance.headroom)
        room = self._working_set.room_for(newcomers, load, snapshot, config)
        blocked = balance.let_in(newcomers[:room])
        if not blocked:
            balance.fill_up()
        decision = balance.orders()
        refused: tuple[tuple[RequestId, float], ...] = ()
        if self._working_set.is_fallback and not balance.leaving and not balance.coming:
            # What first come, first served would let in beside everybody's whole output is no risk.
            decision = Decision(admit=admissible(snapshot, config.reserve_ratio, config.reserve_clip_tokens))
        if self._working_set.is_fallback and config.overload == "shed":
            admitted = set(decision.admit)
            late = [row for row in newcomers[room:].tolist() if c.ids[row] not in admitted]
            refused = tuple((c.ids[row], predicted_wait_s(snapshot, config, ahead)) for ahead, row in enumerate(late))
        self._ticker.timer_s = balance.next_return_s()
        return msgspec.structs.replace(decision, reject=refused, wake_s=self._ticker.next_s)

    def _go_on(self, snapshot: Snapshot, decision: Decision) -> Decision:
        """Add who gets prompt tokens and how many."""
        c, config = snapshot.columns, self._config
        headroom = headroom_s(c, snapshot.now_s, config.background_patience_s)
        order = prefill_order(snapshot, headroom)
        if not len(order) and not decision.admit:
            return decision
        tokens = prefill_tokens(snapshot, config.min_prefill_share)
        return msgspec.structs.replace(decision, order=c.ids_of(order), prefill_tokens=tokens)


def is_stressed(snapshot: Snapshot, critical_s: float) -> bool:
    """True if somebody waits, is off the device, or has less than `critical_s` to read."""
    c = snapshot.columns
    if (~c.is_running).any():
        return True
    return bool((c.has_started & (c.time_to_empty_s < critical_s)).any())


def _newcomers(snapshot: Snapshot, headroom: Floats) -> Rows:
    """Requests not let in yet: first come first served, those without a reader behind until their patience is over."""
    rows = np.flatnonzero(~members(snapshot))
    if not len(rows):
        return rows
    c = snapshot.columns
    priority = np.where(np.isnan(c.rate[rows]) & (headroom[rows] > 0), c.priority[rows], np.iinfo(np.int64).min)
    return rows[np.lexsort((c.seq[rows], headroom[rows], priority))]
