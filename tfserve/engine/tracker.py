"""Tracker: everything the scheduler knows about live requests, one row each. It decides nothing. Torch-free."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tfserve.engine.table import Rows, Table
from tfserve.engine.token_buffer import AUTO, Floats, Playback, estimated_rate, play, resolve_rate
from tfserve.types import RequestId

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Phase(enum.IntEnum):
    """Where a request's KV is. WAITING: nowhere. RUNNING: on the device, with a row.

    PAUSED: on the host, perhaps some of it still on the device. LOADING: on its way back, device blocks reserved.
    """

    WAITING = 0
    RUNNING = 1
    PAUSED = 2
    LOADING = 3


# Comparing an array with an enum member takes longer than the comparison.
_WAITING, _RUNNING, _PAUSED, _LOADING = map(int, Phase)

_DEFAULTS: dict[str, tuple[type, float]] = {
    "seq": (np.int64, 0),
    "arrival_s": (np.float64, 0.0),
    "rate": (np.float64, np.nan),
    "priority": (np.int64, 0),
    "phase": (np.int8, Phase.WAITING),
    "phase_since_s": (np.float64, 0.0),
    "num_prompt": (np.int64, 0),
    "num_output": (np.int64, 0),
    "num_computed": (np.int64, 0),
    "max_tokens": (np.int64, 0),
    "device_blocks": (np.int64, 0),
    "host_tokens": (np.int64, 0),
    "num_preemptions": (np.int64, 0),
    "first_token_s": (np.float64, np.nan),
    "consumed": (np.float64, 0.0),
    "since_s": (np.float64, np.inf),
    "stall_s": (np.float64, 0.0),
    "read_area": (np.float64, 0.0),
    "is_auto": (np.bool_, False),
    "has_feedback": (np.bool_, False),
    "report_s": (np.float64, np.nan),
    "report_tokens": (np.float64, 0.0),
    "report_stall_s": (np.float64, 0.0),
}

_LENGTH_WEIGHT = 0.05
"""How far one finished request moves the average output length."""


@dataclass(frozen=True)
class Columns:
    """Live requests at one moment, one row each, in no particular order (`seq` is the order of arrival).

    `rate` is NaN for a request without a reader. `unread` is its buffer in tokens; `time_to_empty_s` in seconds, 0
    before the first token and infinite without a reader; `dry_s` is how long it has been empty. `host_tokens` are on
    the host and acknowledged. `expected_output` is max_tokens, or less where finished requests say so. `num_events`
    counts arrivals, departures and completed loads ever; `num_added` and `total_preemptions` are over the tracker's
    life.
    """

    ids: tuple[RequestId, ...]
    seq: Ints
    arrival_s: Floats
    rate: Floats
    priority: Ints
    phase: npt.NDArray[np.int8]
    phase_since_s: Floats
    num_prompt: Ints
    num_output: Ints
    num_computed: Ints
    max_tokens: Ints
    expected_output: Floats
    device_blocks: Ints
    host_tokens: Ints
    num_preemptions: Ints
    first_token_s: Floats
    consumed: Floats
    unread: Floats
    time_to_empty_s: Floats
    stall_s: Floats
    dry_s: Floats
    read_area: Floats
    num_events: int
    num_added: int
    total_preemptions: int

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def is_waiting(self) -> Mask:
        """Requests without KV."""
        mask: Mask = self.phase == _WAITING
        return mask

    @cached_property
    def is_running(self) -> Mask:
        """Requests on the device."""
        mask: Mask = self.phase == _RUNNING
        return mask

    @cached_property
    def is_paused(self) -> Mask:
        """Requests off the device, their KV on the host."""
        mask: Mask = self.phase == _PAUSED
        return mask

    @cached_property
    def is_loading(self) -> Mask:
        """Requests whose KV is on its way back."""
        mask: Mask = self.phase == _LOADING
        return mask

    @cached_property
    def has_reader(self) -> Mask:
        """Requests with a rate."""
        return ~np.isnan(self.rate)

    @cached_property
    def has_started(self) -> Mask:
        """Requests that have their first token."""
        return self.num_output > 0

    @cached_property
    def num_tokens(self) -> Ints:
        """Tokens known so far, prompt and output."""
        return self.num_prompt + self.num_output

    @cached_property
    def num_uncomputed(self) -> Ints:
        """Tokens whose KV is still to be computed."""
        return self.num_tokens - self.num_computed

    @cached_property
    def num_remaining(self) -> Ints:
        """Tokens a request may still generate."""
        return self.max_tokens - self.num_output

    def in_phase(self, phase: Phase) -> Rows:
        """Rows in a phase, in order of arrival."""
        rows = np.flatnonzero(self.phase == int(phase))
        return rows[np.argsort(self.seq[rows])]

    def ids_of(self, rows: Rows | Sequence[int]) -> tuple[RequestId, ...]:
        """The requests of these rows, in their order."""
        return tuple(self.ids[row] for row in rows)


class Tracker:
    """Owns the reader state of live requests, and the columns that the Scheduler keeps up to date for its policies."""

    def __init__(self, default_rate: float) -> None:
        self._default_rate = default_rate
        self._table = Table(_DEFAULTS)
        self._num_added = 0
        self._num_events = 0
        self._num_preemptions = 0
        self._mean_output: float | None = None

    def __len__(self) -> int:
        return len(self._table)

    def add(
        self,
        req: RequestId,
        *,
        arrival_s: float,
        num_prompt: int,
        max_tokens: int,
        rate: float | str | None,
        priority: int = 0,
    ) -> None:
        """Take a new request in, as WAITING. `rate` as `consumption_rate`; RequestError if it is none."""
        self._table.add(
            req,
            seq=self._num_added,
            arrival_s=arrival_s,
            rate=resolve_rate(rate, self._default_rate),
            priority=priority,
            phase_since_s=arrival_s,
            num_prompt=num_prompt,
            max_tokens=max_tokens,
            is_auto=rate == AUTO,
        )
        self._num_added += 1
        self._num_events += 1

    def remove(self, req: RequestId, *, completed: bool) -> None:
        """Forget a request; the length of a completed one (not of an abort) says how long others may become."""
        if completed:
            length = float(self._table["num_output"][self._table.row(req)])
            mean = length if self._mean_output is None else self._mean_output
            self._mean_output = mean + _LENGTH_WEIGHT * (length - mean)
        self._table.remove(req)
        self._num_events += 1

    def set_phase(self, req: RequestId, phase: Phase, now_s: float) -> None:
        """Move a request to another phase; leaving the device counts as a preemption."""
        row = self._table.row(req)
        before = self._table["phase"][row]
        self._table["phase"][row] = phase
        self._table["phase_since_s"][row] = now_s
        if before == Phase.RUNNING and phase in (Phase.PAUSED, Phase.WAITING):
            self._table["num_preemptions"][row] += 1
            self._num_preemptions += 1
        if before == Phase.LOADING and phase == Phase.RUNNING:
            self._num_events += 1

    def update(
        self,
        reqs: Sequence[RequestId],
        *,
        num_computed: npt.ArrayLike | None = None,
        device_blocks: npt.ArrayLike | None = None,
        host_tokens: npt.ArrayLike | None = None,
    ) -> None:
        """Set what the Scheduler and the memory manager know of these requests, one value for all or one each."""
        rows = self._table.rows(reqs)
        for name, values in (
            ("num_computed", num_computed),
            ("device_blocks", device_blocks),
            ("host_tokens", host_tokens),
        ):
            if values is not None:
                self._table[name][rows] = values

    def on_tokens(self, reqs: Sequence[RequestId], n: npt.ArrayLike, now_s: float) -> None:
        """`n` new tokens each (or one number for all) were delivered to these readers at `now_s`."""
        table, rows = self._table, self._table.rows(reqs)
        counts = np.broadcast_to(np.asarray(n, np.int64), rows.shape)
        rows, counts = rows[counts > 0], counts[counts > 0]
        self._advance(rows, now_s)
        first = rows[np.isnan(table["first_token_s"][rows])]
        table["first_token_s"][first] = now_s
        table["num_output"][rows] += counts

    def on_played(self, req: RequestId, num_tokens: int, now_s: float) -> None:
        """A client reports having played `num_tokens` in all; this replaces the estimate, and reading goes on from it.

        With rate "auto", successive reports without a stall in between also give the rate. Before the first token there
        is nothing to play and a report means nothing.
        """
        table, row = self._table, self._table.row(req)
        if np.isnan(table["first_token_s"][row]):
            return
        self._advance(np.array([row]), now_s)
        played = min(max(num_tokens, 0), int(table["num_output"][row]))
        since, stall = table["report_s"][row], table["stall_s"][row]
        # A reader who ran dry shows how fast we generate, not how fast it reads.
        if table["is_auto"][row] and now_s > since and stall == table["report_stall_s"][row]:
            read = played - table["report_tokens"][row]
            table["rate"][row] = estimated_rate(table["rate"][row], read, now_s - since)
        for name, value in (
            ("consumed", played),
            ("report_tokens", played),
            ("report_s", now_s),
            ("report_stall_s", stall),
            ("has_feedback", True),
        ):
            table[name][row] = value

    def stall_s(self, req: RequestId, now_s: float) -> float:
        """How long this reader has had nothing to read since its first token."""
        return float(self._play(np.array([self._table.row(req)]), now_s).stall_s[0])

    def columns(self, now_s: float) -> Columns:
        """The state of every live request at `now_s`. Arrays may be views: use them before the next event."""
        table = self._table
        c: dict[str, npt.NDArray[Any]] = {name: table[name] for name in _SNAPSHOT}
        started = ~np.isnan(c["first_token_s"])
        playback = self._play(slice(None), now_s)
        unread = c["num_output"] - playback.consumed
        time_to_empty = np.where(started, unread / c["rate"], 0.0)
        time_to_empty[np.isnan(c["rate"])] = np.inf
        expected = c["max_tokens"].astype(np.float64)
        if self._mean_output is not None:
            # Whoever is past the average already is expected to go on for a while.
            longer = np.maximum(self._mean_output, 1.25 * c["num_output"])
            expected = np.minimum(expected, longer)
        return Columns(
            ids=table.ids,
            **c,
            expected_output=expected,
            consumed=playback.consumed,
            unread=unread,
            time_to_empty_s=time_to_empty,
            stall_s=playback.stall_s,
            dry_s=playback.dry_s,
            read_area=playback.read_area,
            num_events=self._num_events,
            num_added=self._num_added,
            total_preemptions=self._num_preemptions,
        )

    def _play(self, rows: Rows | slice, now_s: float) -> Playback:
        table = self._table
        return play(
            now_s,
            rate=table["rate"][rows],
            generated=table["num_output"][rows],
            consumed=table["consumed"][rows],
            since_s=table["since_s"][rows],
            stall_s=table["stall_s"][rows],
            read_area=table["read_area"][rows],
        )

    def _advance(self, rows: Rows, now_s: float) -> None:
        """Let these readers read up to `now_s`, before something changes for them."""
        playback = self._play(rows, now_s)
        self._table["consumed"][rows] = playback.consumed
        self._table["stall_s"][rows] = playback.stall_s
        self._table["read_area"][rows] = playback.read_area
        self._table["since_s"][rows] = now_s


_SNAPSHOT = (
    "seq",
    "arrival_s",
    "rate",
    "priority",
    "phase",
    "phase_since_s",
    "num_prompt",
    "num_output",
    "num_computed",
    "max_tokens",
    "device_blocks",
    "host_tokens",
    "num_preemptions",
    "first_token_s",
)
