"""What a scheduling policy sees and what it answers. Policies decide; the Scheduler carries out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from tfserve.types import RequestId


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """One live request in a Snapshot, in tokens. `num_remaining` is what it may still generate."""

    id: RequestId
    num_prompt: int
    num_output: int
    num_computed: int
    num_remaining: int

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is still to be computed."""
        return self.num_prompt + self.num_output - self.num_computed


class Snapshot(msgspec.Struct, frozen=True):
    """The state a policy decides on. `waiting` is the head of the queue, at most `num_free_rows` requests of it.

    `blocks_needed` is how many new blocks the decode step of all running requests takes.
    """

    now_s: float
    running: Sequence[Candidate]
    waiting: Sequence[Candidate]
    num_free_rows: int
    block_size: int
    num_blocks: int
    num_free_blocks: int

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def next_token_blocks(self, request: Candidate) -> int:
        """New blocks that the request's next decode step takes: 1 when its last block is full."""
        return int(request.num_uncomputed == 1 and request.num_computed % self.block_size == 0)


class Decision(msgspec.Struct, frozen=True):
    """What to do before the coming step.

    `admit` waiting requests get a row, in this order; `preempt` running ones lose theirs and their KV (they
    recompute). `decode` says whether requests that only lack their newest token run in a step with prefill chunks.
    """

    admit: tuple[RequestId, ...] = ()
    preempt: tuple[RequestId, ...] = ()
    decode: bool = True


class Policy(Protocol):
    """Who runs. Called once per step."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """Answer for the coming step; must admit the head of the queue when nothing runs."""
        ...
