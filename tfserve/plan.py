"""What the rooms hand each other: one step's plan and result, and the protocols they meet behind. Torch-free.

A plan is immutable data: it can be logged, and replayed on a machine without a GPU. Structs made
by the thousand are not tracked by the garbage collector (`gc=False`): they refer to nothing that could refer back.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NewType, Protocol

import msgspec

from tfserve.types import RequestId, SamplingParams, TokenLogprob

BlockId = NewType("BlockId", int)
Row = NewType("Row", int)
"""A request's seat in the runner: its line of the block table and of the sampler's state, in [0, max_num_seqs)."""

Fence = NewType("Fence", int)
"""The number of a step; passed once that step has finished on the device."""

CopyId = NewType("CopyId", int)
"""Names one copy for its whole life; never reused."""


class Direction(enum.StrEnum):
    """STORE is device to host, LOAD is host to device."""

    STORE = "store"
    LOAD = "load"


class After(msgspec.Struct, frozen=True, gc=False):
    """What must have finished before a copy may start: steps (by fence) and other copies (by id)."""

    fence: Fence | None = None
    copies: tuple[CopyId, ...] = ()


class Copy(msgspec.Struct, frozen=True, gc=False):
    """Move tokens [tok0, tok0 + ntok) of one block between the tiers, in `dir`'s direction."""

    id: CopyId
    dir: Direction
    dev: BlockId
    host: BlockId
    tok0: int
    ntok: int
    after: After = After()


class Ack(msgspec.Struct, frozen=True, gc=False):
    """A copy has ended. Only an acknowledgement moves a cursor or frees a block. Times by the clock of the link."""

    id: CopyId
    ok: bool
    nbytes: int
    start_s: float
    end_s: float


NULL_BLOCK = BlockId(0)
"""Reserved: never allocated, always finite; padding rows read and write it."""


class RowInit(msgspec.Struct, frozen=True):
    """A request takes (or re-takes, after a preemption) a row: what the runner must know that a step does not say.

    `token_ids` are all tokens known so far, `num_prompt_tokens` of them the user's; penalties count from them.
    `blocks` is the whole block table so far, before this step's `new_blocks`. `seed` is the resolved 64-bit seed.
    `eos_token_ids` are what `min_tokens` forbids beside the request's own stop tokens.
    """

    row: Row
    req: RequestId
    params: SamplingParams
    seed: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    blocks: tuple[BlockId, ...] = ()
    eos_token_ids: tuple[int, ...] = ()


class SeqStep(msgspec.Struct, frozen=True, gc=False):
    """One request's share of a step: compute tokens [start, start + n).

    `token_ids` are those n tokens; None means n = 1 and the token is the row's last sampled one, which the device has.
    `new_blocks` extend the row's block table before the step. `sample` asks for the token after the last position.
    """

    req: RequestId
    row: Row
    start: int
    n: int
    sample: bool
    token_ids: tuple[int, ...] | None
    new_blocks: tuple[BlockId, ...] = ()


class StepPlan(msgspec.Struct, frozen=True):
    """One step: rows leave, rows enter, then `seqs` run, the first `n_decode` of them decodes (n = 1).

    `stores` and `loads` are for the transfer engine and run beside the step. Without `seqs` there is nothing to launch.
    """

    step: Fence
    seqs: tuple[SeqStep, ...]
    n_decode: int
    entered: tuple[RowInit, ...] = ()
    released_rows: tuple[Row, ...] = ()
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
    """What a step produced: a token (and its log probabilities where asked) for each seq with `sample`, in plan order.

    `device_s` is the time the device spent on the step, by the device's own clock; `idle_s` how long it had nothing to
    do before, since the end of the step before this one (0 for the first). `failed` says of requests why there is no
    token for them, while the others have theirs: the place of theirs is filled with 0. `prompt_logprobs` are for
    requests whose parameters ask for them.
    """

    step: Fence
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    device_s: float
    idle_s: float = 0.0
    failed: tuple[tuple[RequestId, str], ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


class InFlight(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """The step's outcome; waits for the device. Raises what the step raised. Any one thread may ask."""
        ...


class Runner(Protocol):
    """Turns a plan into tokens. Owns rows (block tables, sampling state); owns no request and no block.

    Several steps may be under way. What a step needs to know of the one before (the tokens sampled, their counts) stays
    in the rows, so it is planned without; a failed step leaves finite KV and its rows seated, for the next may hold its
    requests too.
    """

    def launch(self, plan: StepPlan) -> InFlight:
        """Start a step; steps run in launch order. Raises nothing: what goes wrong comes out of `result`."""
        ...

    def close(self) -> None:
        """Wait for what is under way and let go of threads; nothing may be launched after."""
        ...


class Grammars(Protocol):
    """The grammars that a runner's rows follow, compiled before their requests are scheduled.

    A grammar that is held stays compiled. Who holds one for several requests counts them.
    """

    def hold(self, grammar: str) -> bool:
        """Hold a grammar if it is compiled; whether it is."""
        ...

    def compile(self, grammar: str) -> str:
        """Compile a grammar and hold it; what is wrong with it, or empty. May take seconds, and raises nothing.

        May be called on any thread; other threads go on meanwhile.
        """
        ...

    def let_go(self, grammar: str) -> None:
        """Hold a grammar no longer; one that is not held is fine."""
        ...


class TransferEngine(Protocol):
    """Moves bytes between the tiers; owns no cache state.

    Copies of one direction run in submission order; the two directions are independent. A copy starts when its link is
    free and its `after` is done: the steps up to the fence have finished, and the named copies have ended, well, badly
    or cancelled. A name that was never submitted counts as ended, so submit a store before the load that waits for it.
    """

    def submit(self, copies: Sequence[Copy]) -> None:
        """Queue copies. May be called before the step they were planned with is launched; a fence they wait for may be
        of a step that a thread is still launching.
        """
        ...

    def complete(self, fence: Fence) -> None:
        """Step `fence`, and all before it, have finished or failed. (Device events may have said so earlier.)"""
        ...

    def poll(self) -> list[Ack]:
        """Acknowledgements since the last call, in order of completion; never blocks."""
        ...

    def cancel(self, ids: set[CopyId]) -> set[CopyId]:
        """Drop those that have not started, and say which: they are never acknowledged. The others still are."""
        ...

    def close(self) -> None:
        """Finish or drop what is under way and let go of threads and memory; nothing may be submitted after."""
        ...


class Clock(Protocol):
    """Time, injected, so that the same loop runs in real and in virtual time."""

    def now(self) -> float:
        """Seconds; monotonic."""
        ...

    def wait(self, until: float | None) -> None:
        """Sleep until `until` (None: no limit) or until somebody calls `notify`, whichever is first."""
        ...

    def notify(self) -> None:
        """Wake the sleeper, now or at its next `wait`; safe from any thread."""
        ...
