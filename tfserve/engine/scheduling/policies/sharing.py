"""What every policy that shares the device over time needs: when to look, who fits, how to get from here to there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from tfserve.arrays import Floats, Ints, Mask, RowIndex
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.columns import Columns
from tfserve.engine.scheduling.policy import Decision, ResumeBy, Snapshot, held_back
from tfserve.engine.scheduling.reasons import Cause, Reason
from tfserve.engine.scheduling.state import RequestState
from tfserve.types import RequestId

_EVENT_GAPS = 25
"""Events may wake the scheduler this many times per interval."""


class Ticker:
    """When a full pass is due: every interval, at a time asked for, and soon after something happened."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last_s = -np.inf
        self._last_events = -1
        self.timer_s = np.inf

    def due(self, now_s: float, num_events: int, *, is_urgent: bool = False) -> bool:
        """True if a pass should run now; `is_urgent` counts as an event.

        A step that ends a hair before the time asked for counts as at it.
        """
        since = now_s - self._last_s + 1e-9
        woken = is_urgent or num_events != self._last_events or now_s + 1e-9 >= self.timer_s
        return since >= self._interval_s or (woken and since >= self._interval_s / _EVENT_GAPS)

    def ran(self, now_s: float, num_events: int) -> None:
        """A pass has run; the timer is to be set anew."""
        self._last_s = now_s
        self._last_events = num_events
        self.timer_s = np.inf

    @property
    def next_s(self) -> float:
        """When a pass is due if nothing happens; the first is due at once."""
        return float(min(self._last_s + self._interval_s, self.timer_s))


def usable_blocks(snapshot: Snapshot, watermark: float) -> int:
    """Device blocks to fill; what is left over takes the tokens of the steps to come."""
    return snapshot.memory.num_blocks - int(np.ceil(watermark * snapshot.memory.num_blocks))


def resident_blocks(snapshot: Snapshot, growth_tokens: int = 1) -> Ints:
    """Device blocks each request needs to run until it has `growth_tokens` more, or has ended; elementwise."""
    c = snapshot.columns
    tokens = c.num_tokens + np.minimum(growth_tokens, np.maximum(c.num_remaining, 0))
    return np.maximum(snapshot.blocks_for(tokens), np.where(c.is_running, c.device_blocks, 0))


def stream_speed(snapshot: Snapshot) -> float:
    """Tokens/s that each decoding request gets with the present batch."""
    c = snapshot.columns
    running = c.is_running
    count = max(int(np.count_nonzero(running)), 1)
    return 1.0 / snapshot.cost.step_s(count, float(np.dot(c.num_tokens, running)))


def return_s(snapshot: Snapshot) -> tuple[Floats, Mask]:
    """Seconds until each request off the device could decode, by the faster way; and whether that is by loading.

    Loading brings what the host has; what it lacks is recomputed. Requests with nothing on the host cannot load.
    """
    c = snapshot.columns
    on_device = np.where(c.is_paused, c.device_blocks * snapshot.memory.block_size, 0)
    load_s, recompute_s = snapshot.cost.switch_s(0, np.maximum(c.host_tokens - on_device, 0), c.num_tokens)
    load_s = load_s + snapshot.cost.prefill_s_per_token * np.maximum(c.num_computed - c.host_tokens, 0)
    loads = c.is_paused & (load_s <= recompute_s)
    return np.where(loads, load_s, recompute_s), loads


