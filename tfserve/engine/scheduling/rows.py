"""Rows: who sits in which of the runner's rows, and what the runner has not been told about it yet. Torch-free."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from tfserve.engine.scheduling.request import Request
from tfserve.plan import BlockId, Row, RowInit


class Rows:
    """Gives each running request a row, the lowest free one; collects entries and releases for the next plan."""

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._free = [Row(row) for row in range(max_num_seqs)]
        self._entered: list[RowInit] = []
        self._released: list[Row] = []

    @property
    def num_free(self) -> int:
        """Rows without a request."""
        return len(self._free)

    def enter(self, request: Request, blocks: tuple[BlockId, ...]) -> None:
        """Seat a request whose KV is in `blocks` (none: it is to be computed). IndexError if no row is free."""
        request.row = heapq.heappop(self._free)
        self._entered.append(
            RowInit(
                row=request.row,
                req=request.id,
                params=request.params,
                seed=request.seed,
                token_ids=tuple(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                blocks=blocks,
                eos_token_ids=tuple(request.eos_token_ids),
            )
        )

    def leave(self, request: Request) -> None:
        """Take a request's row back."""
        if request.row is None:
            raise AssertionError(f"{request.id} runs without a row")
        heapq.heappush(self._free, request.row)
        entering = len(self._entered)
        self._entered = [entry for entry in self._entered if entry.req != request.id]
        # A row whose entry was never sent needs no release.
        if len(self._entered) == entering:
            self._released.append(request.row)
        request.row = None

    def take_news(self) -> tuple[tuple[RowInit, ...], tuple[Row, ...]]:
        """Entries and releases since the last call: they go into the step that is launched next."""
        news = tuple(self._entered), tuple(self._released)
        self._entered, self._released = [], []
        return news

    def check(self, running: Sequence[Request]) -> None:
        """Raise AssertionError unless every row is either free or a running request's."""
        rows = sorted([*self._free, *(request.row for request in running if request.row is not None)])
        if rows != list(range(self._max_num_seqs)) or len(self._free) + len(running) != self._max_num_seqs:
            raise AssertionError("a row is both free and taken, or lost")
