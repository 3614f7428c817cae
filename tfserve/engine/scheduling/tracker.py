"""Tracker: everything the scheduler knows about live requests, one row each. It decides nothing. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from tfserve.arrays import Ints, Mask, RowIndex
from tfserve.engine.scheduling.columns import Columns, Reading
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.table import COLUMNS, RequestTable, RowRef
from tfserve.engine.scheduling.tenant_numbers import TenantNumbers
from tfserve.engine.scheduling.token_buffer import AUTO, Playback, estimated_rate, play, resolve_rate
from tfserve.types import FASTEST_RATE, ONE_TENANT, RequestId, Tenant

_LENGTH_WEIGHT = 0.05
"""How far one finished request moves the average output length."""

_MIN_READING_S = 1e-6
"""Least time that tokens are taken to be read in; a report may come at the moment of another."""

_SNAPSHOT = tuple(field.name for field in fields(Columns) if field.name in COLUMNS)
"""What a snapshot shows of the table."""


class Tracker:
    """Owns the table of live requests, and in it what their readers have and have read.

    Reports are believed up to `max_rate` tokens/s. `num_preemptions` counts those of all requests, ever.
    """

    def __init__(self, default_rate: float, max_rate: float = FASTEST_RATE) -> None:
        self._default_rate = default_rate
        self._max_rate = max_rate
        self.table = RequestTable()
        self._tenants = TenantNumbers()
        self._num_added = 0
        self._num_events = 0
        self._num_readings = 0
        self.num_preemptions = 0
        self._mean_output: float | None = None

    def __len__(self) -> int:
        return len(self.table)

    def add(
        self,
        req: RequestId,
        *,
        arrival_s: float,
        num_prompt: int,
        max_tokens: int,
        rate: float | str | None,
        is_rate_assumed: bool = False,
        priority: int = 0,
        tenant: Tenant = ONE_TENANT,
        may_think: bool = False,
    ) -> RowRef:
        """Take a new request in, as WAITING; its row. `rate` as `consumption_rate`; RequestError if it is none.

        `may_think`: its tokens count as thoughts until `on_answer`.
        `is_rate_assumed`: the request did not name it; "auto" names none either. What then counts as a stall is not
        known, until a report comes.
        """
        row = self.table.add(
            req,
            seq=self._num_added,
            arrival_s=arrival_s,
            rate=resolve_rate(rate, self._default_rate),
            priority=priority,
            tenant=self._tenants.enter(tenant.name),
            weight=tenant.weight,
            state_since_s=arrival_s,
            num_prompt=num_prompt,
            max_tokens=max_tokens,
            may_think=may_think,
            is_auto=rate == AUTO,
            is_rate_assumed=is_rate_assumed or rate == AUTO,
        )
        self._num_added += 1
        self._num_events += 1
        return row

    def remove(self, req: RequestId, *, completed: bool) -> None:
        """Forget a request; the length of a completed one (not of an abort) says how long others may become.

        One that was cut at its `max_tokens` only says that answers can be that long.
        """
        if completed:
            row = self.table.row(req)
            length = float(self.table["num_output"][row])
            is_cut = length >= self.table["max_tokens"][row]
            if not is_cut or (self._mean_output is not None and length > self._mean_output):
                mean = length if self._mean_output is None else self._mean_output
                self._mean_output = mean + _LENGTH_WEIGHT * (length - mean)
        self._tenants.leave(int(self.table["tenant"][self.table.row(req)]))
        self.table.remove(req)
        self._num_events += 1

    def set_state(self, req: RequestId, state: RequestState, now_s: float) -> None:
        """Move a request to another state; leaving the device counts as a preemption."""
        table, row = self.table, self.table.row(req)
        before = table.state[row]
        table.state[row] = state
        table["state_since_s"][row] = now_s
        if before == RequestState.RUNNING and state in (RequestState.PAUSED, RequestState.WAITING):
            table.num_preemptions[row] += 1
            self.num_preemptions += 1
        if before == RequestState.LOADING and state == RequestState.RUNNING:
            self._num_events += 1

    def on_planned(self, reqs: Sequence[RequestId]) -> None:
        """The step being planned samples a token for each of these requests."""
        self.table["num_in_flight"][self.table.rows(reqs)] += 1

    def on_tokens(self, reqs: Sequence[RequestId], n: npt.ArrayLike, now_s: float) -> None:
        """`n` new tokens each (or one number for all) were delivered to these readers at `now_s`."""
        table, rows = self.table, self.table.rows(reqs)
        counts = np.broadcast_to(np.asarray(n, np.int64), rows.shape)
        rows, counts = rows[counts > 0], counts[counts > 0]
        self._advance(rows, now_s)
        is_early = np.isnan(table["first_token_s"][rows])
        if is_early.any():
            self._on_early_tokens(rows[is_early], counts[is_early], now_s)
        table["num_output"][rows] += counts
        table["num_in_flight"][rows] = np.maximum(table["num_in_flight"][rows] - counts, 0)

    def _on_early_tokens(self, rows: RowIndex, counts: Ints, now_s: float) -> None:
        """Tokens of requests that had none to read: their thoughts, which start no reading, or the first to read."""
        table = self.table
        thinks = table["may_think"][rows]
        table["num_thoughts"][rows] += np.where(thinks, counts, 0)
        table["since_s"][rows[thinks]] = np.inf
        self._on_first_tokens(rows[~thinks], now_s)

    def _on_first_tokens(self, rows: RowIndex, now_s: float) -> None:
        if len(rows):
            self.table["first_token_s"][rows] = self.table["since_s"][rows] = now_s
            self._num_readings += 1

    def on_answer(self, req: RequestId, num_thoughts: int, now_s: float) -> None:
        """The thoughts of a request have turned out to be its first `num_thoughts` tokens, and all else its answer."""
        table, row = self.table, self.table.row(req)
        table["may_think"][row] = False
        table["num_thoughts"][row] = num_thoughts
        if table["num_output"][row] > num_thoughts:
            self._on_first_tokens(np.array([row]), now_s)

    def on_played(self, req: RequestId, num_tokens: int, now_s: float) -> None:
        """A client reports having played `num_tokens` of the answer; this replaces the estimate, and reading goes on.

        With rate "auto", successive reports without a stall in between also give the rate. Before the first token there
        is nothing to play and a report means nothing.

        A report is believed as far as it can be true: no more is played than was delivered, nor faster since the first
        token than `max_rate`, or the rate that the request named above that. An estimated rate is at most what was
        delivered over time.
        """
        table, row = self.table, self.table.row(req)
        reading_s = now_s - table["first_token_s"][row]
        if np.isnan(reading_s):
            return
        self._num_readings += 1
        self._advance(np.array([row]), now_s)
        rate, delivered = float(table["rate"][row]), int(table["num_output"][row] - table["num_thoughts"][row])
        fastest = max(self._max_rate, 0.0 if np.isnan(rate) else rate)
        played = min(max(num_tokens, 0), delivered, int(fastest * reading_s))
        since, stall = table["report_s"][row], table["stall_s"][row]
        # A reader who ran dry shows how fast we generate, not how fast it reads.
        if table["is_auto"][row] and now_s > since and stall == table["report_stall_s"][row]:
            read = played - table["report_tokens"][row]
            most = min(self._max_rate, delivered / max(reading_s, _MIN_READING_S))
            table["rate"][row] = estimated_rate(rate, read, max(now_s - since, _MIN_READING_S), most)
        for name, value in (
            ("consumed", played),
            ("report_tokens", played),
            ("report_s", now_s),
            ("report_stall_s", stall),
            ("has_feedback", True),
            ("is_rate_assumed", False),
        ):
            table[name][row] = value

    def stall_s(self, req: RequestId, now_s: float) -> float | None:
        """How long this reader has had nothing to read since its first token; None without a reader of known rate."""
        row = self.table.row(req)
        if self.table["is_rate_assumed"][row] or np.isnan(self.table["rate"][row]):
            return None
        return float(self._play(np.array([row]), now_s).stall_s[0])

    @property
    def is_rate_assumed(self) -> Mask:
        """For each row, whether neither the request nor a report has said how fast it is read."""
        return self.table.view("is_rate_assumed")

    def columns(self, now_s: float) -> Columns:
        """The state of every live request at `now_s`. Arrays are views, read only: use it before the next event."""
        view = self.table.view
        c: dict[str, npt.NDArray[Any]] = {name: view(name) for name in _SNAPSHOT}
        c["num_output"] = c["num_output"] + view("num_in_flight")
        return Columns(
            now_s=now_s,
            ids=self.table.ids,
            **c,
            mean_output=self._mean_output,
            num_events=self._num_events,
            num_readings=self._num_readings,
            num_tenants=len(self._tenants),
            num_added=self._num_added,
            total_preemptions=self.num_preemptions,
            reading=Reading(view("num_output") - view("num_thoughts"), *map(view, Reading._fields[1:])),
        )

    def _play(self, rows: RowIndex, now_s: float) -> Playback:
        table = self.table
        return play(
            now_s,
            rate=table["rate"][rows],
            generated=table["num_output"][rows] - table["num_thoughts"][rows],
            consumed=table["consumed"][rows],
            since_s=table["since_s"][rows],
            stall_s=table["stall_s"][rows],
            read_area=table["read_area"][rows],
        )

    def _advance(self, rows: RowIndex, now_s: float) -> None:
        """Let these readers read up to `now_s`, before something changes for them."""
        playback = self._play(rows, now_s)
        self.table["read_area"][rows] = playback.read_area
        self.table["stall_s"][rows] = playback.stall_s
        self.table["consumed"][rows] = playback.consumed
        self.table["since_s"][rows] = now_s