def round_trip_s(snapshot: Snapshot, *, offload: bool) -> tuple[Floats, Mask]:
    """Seconds that leaving the device and coming back costs each resident; and whether that is by the host."""
    c = snapshot.columns
    dirty = np.maximum(c.num_computed - c.host_tokens, 0)
    transfer_s, recompute_s = snapshot.cost.switch_s(dirty, c.num_computed, c.num_tokens)
    by_host = (transfer_s <= recompute_s) & offload
    return np.where(by_host, transfer_s, recompute_s), by_host


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a choice of residents must fit into: blocks each row needs, blocks and batch slots there are."""

    need: Ints
    capacity: int
    max_slots: int


def fill(order: RowIndex, sizes: Sizes) -> RowIndex:
    """Rows of `order`, best first, that fit together; one that does not is passed over. Never empty if any exist."""
    chosen: list[int] = []
    free = sizes.capacity
    for row, blocks in zip(order.tolist(), sizes.need[order].tolist(), strict=True):
        if len(chosen) == sizes.max_slots:
            break
        if blocks <= free or not chosen:
            chosen.append(row)
            free -= blocks
    return np.array(chosen, np.intp)


def swap_decision(
    snapshot: Snapshot,
    leave: Sequence[int],
    come: Sequence[int],
    *,
    by_host: Mask,
    loads: Mask,
    made_for: Mapping[int, int] | None = None,
) -> Decision:
    """The decision that takes the rows `leave` off the device and brings the rows `come` onto it.

    `by_host` says which requests keep their KV on the host, if there is room for what is not there yet; `loads`, which
    paused ones load it and do not recompute. `made_for` has the row that each of `leave` makes room for, where known.
    """
    if not leave and not come:
        return Decision()
    c = snapshot.columns
    room = snapshot.memory.num_free_host_blocks
    missing = (c.device_blocks - snapshot.clean_blocks)[list(leave)].tolist()
    preempt: list[tuple[RequestId, ResumeBy]] = []
    for row, blocks, wants in zip(leave, missing, by_host[list(leave)].tolist(), strict=True):
        keeps = wants and blocks <= room
        room -= blocks if keeps else 0
        preempt.append((c.ids[row], ResumeBy.LOAD if keeps else ResumeBy.RECOMPUTE))
    coming = list(zip(come, c.is_waiting[list(come)].tolist(), loads[list(come)].tolist(), strict=True))
    return Decision(
        reasons=_reasons(c, leave, come, made_for),
        admit=tuple(c.ids[row] for row, new, _ in coming if new),
        preempt=tuple(preempt),
        resume=tuple(
            (c.ids[row], ResumeBy.LOAD if load else ResumeBy.RECOMPUTE) for row, new, load in coming if not new
        ),
    )


def _reasons(
    c: Columns, leave: Sequence[int], come: Sequence[int], made_for: Mapping[int, int] | None
) -> dict[RequestId, Reason]:
    """Why these requests leave the device, and why others come back."""
    # Of a policy that tells what each one leaves for, the others leave for the residents' growth.
    other = Cause.MAKES_ROOM if made_for is None and come else Cause.GROWTH
    made_for = made_for or {}
    displacing = set(made_for.values())

    def unread_s(row: int) -> float | None:
        seconds = float(c.time_to_empty_s[row])
        return seconds if math.isfinite(seconds) and c.has_started[row] else None

    def leaves(row: int) -> Reason:
        if row in made_for:
            return Reason(Cause.MAKES_ROOM, unread_s(row), c.ids[made_for[row]])
        return Reason(other, unread_s(row))

    def returns(row: int) -> Reason:
        return Reason(Cause.DUE if row in displacing else Cause.SPARE_MEMORY, unread_s(row))

    left = {c.ids[row]: leaves(row) for row in leave}
    return left | {c.ids[row]: returns(row) for row in come if c.has_output[row]}


def out_of_blocks(snapshot: Snapshot) -> bool:
    """True if the next token of every decoding request has no block."""
    return int(snapshot.next_step_blocks.sum()) > snapshot.memory.num_free_blocks


class RankedPolicy(ABC):
    """Base of policies that rank: a pass ranks all requests, fills the device in that order, and swaps accordingly."""

    offload = True

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._ticker = Ticker(config.schedule_interval_s)
        self._swap_s = -np.inf
        self._output_then: dict[RequestId, int] = {}
        """Output tokens of requests that came without their KV, at that time."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """Swap every interval; in between, when something happened or blocks run out, only backfill or evict."""
        c = snapshot.columns
        if not len(c):
            return Decision()
        if snapshot.now_s + 1e-9 >= self._swap_s:
            self._swap_s = snapshot.now_s + self._config.schedule_interval_s
            decision = self._pass(snapshot, self._sizes(snapshot))
        elif self._ticker.due(snapshot.now_s, c.num_events) or out_of_blocks(snapshot):
            decision = self._pass(snapshot, self._sizes(snapshot), keep=c.in_state(RequestState.RUNNING))
        else:
            return Decision(wake_s=self._swap_s)
        self._ticker.ran(snapshot.now_s, c.num_events)
        return msgspec.structs.replace(decision, wake_s=self._swap_s)

    @abstractmethod
    def rank(self, snapshot: Snapshot, sizes: Sizes) -> RowIndex:
        """All rows but those being loaded, best first; `fill` takes the first that fit."""

    def _sizes(self, snapshot: Snapshot) -> Sizes:
        need = resident_blocks(snapshot, round(self._config.schedule_interval_s * stream_speed(snapshot)))
        loading = snapshot.columns.is_loading
        capacity = usable_blocks(snapshot, self._config.watermark) - int(need[loading].sum())
        return Sizes(need, capacity, snapshot.max_num_seqs - int(np.count_nonzero(loading)))

    def _pass(self, snapshot: Snapshot, sizes: Sizes, keep: RowIndex | None = None) -> Decision:
        """Fill the device by rank, with `keep` in front, and say what that changes."""
        c = snapshot.columns
        order = self.rank(snapshot, sizes)
        catching_up = self._catching_up(snapshot)
        keep = catching_up if keep is None else np.union1d(keep, catching_up)
        resident = np.isin(order, keep)
        order = np.concatenate([order[resident], order[~resident]])
        chosen = fill(order, sizes)
        running = c.in_state(RequestState.RUNNING)
        leave = running[~np.isin(running, chosen)]
        come = chosen[~c.is_running[chosen]]
        _, by_host = round_trip_s(snapshot, offload=self.offload and self._config.ablation.offload)
        _, loads = return_s(snapshot)
        for row in come[~loads[come]].tolist():
            self._output_then[c.ids[row]] = int(c.num_output[row])
        return swap_decision(snapshot, leave.tolist(), come.tolist(), by_host=by_host, loads=loads)

    def _catching_up(self, snapshot: Snapshot) -> RowIndex:
        """Residents still computing what they came for, up to the token after it, unless that is held back.

        They would leave with nothing gained, again and again.
        """
        c = snapshot.columns
        lacking = c.is_running & (c.num_uncomputed > 1)
        if self._output_then:
            held, then = held_back(c, self._config.generate_ahead_s), {}
            for row in np.flatnonzero(c.is_running).tolist():
                output = self._output_then.get(c.ids[row])
                if output is not None and c.num_output[row] <= output:
                    then[c.ids[row]] = output
                    lacking[row] |= not held[row]
            self._output_then = then
        return np.flatnonzero(lacking)
