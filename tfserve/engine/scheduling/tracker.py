"""Tracker: everything the scheduler knows about live requests, one row each. It decides nothing. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tfserve.arrays import Ints, Mask, RowIndex
from tfserve.engine.scheduling.columns import Columns, Reading
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.table import Table
from tfserve.engine.scheduling.tenant_numbers import TenantNumbers
from tfserve.engine.scheduling.token_buffer import AUTO, Playback, estimated_rate, play, resolve_rate
from tfserve.types import FASTEST_RATE, ONE_TENANT, RequestId, Tenant

_DEFAULTS: dict[str, tuple[type, float]] = {
    "seq": (np.int64, 0),
    "arrival_s": (np.float64, 0.0),
    "rate": (np.float64, np.nan),
    "priority": (np.int64, 0),
    "tenant": (np.int64, 0),
    "weight": (np.float64, 1.0),
    "state": (np.int8, RequestState.WAITING),
    "state_since_s": (np.float64, 0.0),
    "num_prompt": (np.int64, 0),
    "num_output": (np.int64, 0),
    "num_in_flight": (np.int64, 0),
    "num_computed": (np.int64, 0),
    "max_tokens": (np.int64, 0),
    "device_blocks": (np.int64, 0),
    "host_tokens": (np.int64, 0),
    "kv_row": (np.int64, 0),
    "num_preemptions": (np.int64, 0),
    "first_token_s": (np.float64, np.nan),
    "consumed": (np.float64, 0.0),
    "since_s": (np.float64, np.inf),
    "stall_s": (np.float64, 0.0),
    "read_area": (np.float64, 0.0),
    "is_auto": (np.bool_, False),
    "is_rate_assumed": (np.bool_, False),
    "has_feedback": (np.bool_, False),
    "report_s": (np.float64, np.nan),
    "report_tokens": (np.float64, 0.0),
    "report_stall_s": (np.float64, 0.0),
}

_LENGTH_WEIGHT = 0.05
"""How far one finished request moves the average output length."""

_LEAST_READING_S = 1e-6
"""Least time that tokens are taken to be read in; a report may come at the moment of another."""


class Tracker:
    """Owns the reader state of live requests, and the columns that the Scheduler keeps up to date for its policies.

    Reports are believed up to `max_rate` tokens/s.
    """

    def __init__(self, default_rate: float, max_rate: float = FASTEST_RATE) -> None:
        self._default_rate = default_rate
        self._max_rate = max_rate
        self._table = Table(_DEFAULTS)
        self._tenants = TenantNumbers()
        self._num_added = 0
        self._num_events = 0
        self._num_readings = 0
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
        is_rate_assumed: bool = False,
        priority: int = 0,
        tenant: Tenant = ONE_TENANT,
    ) -> None:
        """Take a new request in, as WAITING. `rate` as `consumption_rate`; RequestError if it is none.

        `is_rate_assumed`: the request did not name it; "auto" names none either. What then counts as a stall is not
        known, until a report comes.
        """
        self._table.add(
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
            is_auto=rate == AUTO,
            is_rate_assumed=is_rate_assumed or rate == AUTO,
        )
        self._num_added += 1
        self._num_events += 1

    def remove(self, req: RequestId, *, completed: bool) -> None:
        """Forget a request; the length of a completed one (not of an abort) says how long others may become.

        One that was cut at its `max_tokens` only says that answers can be that long.
        """
        if completed:
            row = self._table.row(req)
            length = float(self._table["num_output"][row])
            is_cut = length >= self._table["max_tokens"][row]
            if not is_cut or (self._mean_output is not None and length > self._mean_output):
                mean = length if self._mean_output is None else self._mean_output
                self._mean_output = mean + _LENGTH_WEIGHT * (length - mean)
        self._tenants.leave(int(self._table["tenant"][self._table.row(req)]))
        self._table.remove(req)
        self._num_events += 1

    def set_state(self, req: RequestId, state: RequestState, now_s: float) -> None:
        """Move a request to another state; leaving the device counts as a preemption."""
        row = self._table.row(req)
        before = self._table["state"][row]
        self._table["state"][row] = state
        self._table["state_since_s"][row] = now_s
        if before == RequestState.RUNNING and state in (RequestState.PAUSED, RequestState.WAITING):
            self._table["num_preemptions"][row] += 1
            self._num_preemptions += 1
        if before == RequestState.LOADING and state == RequestState.RUNNING:
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

    def on_planned(self, reqs: Sequence[RequestId]) -> None:
        """The step being planned samples a token for each of these requests."""
        self._table["num_in_flight"][self._table.rows(reqs)] += 1

    def on_tokens(self, reqs: Sequence[RequestId], n: npt.ArrayLike, now_s: float) -> None:
        """`n` new tokens each (or one number for all) were delivered to these readers at `now_s`."""
        table, rows = self._table, self._table.rows(reqs)
        counts = np.broadcast_to(np.asarray(n, np.int64), rows.shape)
        rows, counts = rows[counts > 0], counts[counts > 0]
        self._advance(rows, now_s)
        first = rows[np.isnan(table["first_token_s"][rows])]
        if len(first):
            table["first_token_s"][first] = now_s
            self._num_readings += 1
        table["num_output"][rows] += counts
        table["num_in_flight"][rows] = np.maximum(table["num_in_flight"][rows] - counts, 0)

    def on_played(self, req: RequestId, num_tokens: int, now_s: float) -> None:
        """A client reports having played `num_tokens` in all; this replaces the estimate, and reading goes on from it.

        With rate "auto", successive reports without a stall in between also give the rate. Before the first token there
        is nothing to play and a report means nothing.

        A report is believed as far as it can be true: no more is played than was delivered, nor faster since the first
        token than `max_rate`, or the rate that the request named above that. An estimated rate is at most what was
        delivered over time.
        """
        table, row = self._table, self._table.row(req)
        reading_s = now_s - table["first_token_s"][row]
        if np.isnan(reading_s):
            return
        self._num_readings += 1
        self._advance(np.array([row]), now_s)
        rate, delivered = float(table["rate"][row]), int(table["num_output"][row])
        fastest = max(self._max_rate, 0.0 if np.isnan(rate) else rate)
        played = min(max(num_tokens, 0), delivered, int(fastest * reading_s))
        since, stall = table["report_s"][row], table["stall_s"][row]
        # A reader who ran dry shows how fast we generate, not how fast it reads.
        if table["is_auto"][row] and now_s > since and stall == table["report_stall_s"][row]:
            read = played - table["report_tokens"][row]
            most = min(self._max_rate, delivered / max(reading_s, _LEAST_READING_S))
            table["rate"][row] = estimated_rate(rate, read, max(now_s - since, _LEAST_READING_S), most)
        for name, value in (
            ("consumed", played),
            ("report_tokens", played),
            ("report_s", now_s),
            ("report_stall_s", stall),
            ("has_feedback", True),
            ("is_rate_assumed", False),
        ):
            table[name][row] = value

    @property
    def kv_rows(self) -> Ints:
        """For each row, that of the request's counters in the memory manager; 0 without KV."""
        return self._table["kv_row"]

    def follow_kv(self, moved: Mapping[RequestId, int]) -> None:
        """Note who has got or lost a row in the memory manager; those that are not live are passed over."""
        rows = self._table["kv_row"]
        for req, kv_row in moved.items():
            if req in self._table:
                rows[self._table.row(req)] = kv_row

    def set_kv(self, *, num_computed: Ints, device_blocks: Ints, host_tokens: Ints) -> None:
        """Set what the memory manager knows of every live request, in the order of `kv_rows`."""
        self._table["num_computed"][:] = num_computed
        self._table["device_blocks"][:] = device_blocks
        self._table["host_tokens"][:] = host_tokens

    def stall_s(self, req: RequestId, now_s: float) -> float | None:
        """How long this reader has had nothing to read since its first token; None without a reader of known rate."""
        row = self._table.row(req)
        if self._table["is_rate_assumed"][row] or np.isnan(self._table["rate"][row]):
            return None
        return float(self._play(np.array([row]), now_s).stall_s[0])

    @property
    def is_rate_assumed(self) -> Mask:
        """For each row, whether neither the request nor a report has said how fast it is read."""
        return self._table["is_rate_assumed"]

    def columns(self, now_s: float) -> Columns:
        """The state of every live request at `now_s`. Arrays may be views: use it before the next event."""
        table = self._table
        c: dict[str, npt.NDArray[Any]] = {name: table[name] for name in _SNAPSHOT}
        c["num_output"] = c["num_output"] + table["num_in_flight"]
        return Columns(
            now_s=now_s,
            ids=table.ids,
            **c,
            mean_output=self._mean_output,
            num_events=self._num_events,
            num_readings=self._num_readings,
            num_tenants=len(self._tenants),
            num_added=self._num_added,
            total_preemptions=self._num_preemptions,
            reading=Reading(
                table["num_output"], table["consumed"], table["since_s"], table["stall_s"], table["read_area"]
            ),
        )

    def _play(self, rows: RowIndex | slice, now_s: float) -> Playback:
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

    def _advance(self, rows: RowIndex, now_s: float) -> None:
        """Let these readers read up to `now_s`, before something changes for them."""
        playback = self._play(rows, now_s)
        self._table["read_area"][rows] = playback.read_area
        self._table["stall_s"][rows] = playback.stall_s
        self._table["consumed"][rows] = playback.consumed
        self._table["since_s"][rows] = now_s


_SNAPSHOT = (
    "seq",
    "arrival_s",
    "rate",
    "priority",
    "tenant",
    "weight",
    "state",
    "state_since_s",
    "num_prompt",
    "num_output",
    "num_computed",
    "max_tokens",
    "device_blocks",
    "host_tokens",
    "num_preemptions",
    "first_token_s",
)
