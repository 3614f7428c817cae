"""Columns: what policies see of the live requests, as arrays. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tfserve.arrays import Floats, Ints, Mask, RowIndex
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.token_buffer import Playback, play
from tfserve.types import RequestId

# Comparing an array with an enum member takes longer than the comparison.
_WAITING, _RUNNING, _PAUSED, _LOADING = map(int, tuple(RequestState)[:4])


class Reading(NamedTuple):
    """Where readers were at their last event; what `play` goes on from."""

    generated: Ints
    consumed: Floats
    since_s: Floats
    stall_s: Floats
    read_area: Floats


@dataclass(frozen=True)
class Columns:
    """Live requests at one moment, one row each, in no particular order (`seq` is the order of arrival).

    Arrays are views of the RequestTable: read only, and true until something is carried out.
    `num_output` counts the tokens that steps under way will sample: they come, whatever is decided now. The first
    `num_thoughts` of them are thoughts; with `may_think`, those to come are too, until the answer begins. `rate` is NaN
    for a request without a reader. `tenant` numbers the tenants from 0 (`num_tenants` are live, there may be gaps), and
    `weight` is the tenant's. `host_tokens` are on the host and acknowledged. `mean_output` is the average
    output of requests that ended by themselves, or were cut beyond it. `num_events` counts arrivals, departures and
    completed loads ever, `num_readings` first tokens and clients' reports; `num_added` and `total_preemptions` are
    over the tracker's life.
    What follows from these is computed when it is first asked for: most passes need little of it.
    """

    now_s: float
    ids: tuple[RequestId, ...]
    seq: Ints
    arrival_s: Floats
    rate: Floats
    priority: Ints
    tenant: Ints
    weight: Floats
    state: npt.NDArray[np.int8]
    state_since_s: Floats
    num_prompt: Ints
    num_output: Ints
    num_thoughts: Ints
    may_think: Mask
    num_computed: Ints
    max_tokens: Ints
    device_blocks: Ints
    host_tokens: Ints
    num_preemptions: Ints
    first_token_s: Floats
    mean_output: float | None
    num_events: int
    num_readings: int
    num_tenants: int
    num_added: int
    total_preemptions: int
    reading: Reading

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def is_waiting(self) -> Mask:
        """Requests without KV."""
        mask: Mask = self.state == _WAITING
        return mask

    @cached_property
    def is_running(self) -> Mask:
        """Requests on the device."""
        mask: Mask = self.state == _RUNNING
        return mask

    @cached_property
    def is_paused(self) -> Mask:
        """Requests off the device, their KV on the host."""
        mask: Mask = self.state == _PAUSED
        return mask

    @cached_property
    def is_loading(self) -> Mask:
        """Requests whose KV is on its way back."""
        mask: Mask = self.state == _LOADING
        return mask

    @cached_property
    def has_reader(self) -> Mask:
        """Requests with a rate."""
        return ~np.isnan(self.rate)

    @cached_property
    def num_answer(self) -> Ints:
        """Tokens of the answer: what there is to read."""
        return np.where(self.may_think, 0, self.num_output - self.num_thoughts)

    @cached_property
    def has_output(self) -> Mask:
        """Requests that have generated a token, if only of their thoughts."""
        return self.num_output > 0

    @cached_property
    def has_started(self) -> Mask:
        """Requests that have the first token of their answer: reading starts with it."""
        return self.num_answer > 0

    @cached_property
    def thinks(self) -> Mask:
        """Requests that have generated thoughts, and nothing to read yet."""
        mask: Mask = self.has_output & ~self.has_started
        return mask

    @cached_property
    def is_read(self) -> Mask:
        """Requests with a rate, unless they think: thoughts have no reader."""
        return self.has_reader & ~self.thinks

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

    @cached_property
    def expected_output(self) -> Floats:
        """max_tokens, or less where finished requests say so."""
        expected = self.max_tokens.astype(np.float64)
        if self.mean_output is not None:
            # A request past the average is expected to go on for a while.
            expected = np.minimum(expected, np.maximum(self.mean_output, 1.25 * self.num_output))
        return expected

    @cached_property
    def expected_answer(self) -> Floats:
        """The same without the thoughts."""
        return self.expected_output - self.num_thoughts

    @cached_property
    def playback(self) -> Playback:
        """Where the readers are now."""
        return play(self.now_s, rate=self.rate, **self.reading._asdict())

    @property
    def consumed(self) -> Floats:
        """Tokens read."""
        return self.playback.consumed

    @property
    def stall_s(self) -> Floats:
        """Seconds that readers have waited since their first token."""
        return self.playback.stall_s

    @property
    def current_stall_s(self) -> Floats:
        """How long the present stall has lasted: 0 while there is something to read."""
        return self.playback.current_stall_s

    @property
    def read_area(self) -> Floats:
        """The integral of `consumed` over time, token seconds."""
        return self.playback.read_area

    @cached_property
    def unread(self) -> Floats:
        """The buffer in tokens."""
        return self.num_answer - self.playback.consumed

    @cached_property
    def time_to_empty_s(self) -> Floats:
        """The buffer in seconds; 0 before the first token and infinite where there is no reader."""
        seconds = np.where(self.has_started, self.unread / self.rate, 0.0)
        seconds[~self.is_read] = np.inf
        return seconds

    def in_state(self, state: RequestState) -> RowIndex:
        """Rows in a state, in order of arrival."""
        rows = np.flatnonzero(self.state == int(state))
        return rows[np.argsort(self.seq[rows])]

    def ids_of(self, rows: RowIndex | Sequence[int]) -> tuple[RequestId, ...]:
        """The requests of these rows, in their order."""
        return tuple(self.ids[row] for row in rows)
