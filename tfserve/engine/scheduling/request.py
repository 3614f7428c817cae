"""Request: one generation from arrival to finish, as the scheduler and the loop see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tfserve.engine.scheduling.state import RequestState
from tfserve.model.detokenizer import Detokenizer
from tfserve.packed_logprobs import PackedLogprobs
from tfserve.plan import PromptLogprobs, Row
from tfserve.types import (
    ONE_TENANT,
    ConsumptionRate,
    FinishReason,
    RequestId,
    RequestTimes,
    SamplingParams,
    Tenant,
    TokenLogprob,
)

ResumePath = Literal["load", "recompute"]
"""How a preempted request gets its KV back."""


Finish = tuple[FinishReason, str | int | None]
"""How a request ended, and the stop string or token that ended it."""


@dataclass(slots=True, eq=False)
class Request:
    """`token_ids` are the prompt and then the output, as far as the host knows it.

    `num_in_flight` more tokens are sampled by steps under way. [0, num_computed_tokens) have KV once those steps have
    ended. There is no prefill phase and no decode phase: a request catches num_computed_tokens up with num_tokens.
    `max_tokens` is resolved, never None, and at least 1: a prompt that is only scored ends at its first token, which is
    dropped. `detokenizer` exists only where stop strings must be looked for.
    `rate` is the `consumption_rate` of its reader: tokens/s, a name, or None for no reader; then `priority`
    counts, smaller first. `is_rate_assumed`: the request named none. `stall_s` is None where no rate is known.
    `tenant` is for whom it is served.
    `device_has_token`: the newest token was, or will be, sampled in the row held now, so a step need not send it.
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
    state: RequestState = RequestState.WAITING
    row: Row | None = None
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    device_has_token: bool = False
    num_preemptions: int = 0
    stall_s: float | None = None
    resume: tuple[ResumePath, float] | None = None
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    prompt_logprobs: PackedLogprobs | None = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """Merge the tokens that end this request; make room for log probabilities of the prompt, if wanted."""
        self.prompt_logprobs = None if self.params.prompt_logprobs is None else PackedLogprobs()
        eos = frozenset() if self.params.ignore_eos else self.eos_token_ids
        self.stop_token_ids = eos | frozenset(self.params.stop_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens so far, prompt and output, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far and known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """True when only the newest token lacks KV, and it is not the prompt's own."""
        return self.num_computed_tokens == self.num_tokens - 1 >= self.num_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """True when max_tokens are generated or in flight: nothing is left to compute, whatever they turn out to be."""
        return self.num_tokens - self.num_prompt_tokens >= self.max_tokens

    @property
    def times(self) -> RequestTimes:
        """The request's time stamps, for its outputs."""
        return RequestTimes(
            self.arrival_s,
            self.first_scheduled_s,
            self.first_token_s,
            self.finished_s,
            self.num_preemptions,
            self.stall_s,
        )

    def plan(self, n: int) -> bool:
        """The step being planned computes n more tokens; True if it samples one after them."""
        self.num_computed_tokens += n
        sample = self.num_computed_tokens == self.num_tokens
        self.device_has_token = sample
        self.num_in_flight += sample
        return sample

    def note_prompt(self, scored: PromptLogprobs) -> None:
        """Keep log probabilities of prompt tokens; those that a recomputation brings again are known already."""
        if self.prompt_logprobs is not None:
            known = 1 + len(self.prompt_logprobs) - scored.start
            self.prompt_logprobs.extend(scored.entries[max(known, 0) :])

    def take_prompt_logprobs(self) -> list[TokenLogprob] | None:
        """Log probabilities of the prompt, once: they go with the first token, and are not kept."""
        scored, self.prompt_logprobs = self.prompt_logprobs, None
        return None if scored is None else list(scored)

    def append(self, token: int, now_s: float) -> Finish | None:
        """Take the oldest token in flight; how the request finished with it (and the stop string or token), or None."""
        self.token_ids.append(token)
        self.num_in_flight -= 1
        if self.first_token_s is None:
            self.first_token_s = now_s
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
