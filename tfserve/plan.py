"""The data and protocols between the packages: one step's plan and result, Runner, TransferEngine, Clock. Torch-free.

A plan is immutable data: it can be logged, and replayed on a machine without a GPU. Structs that are created in
thousands have `gc=False`: they cannot be part of a reference cycle.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NewType, Protocol

import msgspec

from tfserve.types import RequestId, SamplingParams, TokenLogprob

BlockId = NewType("BlockId", int)
SlotId = NewType("SlotId", int)
"""A request's batch slot: index into the runner's block tables and the sampler's state, in [0, max_num_seqs)."""

StepId = NewType("StepId", int)
"""The number of a step; passed once that step has finished on the device."""

CopyId = NewType("CopyId", int)
"""Id of a copy; never reused."""


class Direction(enum.StrEnum):
    """STORE is device to host, LOAD is host to device."""

    STORE = "store"
    LOAD = "load"


class CopyDeps(msgspec.Struct, frozen=True, gc=False):
    """What must have finished before a copy starts: a step with all before it, and other copies."""

    step: StepId | None = None
    copies: tuple[CopyId, ...] = ()


class Copy(msgspec.Struct, frozen=True, gc=False):
    """Move tokens [start, start + num_tokens) of one block from tier to tier, in this direction."""

    id: CopyId
    direction: Direction
    device_block: BlockId
    host_block: BlockId
    start: int
    num_tokens: int
    after: CopyDeps = CopyDeps()


class Ack(msgspec.Struct, frozen=True, gc=False):
    """A copy has ended. Only an acknowledgement moves a cursor or frees a block. Times by the transfers' clock."""

    id: CopyId
    ok: bool
    nbytes: int
    start_s: float
    end_s: float


NULL_BLOCK = BlockId(0)
"""Reserved: never allocated, always finite; padding rows read and write it."""


class SlotInit(msgspec.Struct, frozen=True):
    """A request enters a slot, at first or after a preemption: all that the runner needs and a step does not contain.

    `token_ids` are all tokens so far, of which the first `num_prompt_tokens` are the prompt; penalties use them.
    `blocks` is the whole block table so far, before this step's `new_blocks`. `seed` is the resolved 64-bit seed.
    `min_tokens` forbids `eos_token_ids` and the request's own stop tokens.
    """

    slot: SlotId
    req: RequestId
    params: SamplingParams
    seed: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    blocks: tuple[BlockId, ...] = ()
    eos_token_ids: tuple[int, ...] = ()


class SeqStep(msgspec.Struct, frozen=True, gc=False):
    """One request's share of a step: compute tokens [start, start + n).

    `token_ids` are those n tokens; None means n = 1 and the token is the slot's last sampled one, which the device has.
    `new_blocks` extend the slot's block table before the step. `sample` asks for the token after the last position.
    """

    req: RequestId
    slot: SlotId
    start: int
    n: int
    sample: bool
    token_ids: tuple[int, ...] | None
    new_blocks: tuple[BlockId, ...] = ()


class StepPlan(msgspec.Struct, frozen=True):
    """One step: requests leave slots, others enter, then `seqs` run, the first `n_decode` of them decodes (n = 1).

    `stores` and `loads` are for the transfer engine and run beside the step. Without `seqs` there is nothing to launch.
    """

    step: StepId
    seqs: tuple[SeqStep, ...]
    n_decode: int
    entered: tuple[SlotInit, ...] = ()
    released_slots: tuple[SlotId, ...] = ()
    stores: tuple[Copy, ...] = ()
    loads: tuple[Copy, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step over all requests."""
        return sum(seq.n for seq in self.seqs)


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a request's prompt tokens at [start, start + len(entries)), which this step predicted."""

    req: RequestId
    start: int
    entries: tuple[TokenLogprob, ...]


class StepResult(msgspec.Struct, frozen=True):
    """Results of a step: a token (and its log probabilities where asked) for each seq with `sample`, in plan order.

    `device_s` is the time of the step by the device's clock; `idle_s` is the device's idle time between the previous
    step and this one (0 for the first). `failed` maps a request without a token to the reason; its token is 0.
    `prompt_logprobs` are for requests whose parameters ask for them.
    """

    step: StepId
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    device_s: float
    idle_s: float = 0.0
    failed: tuple[tuple[RequestId, str], ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


class InFlight(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """The step's result, or its exception; waits for the device. Any single thread may call it."""
        ...


class Runner(Protocol):
    """Executes plans. Owns the slots (block tables, sampling state), but no request and no block.

    Several steps may run at once. What a step needs from the previous one (sampled tokens, their counts) is in the
    slots, so it can be planned before. A failed step leaves finite KV and keeps its slots, because the next step may
    use them.
    """

    def launch(self, plan: StepPlan) -> InFlight:
        """Start a step; steps run in launch order. Does not raise: errors come from `result`."""
        ...

    def close(self) -> None:
        """Wait for running steps and end the threads; no launch may follow."""
        ...


class Grammars(Protocol):
    """Compiled grammars. A grammar is compiled before its request is scheduled.

    A held grammar stays compiled. The caller counts the requests that it holds one for.
    """

    def hold(self, grammar: str) -> bool:
        """Hold a grammar if it is compiled. Returns whether it is."""
        ...

    def compile(self, grammar: str) -> str:
        """Compile a grammar and hold it. Returns what is wrong with it, or "". May take seconds; does not raise.

        May be called on any thread; does not block the others.
        """
        ...

    def let_go(self, grammar: str) -> None:
        """Release a grammar; no effect if it is not held."""
        ...


class TransferEngine(Protocol):
    """Moves bytes between the tiers; owns no cache state.

    Copies of one direction run in submission order; the two directions are independent. A copy starts when its
    direction is free and its `after` is done: the step and all before it have finished, and the named copies have ended
    (completed, failed or cancelled). An id that was never submitted counts as ended, so submit a store before the load
    that waits for it.
    """

    def submit(self, copies: Sequence[Copy]) -> None:
        """Queue copies. May be called before the launch of their step; the step to wait for may not be launched yet
        either.
        """
        ...

    def complete(self, step: StepId) -> None:
        """Step `step`, and all before it, have finished or failed. (Device events may have said so earlier.)"""
        ...

    def poll(self) -> list[Ack]:
        """Acknowledgements since the last call, in order of completion; never blocks."""
        ...

    def cancel(self, ids: set[CopyId]) -> set[CopyId]:
        """Drop the copies that have not started; returns their ids. Only the others are acknowledged."""
        ...

    def close(self) -> None:
        """Finish or drop all copies; release threads and memory. No submit may follow."""
        ...


class Clock(Protocol):
    """Time as a dependency, so that the same loop runs in real and in virtual time."""

    def now(self) -> float:
        """Seconds; monotonic."""
        ...

    def wait(self, until: float | None) -> None:
        """Sleep until `until` (None: no limit) or until `notify` is called."""
        ...

    def notify(self) -> None:
        """Wake the sleeper, now or at its next `wait`; safe from any thread."""
        ...
