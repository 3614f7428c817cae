"""Balance: who of the working set is on the device, step 2 of tokenflow.md section 5. Lives for one pass."""

from __future__ import annotations

import numpy as np

from tfserve.config import SchedulerConfig
from tfserve.engine.policies.headroom import gain, headroom_s
from tfserve.engine.policies.sharing import resident_blocks, return_s, round_trip_s, stream_speed, usable_blocks
from tfserve.engine.policies.working_set import members
from tfserve.engine.policy import Snapshot
from tfserve.engine.token_buffer import Floats
from tfserve.engine.tracker import Mask, Phase, Rows

_MOST_EXCHANGES = 64
"""Exchanges considered in one pass; the rest waits for the next."""


class Balance:
    """A local search that starts from who is resident. Each method moves requests across the boundary of the device.

    Whoever is resident pays no overhead, so the start is the greedy choice as far as it is affordable to reach. Spare memory
    is filled by gain; beyond that an exchange must raise the total gain, fit, and pass the hysteresis. Those off the
    device come back lazily: they displace somebody only when what they have left to read nears what it takes to return.
    """

    def __init__(self, snapshot: Snapshot, config: SchedulerConfig) -> None:
        c = snapshot.columns
        self.leaving: list[int] = []
        self.coming: list[int] = []
        self.headroom: Floats = headroom_s(c, snapshot.now_s, config.background_patience_s)
        self._snapshot = snapshot
        self._config = config
        self._speed = stream_speed(snapshot)
        self._switch_s, _ = round_trip_s(snapshot, offload=config.offload)
        self._return_s, _ = return_s(snapshot)
        self._resident = (c.phase == Phase.RUNNING) | (c.phase == Phase.LOADING)
        self._gain = gain(
            config,
            unread=c.unread,
            headroom=self.headroom,
            rate=c.rate,
            expected_output=c.expected_output,
            overhead_s=np.where(self._resident, 0.0, self._return_s),
            speed=self._speed,
        )
        self._need = resident_blocks(snapshot)
        self._spare = usable_blocks(snapshot, config.watermark) - int(self._need[self._resident].sum())
        self._free_rows = snapshot.num_free_rows
        self._victims = self._by_gain(c.phase == Phase.RUNNING)[::-1]
        stayed_s = snapshot.now_s - c.phase_since_s
        self._settled = (stayed_s >= config.min_residency_s - 1e-9) & (c.num_output > 0)
        self._away = self._by_gain(members(snapshot) & ~self._resident)

    def shrink(self) -> None:
        """Take off the device what its growing requests no longer fit into; somebody stays, whatever it takes."""
        if self._spare >= 0:
            return
        willing = self._settled & self._affords()
        reluctance = np.where(willing[self._victims], 0.0, 1.0)
        # Among the reluctant, who has most to read suffers least.
        order = np.lexsort((reluctance * -self.headroom[self._victims], reluctance))
        for row in self._victims[order][:-1].tolist():
            if self._spare >= 0:
                break
            self._take_off(row)

    def bring_back(self) -> None:
        """Return those whose playback runs out, most gain first: into spare memory, else in exchange."""
        for row in self._away[self._is_due()[self._away]].tolist()[:_MOST_EXCHANGES]:
            victims = self._exchangeable(row)
            if victims is not None:
                self._put_on(row, victims)

    def let_in(self, newcomers: Rows) -> bool:
        """Admit in this order while there is memory, or victims that survive it; True if somebody is left for memory."""
        exchanges = 0
        for row in newcomers.tolist():
            victims = self._survivors(row) if exchanges < _MOST_EXCHANGES else None
            if victims is None:
                return True
            exchanges += bool(victims)
            self._put_on(row, victims)
        return False

    def fill_up(self) -> None:
        """Bring anybody back for whom there is memory to stay a while: the device never idles for want of urgency."""
        c = self._snapshot.columns
        growth = self._config.min_residency_s * self._speed / self._snapshot.memory.block_size
        for row in self._in_priority(self._away):
            residents = int(np.count_nonzero(self._resident)) + len(self.coming) - len(self.leaving) + 1
            if self._free_rows <= 0 or self._spare <= growth * residents:
                break
            if row not in self.coming and self._need[row] + growth * residents <= self._spare:
                self._put_on(row, [])
        if not self._resident.any() and not self.coming and len(self._away):
            # Alone, anything fits that was validated, watermark or not.
            self._put_on(int(self._away[0]), [])
        assert len(self.coming) <= len(c)

    def next_return_s(self) -> float:
        """When the next of those off the device will be due."""
        due_s = self._snapshot.now_s + self.headroom - self._return_s - self._config.critical_s
        later = self._away[~self._is_due()[self._away]]
        return float(due_s[later].min()) if len(later) else float("inf")

    def _by_gain(self, rows: Mask) -> Rows:
        """These rows, most gain first; where nothing is to be gained, the emptier buffer, then the older request."""
        indices = np.flatnonzero(rows)
        c = self._snapshot.columns
        order = np.lexsort((c.seq[indices], self.headroom[indices], -self._gain[indices].round(9)))
        return indices[order]

    def _in_priority(self, rows: Rows) -> list[int]:
        """Readers by gain, then the others by priority, then by gain."""
        c = self._snapshot.columns
        background = np.isnan(c.rate[rows])
        order = np.lexsort((-self._gain[rows], np.where(background, c.priority[rows], 0), background))
        return [int(row) for row in rows[order]]

    def _is_due(self) -> Mask:
        return self.headroom <= self._return_s + self._config.critical_s + 1e-9

    def _affords(self, margin_s: float = 0.0, factor: float = 1.0) -> Mask:
        """Residents whose readers do not notice their leaving and coming back."""
        return self._snapshot.columns.time_to_empty_s >= factor * (self._switch_s + margin_s) - 1e-9

    def _is_far_better_off(self, row: int) -> Mask:
        """Whoever may be displaced by `row` without being able to afford it: starving beats everything."""
        return self.headroom - self.headroom[row] >= self._config.relief_s

    def _has_gap(self, row: int) -> Mask:
        """Whoever has more to read than `row` by the margin that keeps exchanges rare."""
        return self.headroom - max(float(self.headroom[row]), 0.0) >= self._config.swap_gap_s - 1e-9

    def _exchangeable(self, row: int) -> list[int] | None:
        """Residents to put out for `row`, none if there is room; None if that is impossible or loses gain."""
        allowed = (self._has_gap(row) & self._affords()) | self._is_far_better_off(row)
        victims = self._make_room(row, allowed)
        if victims and self._gain[victims].sum() >= self._gain[row]:
            return None
        return victims

    def _survivors(self, row: int) -> list[int] | None:
        """Residents whose buffers outlast the switch by a margin and that make room for a newcomer, or None."""
        config = self._config
        if self.headroom[row] > self._return_s[row] + config.critical_s:
            return self._make_room(row, np.zeros_like(self._settled))
        allowed = self._has_gap(row) & self._affords(config.schedule_interval_s, config.buffer_conservativeness)
        if config.overload == "share":
            allowed |= self._is_far_better_off(row)
        return self._make_room(row, allowed)

    def _make_room(self, row: int, allowed: Mask) -> list[int] | None:
        """The fewest settled residents of those allowed, least gain first, that let `row` fit; None if they do not."""
        missing, rows = int(self._need[row]) - self._spare, 1 - self._free_rows
        if missing <= 0 and rows <= 0:
            return []
        victims = self._victims[(allowed & self._settled)[self._victims]]
        freed = np.cumsum(self._need[victims])
        count = max(int(np.searchsorted(freed, missing)) + 1 if missing > 0 else 0, rows)
        return victims[:count].tolist() if count <= len(victims) else None

    def _put_on(self, row: int, victims: list[int]) -> None:
        for victim in victims:
            self._take_off(victim)
        self.coming.append(row)
        self._spare -= int(self._need[row])
        self._free_rows -= 1

    def _take_off(self, row: int) -> None:
        self._victims = self._victims[self._victims != row]
        self.leaving.append(row)
        self._spare += int(self._need[row])
        self._free_rows += 1
