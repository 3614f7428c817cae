"""SlotAllocator: the batch slots of running requests, and changes that the runner has not been told. Torch-free."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from tfserve.engine.scheduling.request import Request
from tfserve.plan import BlockId, SlotId, SlotInit


class SlotAllocator:
    """Gives each running request a batch slot, the lowest free one; collects entries and releases for the next plan."""

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._free = [SlotId(slot) for slot in range(max_num_seqs)]
        self._entered: list[SlotInit] = []
        self._released: list[SlotId] = []

    @property
    def num_free(self) -> int:
        """Slots without a request."""
        return len(self._free)

    def enter(self, request: Request, blocks: tuple[BlockId, ...]) -> None:
        """Give a slot to a request whose KV is in `blocks` (none: to be computed). IndexError if none is free."""
        request.slot = heapq.heappop(self._free)
        self._entered.append(
            SlotInit(
                slot=request.slot,
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
        """Take a request's slot back."""
        if request.slot is None:
            raise AssertionError(f"{request.id} runs without a slot")
        heapq.heappush(self._free, request.slot)
        entering = len(self._entered)
        self._entered = [entry for entry in self._entered if entry.req != request.id]
        # A slot whose entry was never sent needs no release.
        if len(self._entered) == entering:
            self._released.append(request.slot)
        request.slot = None

    def take_changes(self) -> tuple[tuple[SlotInit, ...], tuple[SlotId, ...]]:
        """Entries and releases since the last call: they go into the step that is launched next."""
        news = tuple(self._entered), tuple(self._released)
        self._entered, self._released = [], []
        return news

    def check(self, running: Sequence[Request]) -> None:
        """Raise AssertionError unless every slot is either free or a running request's."""
        slots = sorted([*self._free, *(request.slot for request in running if request.slot is not None)])
        if slots != list(range(self._max_num_seqs)) or len(self._free) + len(running) != self._max_num_seqs:
            raise AssertionError("a slot is both free and taken, or lost")
