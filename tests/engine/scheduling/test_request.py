"""The state that a request keeps when its prompt is computed more than once."""

from __future__ import annotations

from tfserve.engine.scheduling.request import Request
from tfserve.plan import PromptLogprobs
from tfserve.types import SamplingParams, TokenLogprob


def scored(start: int, end: int) -> PromptLogprobs:
    return PromptLogprobs("r", start, tuple(TokenLogprob(token, -float(token)) for token in range(start, end)))


def test_a_prompt_computed_again_is_scored_once():
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    request = Request("r", params, list(range(9)), 9, 1, seed=0, arrival_s=0.0, eos_token_ids=frozenset())
    for part in (scored(1, 4), scored(4, 6), scored(1, 3), scored(3, 8), scored(8, 9)):
        request.note_prompt(part)
    assert [entry.token_id for entry in request.take_prompt_logprobs()] == list(range(1, 9))


def test_scores_of_a_prompt_that_were_taken_are_not_kept_again():
    params = SamplingParams(max_tokens=9, prompt_logprobs=0)
    request = Request("r", params, list(range(4)), 4, 9, seed=0, arrival_s=0.0, eos_token_ids=frozenset())
    request.note_prompt(scored(1, 4))
    assert len(request.take_prompt_logprobs()) == 3
    request.note_prompt(scored(1, 4))  # a preemption has the prompt computed again
    assert request.take_prompt_logprobs() is None
