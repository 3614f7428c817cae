"""Request: one generation from arrival to finish, as the scheduler and the loop see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tfserve.engine.scheduling.reasons import Reason
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.table import RowRef
from tfserve.model.text.detokenizer import Detokenizer
from tfserve.model.text.thoughts import ThoughtCounter
from tfserve.packed_logprobs import PackedLogprobs
from tfserve.plan import PromptLogprobs, SlotId
from tfserve.types import (
    ONE_TENANT,
    ConsumptionRate,
    FinishReason,
    RequestId,
    SamplingParams,
    Tenant,
    TokenLogprob,
)

ResumePath = Literal["load", "recompute"]
"""How a preempted request gets its KV back."""


Finish = tuple[FinishReason, str | int | None]
"""How a request ended, and the stop string or token that ended it."""


_STATES = tuple(RequestState)  # indexing it is five times faster than RequestState(value)


@dataclass(slots=True, eq=False)
class Request:
    """`token_ids` are the prompt and then the output, as far as the host knows it.

    What is counted about a request is in its row of the RequestTable, which it finds by `entry` from when it is queued
    to its end. `num_in_flight` more tokens are sampled by steps under way. [0, num_computed_tokens) have KV once those
    steps have ended. There is no prefill phase and no decode phase: a request catches num_computed_tokens up with
    num_tokens.
    `max_tokens` is resolved, never None, and at least 1: a prompt that is only scored ends at its first token, which is
    dropped. `detokenizer` exists only where stop strings must be looked for, `thoughts` where the model may think.
    `rate` is the `consumption_rate` of its reader: tokens/s, a name, or None for no reader; then `priority`
    counts, smaller first. `is_rate_assumed`: the request named none.
    `tenant` is for whom it is served.
    `device_has_token`: the newest token was, or will be, sampled in the slot held now, so a step need not send it.
    `reason` is why the request is in its state; None while it has only been let in.
    `resume` is set from the decision to bring a preempted request back until its next token: by which path, since when.
    """

    id: RequestId
    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    seed: int
    arrival_s: float
    eos_token_ids: frozenset[int]
    rate: ConsumptionRate = None
    is_rate_assumed: bool = False
    priority: int = 0
    tenant: Tenant = ONE_TENANT
    detokenizer: Detokenizer | None = None
    thoughts: ThoughtCounter | None = None
    entry: RowRef = field(init=False)
    slot: SlotId | None = None
    is_finished: bool = False
    device_has_token: bool = False
    resume: tuple[ResumePath, float] | None = None
    reason: Reason | None = None
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    prompt_logprobs: PackedLogprobs | None = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """Merge the tokens that end this request; make room for log probabilities of the prompt, if wanted."""
        self.prompt_logprobs = None if self.params.prompt_logprobs is None else PackedLogprobs()
        eos = frozenset() if self.params.ignore_eos else self.eos_token_ids
        self.stop_token_ids = eos | frozenset(self.params.stop_token_ids)

    @property
    def state(self) -> RequestState:
        """Where it is."""
        return RequestState.FINISHED if self.is_finished else _STATES[self.entry.table.state[self.entry.index]]

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that have KV, or will have once the steps under way have ended."""
        return self.entry.table.num_computed[self.entry.index]

    @property
    def num_in_flight(self) -> int:
        """Tokens sampled by steps under way."""
        return self.entry.table.num_in_flight[self.entry.index]

    @property
    def num_preemptions(self) -> int:
        """How often it was taken off the device."""
        return self.entry.table.num_preemptions[self.entry.index]

    @property
    def num_tokens(self) -> int:
        """Tokens so far, prompt and output, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far and known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_thoughts(self) -> int:
        """Tokens that are known to be thoughts."""
        return 0 if self.thoughts is None else self.thoughts.num_tokens

    @property
    def is_decoding(self) -> bool:
        """True when only the newest token lacks KV, and it is not the prompt's own."""
        table, row = self.entry.table, self.entry.index  # asked of every running request before every step
        last = len(self.token_ids) + table.num_in_flight[row] - 1
        return table.num_computed[row] == last >= self.num_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """True when max_tokens are generated or in flight: nothing is left to compute, whatever they turn out to be."""
        return self.num_tokens - self.num_prompt_tokens >= self.max_tokens

    def plan(self) -> bool:
        """The step being planned computes up to num_computed_tokens; True if it samples a token after them."""
        self.device_has_token = self.num_computed_tokens == self.num_tokens
        return self.device_has_token

    def note_prompt(self, scored: PromptLogprobs) -> None:
        """Keep log probabilities of prompt tokens; what a recompute brings again is known already."""
        if self.prompt_logprobs is not None:
            known = 1 + len(self.prompt_logprobs) - scored.start
            self.prompt_logprobs.extend(scored.entries[max(known, 0) :])

    def take_prompt_logprobs(self) -> list[TokenLogprob] | None:
        """Log probabilities of the prompt, once: they go with the first token, and are not kept."""
        scored, self.prompt_logprobs = self.prompt_logprobs, None
        return None if scored is None else list(scored)

    def append(self, token: int) -> Finish | None:
        """Take the next token; how the request finished with it and what stop string or token ended it, or None."""
        self.token_ids.append(token)
        if token in self.stop_token_ids and self.num_output_tokens >= self.params.min_tokens:
            own = token in self.params.stop_token_ids
            return FinishReason.STOP, token if own else None
        if self.detokenizer is not None:
            self.detokenizer.push((token,))
            if self.detokenizer.stopped is not None:
                return FinishReason.STOP, self.detokenizer.stopped
        if self.num_output_tokens >= self.max_tokens:
            return FinishReason.LENGTH, None
        return None
