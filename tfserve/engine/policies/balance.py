"""Balance: who of the working set is on the device, step 2 of tokenflow.md section 5. Lives for one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from tfserve.config import SchedulerConfig
from tfserve.engine.policies.headroom import gain, headroom_s
from tfserve.engine.policies.sharing import (
    exchange,
    resident_blocks,
    return_s,
    round_trip_s,
    stream_speed,
    usable_blocks,
)
from tfserve.engine.policies.working_set import members
from tfserve.engine.policy import Decision, Snapshot
from tfserve.engine.table import Rows
from tfserve.engine.token_buffer import Floats
from tfserve.engine.tracker import Mask

_MOST_EXCHANGES = 64
"""Exchanges considered in one pass; the rest waits for the next."""

_MOST_VICTIMS = 2 * _MOST_EXCHANGES
"""Residents considered for them, those with least to lose."""

_STAY_PER_RECOMPUTE = 10.0
"""Whoever will be recomputed stays this many times as long as that takes: it is device time, taken from everybody."""


class _Victim(NamedTuple):
    """A resident that may be put out: `affords` a switch, `survives` one with the margin that admission asks for."""

    row: int
    headroom: float
    gain: float
    need: int
    affords: bool
    survives: bool


class Balance:
    """A local search that starts from who is resident. Each method moves requests across the boundary of the device.

    Whoever is resident pays no overhead, so the start is the greedy choice as far as it is affordable to reach. Spare
    memory is filled by gain; beyond that an exchange must raise the total gain, fit, and pass the hysteresis. Those off
    the device come back lazily: they displace somebody only when what they have left to read nears what it takes to
    return.
    """

    def __init__(self, snapshot: Snapshot, config: SchedulerConfig) -> None:
        c = snapshot.columns
        self.leaving: list[int] = []
        self.coming: list[int] = []
        self.headroom: Floats = headroom_s(c, snapshot.now_s, config.background_patience_s)
        self._snapshot = snapshot
        self._config = config
        self._speed = stream_speed(snapshot)
        self._switch_s, self._by_host = round_trip_s(snapshot, offload=config.offload)
        self._return_s, self._loads = return_s(snapshot)
        recompute_s = np.where(self._by_host, 0.0, self._switch_s)
        recompute_s = np.where(c.is_running, recompute_s, np.where(self._loads, 0.0, self._return_s))
        self._stay_s = np.maximum(config.min_residency_s, _STAY_PER_RECOMPUTE * recompute_s)
        self._running = c.is_running
        self._resident = self._running | c.is_loading
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
        self._away = self._by_gain(members(snapshot) & ~self._resident)
        self._is_due = self.headroom <= self._return_s + config.critical_s + 1e-9
        self._victims_or_none: list[_Victim] | None = None

    @property
    def _victims(self) -> list[_Victim]:
        """Who may be put out, least gain first; listed only when somebody asks, for most passes exchange nobody."""
        if self._victims_or_none is None:
            self._victims_or_none = self._settled_residents()
        return self._victims_or_none

    def orders(self) -> Decision:
        """Who is to be preempted, resumed and admitted, and how."""
        return exchange(self._snapshot, self.leaving, self.coming, by_host=self._by_host, loads=self._loads)

    def shrink(self) -> None:
        """Take off the device what its growing requests no longer fit into; somebody stays, whatever it takes."""
        if self._spare >= 0:
            return
        willing = [victim.row for victim in self._victims if victim.affords]
        for row in willing[: int(np.count_nonzero(self._running)) - 1]:
            if self._spare >= 0:
                break
            self._take_off(row)
        if self._spare < 0:
            self._take_off_reluctant(willing)
        self._victims[:] = [victim for victim in self._victims if victim.row not in self.leaving]

    def _take_off_reluctant(self, willing: list[int]) -> None:
        """Nobody can go unnoticed: who has most to read suffers least; who must recompute, if it has just come."""
        others = np.setdiff1d(np.flatnonzero(self._running), willing)
        latest = np.where(self._by_host, 0.0, -self._snapshot.columns.phase_since_s)
        order = others[np.lexsort((-self.headroom[others], latest[others]))]
        for row in order[:-1].tolist():
            if self._spare >= 0:
                break
            self._take_off(row)

    def bring_back(self) -> None:
        """Return those whose playback runs out, most gain first: into spare memory, else in exchange."""
        for row in self._away[self._is_due[self._away]][:_MOST_EXCHANGES].tolist():
            if not self._loads[row] and self._need[row] + self._growth_blocks(self._stay_s[row]) > self._spare:
                # A recompute that growth soon undoes is device time for nothing.
                continue
            victims = self._make_room(row, attrgetter("affords"), self._config.relief_s)
            if victims is not None and sum(victim.gain for victim in victims) < self._gain[row]:
                self._put_on(row, victims)

    def let_in(self, newcomers: Rows) -> bool:
        """Admit in this order while there is memory, or victims that survive it; True if one is left for memory."""
        exchanges = 0
        relief_s = self._config.relief_s if self._config.overload == "share" else np.inf
        for row in newcomers.tolist():
            if self._fits(row):
                victims: list[_Victim] | None = []
            elif not self._is_due[row] or exchanges == _MOST_EXCHANGES:
                victims = None
            else:
                victims = self._make_room(row, attrgetter("survives"), relief_s)
                exchanges += 1
            if victims is None:
                return True
            self._put_on(row, victims)
        return False

    def fill_up(self) -> None:
        """Bring back anybody for whom there is memory to stay a while: the device never idles for want of urgency."""
        # Most passes end here: there is no room, and nobody needs to be ranked for it.
        least = self._growth_blocks(self._config.min_residency_s)
        for row in self._in_priority(self._away) if self._spare > least else []:
            if self._free_rows <= 0 or self._spare <= least:
                break
            if row not in self.coming and self._need[row] + self._growth_blocks(self._stay_s[row]) <= self._spare:
                self._put_on(row, [])
        if not self._resident.any() and not self.coming and len(self._away):
            # Alone, anything fits that was validated, watermark or not.
            self._put_on(int(self._away[0]), [])

    def next_return_s(self) -> float:
        """When the next of those off the device will be due."""
        later = self._away[~self._is_due[self._away]]
        if not len(later):
            return float("inf")
        lead_s = self.headroom[later] - self._return_s[later] - self._config.critical_s
        return self._snapshot.now_s + float(lead_s.min())

    def _growth_blocks(self, seconds: float) -> float:
        """Blocks that residents and one more take up while they run for that long."""
        residents = int(np.count_nonzero(self._resident)) + len(self.coming) - len(self.leaving) + 1
        return residents * float(seconds) * self._speed / self._snapshot.memory.block_size

    def _by_gain(self, rows: Mask) -> Rows:
        """These rows, most gain first; where nothing is to be gained, the emptier buffer."""
        indices = np.flatnonzero(rows)
        return indices[np.lexsort((self.headroom[indices], -self._gain[indices]))]

    def _in_priority(self, rows: Rows) -> list[int]:
        """Readers by gain, then the others by priority, then by gain."""
        c = self._snapshot.columns
        background = np.isnan(c.rate[rows])
        order = np.lexsort((-self._gain[rows], np.where(background, c.priority[rows], 0), background))
        return [int(row) for row in rows[order]]

    def _settled_residents(self) -> list[_Victim]:
        """Residents that decode and have had their minimum stay, least gain first."""
        c, config = self._snapshot.columns, self._config
        stayed_s = self._snapshot.now_s - c.phase_since_s
        settled = self._snapshot.is_decoding & (stayed_s >= self._stay_s - 1e-9)
        rows = self._by_gain(settled)[::-1]
        rows = rows[:_MOST_VICTIMS]
        margin_s = config.buffer_conservativeness * (self._switch_s + config.schedule_interval_s)
        columns: Sequence[list[float]] = [
            values[rows].tolist()
            for values in (
                self.headroom,
                self._gain,
                self._need,
                c.time_to_empty_s >= self._switch_s - 1e-9,
                c.time_to_empty_s >= margin_s - 1e-9,
            )
        ]
        return list(map(_Victim._make, zip(rows.tolist(), *columns, strict=True)))

    def _fits(self, row: int) -> bool:
        return bool(self._need[row] <= self._spare) and self._free_rows > 0

    def _make_room(self, row: int, can_go: Callable[[_Victim], bool], relief_s: float) -> list[_Victim] | None:
        """Residents to put out for `row`, least gain first; none if it fits, None if that cannot be done.

        A victim must have more to read by the swap gap, and be able to go; or be better off by `relief_s`, for
        starving beats everything.
        """
        if self._fits(row):
            return []
        missing, rows = int(self._need[row]) - self._spare, 1 - self._free_rows
        headroom = float(self.headroom[row])
        with_gap = max(headroom, 0.0) + self._config.swap_gap_s - 1e-9
        victims: list[_Victim] = []
        for victim in self._victims:
            if victim.headroom - headroom >= relief_s or (victim.headroom >= with_gap and can_go(victim)):
                victims.append(victim)
                missing -= victim.need
                rows -= 1
                if missing <= 0 and rows <= 0:
                    return victims
        return None

    def _put_on(self, row: int, victims: list[_Victim]) -> None:
        for victim in victims:
            self._victims.remove(victim)
            self._take_off(victim.row)
        self.coming.append(row)
        self._spare -= int(self._need[row])
        self._free_rows -= 1

    def _take_off(self, row: int) -> None:
        self.leaving.append(row)
        self._spare += int(self._need[row])
        self._free_rows += 1
