"""Reasons: why a request is off the device, comes back or waits. Torch-free."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from tfserve.engine.scheduling.state import RequestState
from tfserve.types import RequestId

if TYPE_CHECKING:
    from tfserve.engine.scheduling.policy import Decision
    from tfserve.engine.scheduling.request import Request


class Cause(enum.StrEnum):
    """What makes a request move, or keeps it waiting."""

    MAKES_ROOM = "makes room"
    GROWTH = "running requests need its memory"
    HOST_FULL = "host memory is short"
    DUE = "due"
    SPARE_MEMORY = "memory is free"
    COPY_FAILED = "a copy of its KV failed"
    GRAMMAR = "its grammar is compiled"
    NO_BATCH_SLOT = "no batch slot is free"
    NO_MEMORY = "no memory is free"
    CAPACITY = "the rates of the readers add up to the capacity"


class Reason(msgspec.Struct, frozen=True, gc=False):
    """Why one request is where it is: `cause`, what its reader had left then, and the request that it makes room for.

    `unread_s` is in seconds of reading; None without a reader or a first token.
    """

    cause: Cause
    unread_s: float | None = None
    for_request: RequestId | None = None

    def words(self, name: Callable[[RequestId], str]) -> str:
        """For people. `name` says how another request is called before this one's owner."""
        cause = str(self.cause)
        if self.for_request is not None:
            cause = f"memory for {name(self.for_request)}"
        return cause if self.unread_s is None else f"{self.unread_s:.1f} s unread, {cause}"


class ReasonLog:
    """Gives each request that moves its reason: the one in the decision, or what the move itself says.

    `waits` is why the last decision left requests waiting, None: for want of room.
    """

    def __init__(self) -> None:
        self.waits: Cause | None = None
        self._given: Mapping[RequestId, Reason] = {}
        self._dropped: Collection[RequestId] = ()
        self._moves: Counter[Cause] = Counter()

    @contextmanager
    def carrying_out(self, decision: Decision) -> Iterator[None]:
        """What moves meanwhile, moves for the reasons of `decision`."""
        self.waits = decision.waits
        self._given, self._dropped = decision.reasons, decision.drop
        yield
        self._given, self._dropped = {}, ()

    def on_move(self, request: Request, before: RequestState, after: RequestState) -> None:
        """A request goes from one state to another."""
        given = self._given.get(request.id)
        if given is None and after is RequestState.RUNNING:
            # What was loaded runs for the reason for which it was brought back.
            given = request.reason if before is RequestState.LOADING else None
        elif given is None and before is RequestState.RUNNING:
            given = Reason(Cause.GROWTH)
        elif given is None and after is RequestState.LOADING:
            given = Reason(Cause.SPARE_MEMORY)
        elif given is None:
            given = Reason(Cause.HOST_FULL if request.id in self._dropped else Cause.COPY_FAILED)
        request.reason = given
        if given is not None and before is not RequestState.LOADING:
            self._moves[given.cause] += 1

    def take_moves(self) -> dict[str, int]:
        """How many requests have moved since the last call, by cause."""
        moves = {cause.name.lower(): count for cause, count in self._moves.items()}
        self._moves.clear()
        return moves

    def words(self, request: Request, live: Mapping[RequestId, Request], *, has_batch_slot: bool) -> str | None:
        """Why a live request is in its state, for its owner: requests of other tenants have no name there."""

        def name(req: RequestId) -> str:
            other = live.get(req)
            known = other is not None and other.tenant.name == request.tenant.name
            return f"stream {req}" if known else "another stream"

        if request.reason is not None:
            return request.reason.words(name)
        if request.state is not RequestState.WAITING:
            return None
        return str(self.waits or (Cause.NO_MEMORY if has_batch_slot else Cause.NO_BATCH_SLOT))
