"""What a scheduling policy sees and what it answers. Policies decide; the Scheduler carries out."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from tfserve.arrays import Floats, Ints, Mask, RowIndex
from tfserve.engine.scheduling.columns import Columns
from tfserve.engine.scheduling.reasons import Cause, Reason
from tfserve.plan import Direction
from tfserve.types import RequestId


class ResumeBy(enum.Enum):
    """How a preempted request gets its KV back: LOAD copies it from the host, RECOMPUTE gives it up."""

    LOAD = "load"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class MemoryView:
    """Both tiers, in blocks of `block_size` tokens. `num_blocks` can be used by requests."""

    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_host_blocks: int = 0
    num_free_host_blocks: int = 0


class CostView(Protocol):
    """What a policy asks of the CostModel, where each question is explained."""

    @property
    def prefill_s_per_token(self) -> float:
        """Seconds per prompt token."""
        ...

    @property
    def prompts_s(self) -> float:
        """Seconds for having prompt tokens at all."""
        ...

    def step_s(self, n_decode: float, decode_ctx: float, n_prefill: float = 0, prefill_ctx: float = 0) -> float:
        """Seconds of a step."""
        ...

    def recompute_s(self, num_tokens: npt.ArrayLike) -> Floats:
        """Seconds of computing tokens anew."""
        ...

    def switch_s(
        self, evict_tokens: npt.ArrayLike, load_tokens: npt.ArrayLike, num_tokens: npt.ArrayLike
    ) -> tuple[Floats, Floats]:
        """Seconds of a round trip by transfer, by recompute."""
        ...

    def queue_s(self, direction: Direction) -> float:
        """Seconds until a copy would start."""
        ...

    def capacity_tokens_per_s(self, mean_ctx: float, kv_tokens: float, prefill_per_output: float = 0.0) -> float:
        """Capacity in generated tokens/s."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """The state a policy decides on: every live request, both memory tiers, the costs. Read only."""

    now_s: float
    columns: Columns
    memory: MemoryView
    cost: CostView
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def num_free_slots(self) -> int:
        """Requests that may still join the batch."""
        c = self.columns
        return self.max_num_seqs - int(np.count_nonzero(c.is_running | c.is_loading))

    def blocks_for(self, num_tokens: Ints) -> Ints:
        """Blocks that hold these many tokens, elementwise."""
        return -(-num_tokens // self.memory.block_size)

    @cached_property
    def is_member(self) -> Mask:
        """Requests that have been let in: on the device, on the host, or preempted after their first output."""
        c = self.columns
        mask: Mask = ~c.is_waiting | c.has_output
        return mask

    @cached_property
    def is_decoding(self) -> Mask:
        """Requests on the device that lack only their newest token."""
        c = self.columns
        mask: Mask = c.is_running & (c.num_uncomputed == 1) & c.has_output
        return mask

    @cached_property
    def next_step_blocks(self) -> Ints:
        """New blocks that each decoding request's next token takes: 1 where the last block is full.

        A request with its last token in flight takes none.
        """
        is_full: Mask = self.columns.num_computed % self.memory.block_size == 0
        return (self.is_decoding & is_full & (self.columns.num_remaining > 0)).astype(np.int64)

    @cached_property
    def clean_blocks(self) -> Ints:
        """Device blocks of each request that the host has too: preempting it frees these at once."""
        c = self.columns
        whole = np.where(c.host_tokens >= c.num_computed, c.device_blocks, c.host_tokens // self.memory.block_size)
        return np.minimum(whole, c.device_blocks)


class Decision(msgspec.Struct, frozen=True):
    """What to do before the coming step, in this order: drop, preempt, resume, admit.

    `preempt` takes running requests off the device: LOAD keeps their KV on the host (PAUSED), RECOMPUTE gives it up
    (WAITING). `resume` brings paused ones back. `admit` gives waiting ones a slot, those preempted before included.
    `drop` are paused requests that give their KV up: they wait, to be computed again.
    `order` names which requests get prompt tokens first; the rest come after, in order of admission.
    `chunks`, if there are any, are the most prompt tokens for each of `order`; those of `hold` do not decode in the
    coming step. `decode` says
    whether requests that only lack their newest token run in a step with prompt tokens, `prefill_tokens` caps those.
    `reject` are waiting requests to refuse, each with the seconds after which to try again. `wake_s` is when the policy
    wants to be asked again even if nothing happens. `reasons` say why, where the policy knows more than
    the move tells; `waits` is why the requests wait that are not admitted, None: for want of room.
    """

    admit: tuple[RequestId, ...] = ()
    preempt: tuple[tuple[RequestId, ResumeBy], ...] = ()
    resume: tuple[tuple[RequestId, ResumeBy], ...] = ()
    drop: tuple[RequestId, ...] = ()
    reject: tuple[tuple[RequestId, float], ...] = ()
    order: tuple[RequestId, ...] = ()
    chunks: tuple[int, ...] = ()
    hold: frozenset[RequestId] = frozenset()
    decode: bool = True
    prefill_tokens: int | None = None
    wake_s: float | None = None
    reasons: Mapping[RequestId, Reason] = {}
    waits: Cause | None = None


class Policy(Protocol):
    """Who runs. Called once per step; what it remembers between calls is its own."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """Answer for the coming step; must let a request run when none does and any waits."""
        ...


def held_back(columns: Columns, generate_ahead_s: float | None) -> Mask:
    """Requests not to decode now, under any policy: their readers have more than `generate_ahead_s` unread."""
    if generate_ahead_s is None:
        return np.zeros(len(columns), np.bool_)
    return columns.is_read & (columns.time_to_empty_s > generate_ahead_s)


def held_on_device(columns: Columns, generate_ahead_s: float | None) -> tuple[RowIndex, float | None]:
    """Requests held back on the device, and when the first of them may go on (None if there are none).

    The loop may sleep until then.
    """
    if generate_ahead_s is None:
        return np.empty(0, np.intp), None
    held = np.flatnonzero(held_back(columns, generate_ahead_s) & columns.is_running)
    if not len(held):
        return held, None
    return held, columns.now_s + float(columns.time_to_empty_s[held].min()) - generate_ahead_s


def write_order(columns: Columns) -> tuple[RequestId, ...]:
    """Running requests in the order in which to store their KV: the fullest buffer first (paper, write-through)."""
    rows = np.flatnonzero(columns.is_running & (columns.num_computed > columns.host_tokens))
    return columns.ids_of(rows[np.lexsort((columns.seq[rows], -columns.time_to_empty_s[rows]))])
