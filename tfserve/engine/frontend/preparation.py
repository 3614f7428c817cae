"""Turns the arguments of a call into a message for the core. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from tfserve.engine.frontend.prompts import Prompt, as_prompt
from tfserve.engine.frontend.validation import as_priority, as_rate, check_text, validate
from tfserve.errors import RequestError
from tfserve.messages import AddRequest
from tfserve.model.text.thoughts import first_place
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.types import (
    ONE_TENANT,
    ConsumptionRate,
    EngineInfo,
    Place,
    PromptTokens,
    RequestId,
    SamplingParams,
    Tenant,
)

Conversation = str | Sequence[Mapping[str, Any]]
"""Messages in OpenAI's form, or the text of a single user message."""


class RequestPreparer:
    """Builds validated AddRequests for one engine."""

    def __init__(self, tokenizer: Tokenizer, info: EngineInfo, default_rate: float) -> None:
        self._tokenizer = tokenizer
        self._info = info
        self._default_rate = default_rate

    def message(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        rate: ConsumptionRate | UnsetType,
        request_ids: Sequence[RequestId],
        *,
        priority: int = 0,
        tenant: Tenant = ONE_TENANT,
    ) -> AddRequest:
        """A request for each id, all for one prompt. Raises RequestError with the name of the wrong field."""
        prompt = as_prompt(prompt)
        begins_in = prompt.begins_in if isinstance(prompt, PromptTokens) else None
        if isinstance(prompt, str):
            check_text(self._tokenizer, prompt, self._info)
            prompt = self._tokenizer.encode(prompt)
        token_ids = list(prompt)
        is_rate_assumed = rate is UNSET
        rate = as_rate(self._default_rate if rate is UNSET else rate, self._default_rate)
        priority = as_priority(priority)
        params = validate(token_ids, SamplingParams() if params is None else params, self._info)
        first, *siblings = request_ids
        now_s = time.monotonic()
        return AddRequest(
            first, token_ids, params, now_s, rate, priority, is_rate_assumed, tenant, tuple(siblings), begins_in
        )

    def prompt_of(self, conversation: Conversation, params: SamplingParams | None) -> PromptTokens:
        """The prompt that the chat template makes of a conversation. Raises RequestError."""
        turns = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
        if not isinstance(turns, Sequence) or not turns or not all(map(_is_message, turns)):
            wanted = "text, or a list of messages such as {'role': 'user', 'content': 'Hello'}"
            raise RequestError("messages", f"messages must be {wanted}, got {conversation!r:.200}")
        text = self._tokenizer.apply_chat_template(turns)
        check_text(self._tokenizer, text, self._info)
        # A grammar leaves no room for thoughts.
        thinks = self._tokenizer.thinks and (params is None or params.grammar is None)
        begins_in = first_place(text, None) if thinks else Place.ANSWER
        return PromptTokens(self._tokenizer.encode(text, add_special_tokens=False), begins_in)


def _is_message(turn: object) -> bool:
    return (
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and not {"content", "tool_calls"}.isdisjoint(turn)
    )
