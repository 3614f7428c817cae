"""SwapPlanner: which admitted requests are on the device, the second step of a pass (docs/scheduling.md)."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from tfserve.arrays import Floats, Ints, Mask, RowIndex
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies.counted import as_unread
from tfserve.engine.scheduling.policies.headroom import gain, headroom_s, loss_order
from tfserve.engine.scheduling.policies.sharing import (
    resident_blocks,
    return_s,
    round_trip_s,
    stream_speed,
    swap_decision,
    usable_blocks,
)
from tfserve.engine.scheduling.policies.tokenflow.far_ahead import is_far_ahead
from tfserve.engine.scheduling.policies.tokenflow.prefill_budget import pending_tokens
from tfserve.engine.scheduling.policies.tokenflow.victims import Victims, Way
from tfserve.engine.scheduling.policy import Decision, Snapshot

_MAX_SWAPS = 64
"""Swaps considered in one pass; the rest waits for the next."""

_MAX_VICTIMS = 2 * _MAX_SWAPS
"""Residents considered for them, least loss first."""

_STAY_PER_RECOMPUTE = 10.0
"""A request to be recomputed stays this many times as long as that takes: a recompute is device time lost to all."""


class SwapPlanner:
    """A local search that starts from who is resident. Each method moves requests across the boundary of the device.

    A resident pays no overhead, so the start is the greedy choice as far as it is affordable to reach. Spare
    memory is filled by gain; beyond that a swap must raise the total gain, fit, and pass the hysteresis. Those off
    the device come back lazily: they displace a resident only when what they have left to read nears what it takes to
    return.
    """

    def __init__(self, snapshot: Snapshot, config: SchedulerConfig, *, may_recompute: bool = True) -> None:
        snapshot = as_unread(snapshot)
        c = snapshot.columns
        self.recompute_pays_s = 0.0
        """How long the device must go on until a recompute that displaced one has cost no more than its share."""
        self._may_recompute = may_recompute
        self.leaving: list[int] = []
        self.coming: list[int] = []
        self._made_for: dict[int, int] = {}
        """The row that each of `leaving` makes room for; the others make room for the residents' growth."""
        self.headroom: Floats = headroom_s(c, snapshot.now_s, config.tokenflow.background_slack_s)
        self._snapshot = snapshot
        self._config = config
        self._speed = stream_speed(snapshot)
        self._return_s, self._loads = return_s(snapshot)
        self._running = c.is_running
        self._resident = self._running | c.is_loading
        self._num_residents = int(np.count_nonzero(self._resident))
        self._need = resident_blocks(snapshot)
        self._usable = usable_blocks(snapshot, config.watermark)
        self._spare = self._usable - int(np.dot(self._need, self._resident))
        self._free_slots = snapshot.num_free_slots
        self._away = np.flatnonzero(snapshot.is_member & ~self._resident)
        self._is_due = self.headroom <= self._return_s + config.tokenflow.low_buffer_s + 1e-9
        self._lacks_memory = False
        """Whether a request without a reader is due to return and finds no memory."""

    # What only some passes need is computed when it is asked for.

    @cached_property
    def _round_trip(self) -> tuple[Floats, Mask]:
        """For each resident, the seconds of leaving and coming back; and whether that is by the host."""
        return round_trip_s(self._snapshot, offload=self._config.ablation.offload)

    @cached_property
    def _stay_s(self) -> Floats:
        """The least time that each request stays once it is on the device."""
        switch_s, by_host = self._round_trip
        recompute_s = np.where(by_host, 0.0, switch_s)
        recompute_s = np.where(self._running, recompute_s, np.where(self._loads, 0.0, self._return_s))
        return np.maximum(self._config.tokenflow.min_residency_s, _STAY_PER_RECOMPUTE * recompute_s)

    @cached_property
    def _latest(self) -> Ints:
        """Which of several requests that think is to leave first: the latest, so that the others are soon done."""
        return np.where(self._snapshot.columns.thinks, -self._snapshot.columns.seq, 0)

    @cached_property
    def _victims(self) -> Victims:
        """Residents that decode and have had their minimum stay, least loss first."""
        snapshot, config = self._snapshot, self._config
        c = snapshot.columns
        stayed_s = snapshot.now_s - c.state_since_s
        rows = np.flatnonzero(snapshot.is_decoding & (stayed_s >= self._stay_s - 1e-9))
        gains = self._gains(rows)
        loss = loss_order(
            gains,
            unread=c.unread[rows],
            rate=c.rate[rows],
            num_output=c.num_answer[rows],
            expected_output=c.expected_answer[rows],
            # Of a short answer, a large share is little to read: a request that left with less would be due at once.
            min_unread_s=self._round_trip[0][rows] + config.tokenflow.low_buffer_s,
        )
        if len(rows) > _MAX_VICTIMS:
            # No other request, ties included, can be among the first: the others need not be sorted.
            first = loss <= np.partition(loss, _MAX_VICTIMS - 1)[_MAX_VICTIMS - 1]
            rows, gains, loss = rows[first], gains[first], loss[first]
        order = np.lexsort((self._latest[rows], -self.headroom[rows], loss))[:_MAX_VICTIMS]
        rows, gains = rows[order], gains[order]
        switch_s, left_s = self._round_trip[0][rows], c.time_to_empty_s[rows]
        margin_s = config.tokenflow.buffer_conservativeness * (switch_s + config.schedule_interval_s)
        return Victims(
            rows,
            self.headroom[rows],
            gains,
            self._need[rows],
            has_reader=c.has_reader[rows],
            affords=left_s >= switch_s - 1e-9,
            survives=left_s >= margin_s - 1e-9,
        )

    def decision(self) -> Decision:
        """Which requests are preempted, resumed and admitted, and how."""
        if not self.leaving and not self.coming:
            return Decision()
        by_host = self._round_trip[1]
        return swap_decision(
            self._snapshot, self.leaving, self.coming, by_host=by_host, loads=self._loads, made_for=self._made_for
        )

    def evict_overflow(self) -> None:
        """Take off the device what its growing requests no longer fit into; one resident stays in any case."""
        if self._spare >= 0:
            return
        victims = self._victims
        affords = victims.can_go["affords"]
        willing = [index for index in victims.left if affords[index]]
        for index in willing[: int(np.count_nonzero(self._running)) - 1]:
            if self._spare >= 0:
                break
            self._take_off(victims.rows[index])
        if self._spare < 0:
            self._take_off_reluctant([victims.rows[index] for index in willing])
        gone = set(self.leaving)
        victims.left = [index for index in victims.left if victims.rows[index] not in gone]

    def _take_off_reluctant(self, willing: list[int]) -> None:
        """None can leave without a stall: most left to read first; one that must recompute, if it has just come."""
        others = np.setdiff1d(np.flatnonzero(self._running), willing)
        latest = np.where(self._round_trip[1], 0.0, -self._snapshot.columns.state_since_s)
        order = others[np.lexsort((self._latest[others], -self.headroom[others], latest[others]))]
        for row in order[:-1].tolist():
            if self._spare >= 0:
                break
            self._take_off(row)

    def resume_due(self) -> None:
        """Resume requests whose playback runs out, most gain first: into spare memory, else by a swap."""
        due = self._away[self._is_due[self._away]]
        if not len(due):
            return
        due, gains = self._by_gain(due)
        due = due[:_MAX_SWAPS]
        columns = [values[due].tolist() for values in (self._need, self._loads, self.headroom)]
        for row, gain_of, need, loads, headroom in zip(due.tolist(), gains.tolist(), *columns, strict=False):
            room = need
            if not loads and need + self._growth_blocks(self._stay_s[row]) > self._spare:
                # A recompute that growth soon undoes is device time for nothing. The starving displace those too who
                # would grow: what it takes of the device is not theirs to grow in.
                if headroom > -self._config.tokenflow.starvation_gap_s or not self._may_recompute:
                    continue
                room = self._room_to_stay(need, self._stay_s[row])
            # Among the starving a gap would only move the stall about.
            min_unread_s = max(headroom, 0.0) + self._config.tokenflow.min_swap_gain_s
            victims = self._make_room(row, room, "affords", min_unread_s, self._config.tokenflow.starvation_gap_s)
            if victims is not None and sum(self._victims.gain[index] for index in victims) < gain_of:
                if room > need:
                    self._may_recompute, self.recompute_pays_s = False, self._price_s(row, victims)
                self._put_on(row, need, victims)
        came = set(self.coming)
        has_reader = self._snapshot.columns.has_reader
        self._lacks_memory = any(not has_reader[row] and row not in came for row in due.tolist())

    def admit(self, newcomers: RowIndex) -> bool:
        """Admit in this order while there is memory, or victims that survive it; True if one is left for memory.

        The gap to a victim's buffer is taken from how long the newcomer has waited, not from an empty buffer. No
        resident leaves for a prompt whose turn does not come in the next step with prompts.
        """
        max_pending = self._snapshot.max_num_batched_tokens
        swaps, pending = 0, pending_tokens(self._snapshot)
        is_left, has_reader = False, self._snapshot.columns.has_reader
        starvation_gap_s = self._config.tokenflow.starvation_gap_s if self._config.overload == "share" else np.inf
        uncomputed = self._snapshot.columns.num_uncomputed
        columns = [values[newcomers].tolist() for values in (self._need, self._is_due, self.headroom, uncomputed)]
        for row, need, is_due, headroom, tokens in zip(newcomers.tolist(), *columns, strict=True):
            is_background = not has_reader[row]
            if is_background and (is_left or self._lacks_memory):
                # What those without a reader leave is for the first of them, and before that for one that returns.
                is_left = True
                continue
            room = need + self._room_to_grow() if is_background else need
            if self._fits(room):
                victims: list[int] | None = []
            elif not is_due or swaps == _MAX_SWAPS or pending >= max_pending:
                victims = None
            else:
                victims = self._make_room(
                    row, room, "survives", headroom + self._config.tokenflow.min_swap_gain_s, starvation_gap_s
                )
                swaps += 1
            if victims is not None:
                self._put_on(row, need, victims)
                pending += tokens
            elif is_background:
                # The others without a reader wait behind it. A reader may displace what this one may not.
                is_left = True
            else:
                return True
        return is_left

    def backfill(self) -> None:
        """Resume any request that has memory to stay a while: the device never idles for want of urgency."""
        # Most passes end here: there is no room, and no request needs to be ranked for it.
        min_spare = self._growth_blocks(self._config.tokenflow.min_residency_s)
        is_empty = not self._num_residents and not self.coming
        if not len(self._away) or not (self._spare > min_spare or is_empty):
            return
        away, gains = self._by_gain(self._worth_returning())
        if not len(away):
            return
        if self._spare > min_spare:
            self._backfill_with(self._in_priority(away, gains), min_spare)
        if not self._num_residents and not self.coming:
            # Alone, anything fits that was validated, watermark or not.
            row = int(away[0])
            self._put_on(row, int(self._need[row]), [])

    def _worth_returning(self) -> RowIndex:
        """Those off the device but for readers far ahead that have given their KV up, while others are served.

        Computed again, they would be in the way of the next newcomer, with nothing gained for their readers.
        """
        snapshot = self._snapshot
        c = snapshot.columns
        dropped = c.is_waiting[self._away]
        if not snapshot.memory.num_host_blocks or not dropped.any():
            return self._away
        far = is_far_ahead(snapshot)
        if not (self._resident & ~far).any() and far[self.coming].all():
            return self._away
        return self._away[~(dropped & far[self._away])]

    def _backfill_with(self, rows: RowIndex, min_spare: float) -> None:
        came = set(self.coming)
        columns = [values[rows].tolist() for values in (self._need, self._stay_s)]
        for row, need, stay_s in zip(rows.tolist(), *columns, strict=True):
            if self._free_slots <= 0 or self._spare <= min_spare:
                break
            if row not in came and need + self._growth_blocks(stay_s) <= self._spare:
                self._put_on(row, need, [])

    def next_return_s(self) -> float:
        """When the next of those off the device will be due."""
        later = self._away[~self._is_due[self._away]]
        if not len(later):
            return float("inf")
        lead_s = self.headroom[later] - self._return_s[later] - self._config.tokenflow.low_buffer_s
        return self._snapshot.now_s + float(lead_s.min())

    def _growth_blocks(self, seconds: float) -> float:
        """Blocks that residents and one more take up while they run for that long."""
        residents = self._num_residents + len(self.coming) - len(self.leaving) + 1
        return residents * float(seconds) * self._speed / self._snapshot.memory.block_size

    def _room_to_grow(self) -> int:
        """Blocks that a newcomer without a reader leaves to the residents, so that they can stay for a while.

        It gains nothing by coming early, and would be the first to leave. None on an empty device.
        """
        if not self._num_residents and not self.coming:
            return 0
        return math.ceil(self._growth_blocks(self._config.tokenflow.min_residency_s))

    def _room_to_stay(self, need: int, seconds: float) -> int:
        """Blocks to make free for one that needs so many, if the rest of the device is to grow for that long."""
        rest = 1.0 - need / max(self._usable, 1)
        return min(need + math.ceil(rest * self._growth_blocks(seconds)), self._usable)

    def _price_s(self, row: int, victims: list[int]) -> float:
        """Ten times what it takes to recompute this one, and those of its victims that must be."""
        gone = [self._victims.rows[index] for index in victims]
        switch_s, by_host = self._round_trip
        recompute_s = self._return_s[row] + np.where(by_host, 0.0, switch_s)[gone].sum()
        return float(_STAY_PER_RECOMPUTE * recompute_s)

    def _gains(self, rows: RowIndex) -> Floats:
        """What running each of these over idling it is worth."""
        c = self._snapshot.columns
        return gain(
            self._config,
            unread=c.unread[rows],
            headroom=self.headroom[rows],
            rate=c.rate[rows],
            expected_output=c.expected_answer[rows],
            overhead_s=np.where(self._resident[rows], 0.0, self._return_s[rows]),
            speed=self._speed,
        )

    def _by_gain(self, rows: RowIndex) -> tuple[RowIndex, Floats]:
        """These rows and their gains, most gain first; where nothing is to be gained, the emptier buffer."""
        gains = self._gains(rows)
        order = np.lexsort((self.headroom[rows], -gains))
        return rows[order], gains[order]

    def _in_priority(self, rows: RowIndex, gains: Floats) -> RowIndex:
        """Readers by gain, then the others by priority, then by gain."""
        c = self._snapshot.columns
        background = np.isnan(c.rate[rows])
        return rows[np.lexsort((-gains, np.where(background, c.priority[rows], 0), background))]

    def _fits(self, need: int) -> bool:
        return need <= self._spare and self._free_slots > 0

    def _make_room(
        self, row: int, need: int, way: Way, min_unread_s: float, starvation_gap_s: float
    ) -> list[int] | None:
        """Victims to evict for `row`, least loss first; none if it fits, None if that cannot be done.

        They have `min_unread_s` to read and can go that way. A starving request evicts residents that are better off by
        `starvation_gap_s`, even if these cannot afford it.
        """
        if self._fits(need):
            return []
        missing, slots = need - self._spare, 1 - self._free_slots
        victims = self._victims.make_room(
            missing,
            slots,
            float(self.headroom[row]),
            for_reader=bool(self._snapshot.columns.has_reader[row]),
            way=way,
            min_unread_s=min_unread_s,
            starvation_gap_s=starvation_gap_s,
        )
        return victims or None

    def _put_on(self, row: int, need: int, victims: list[int]) -> None:
        for index in victims:
            self._victims.left.remove(index)
            self._take_off(self._victims.rows[index])
            self._made_for[int(self._victims.rows[index])] = row
        self.coming.append(row)
        self._spare -= need
        self._free_slots -= 1

    def _take_off(self, row: int) -> None:
        self.leaving.append(row)
        self._spare += int(self._need[row])
        self._free_slots += 1
