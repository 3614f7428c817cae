"""Validates a request before it reaches the loop. Torch-free."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from tfserve.checked import to_integer, to_number
from tfserve.engine.scheduling.token_buffer import resolve_rate
from tfserve.errors import RequestError
from tfserve.model.grammars.grammar import check_grammar
from tfserve.strict_json import is_text
from tfserve.types import ConsumptionRate, EngineInfo, RequestId, SamplingParams, Tenant


class SupportsExceeds(Protocol):
    """The part of a tokenizer that is used here."""

    def exceeds(self, text: str, most: int) -> bool:
        """See Tokenizer."""
        ...


def validate(prompt: Sequence[int], params: SamplingParams, info: EngineInfo) -> SamplingParams:
    """Params with max_tokens resolved, for a prompt of token ids. Raises RequestError naming the wrong field."""
    if not isinstance(params, SamplingParams):
        fix = "write SamplingParams(**params)" if isinstance(params, Mapping) else "give SamplingParams(...)"
        raise RequestError("params", f"params must be SamplingParams, got {type(params).__name__}; {fix}")
    check_length(len(prompt), info)
    check_tokens(prompt, info.vocab_size)
    if params.grammar is not None:
        check_grammar(params.grammar)
        require_grammars(info, "grammar")
    room = info.max_model_len - len(prompt)
    if params.max_tokens is None:
        params = msgspec.structs.replace(params, max_tokens=room)
    params.verify(info.vocab_size)
    if params.max_tokens is not None and params.max_tokens > room:
        raise RequestError(
            "max_tokens",
            f"{_limit(info)}; prompt ({len(prompt)} tokens) and max_tokens ({params.max_tokens}) exceed it. Shorten the"
            f" prompt or ask for at most {room}",
            "context_length_exceeded",
        )
    return params


def require_grammars(info: EngineInfo, param: str) -> None:
    """Raise RequestError about the field `param` if the model does not support grammars."""
    if not info.grammars:
        message = f"{param}: this model's outputs cannot be held to a grammar; the server's log of its start says why"
        raise RequestError(param, message, "unsupported_parameter")


def check_length(num_tokens: int, info: EngineInfo) -> None:
    """Raise RequestError for a prompt that leaves no room for a token of output. Check this first."""
    if num_tokens >= info.max_model_len:
        raise _too_long(f"{num_tokens} tokens", info)


def check_text(tokenizer: SupportsExceeds, text: str, info: EngineInfo) -> None:
    """Raise RequestError for a prompt that is much too long, before all of it is tokenised."""
    if tokenizer.exceeds(text, info.max_model_len):
        raise _too_long(f"more than {info.max_model_len} tokens", info)


def _too_long(length: str, info: EngineInfo) -> RequestError:
    return RequestError(
        "prompt",
        f"{_limit(info)}; the prompt has {length}, and at least one token of output must fit. Shorten the prompt",
        "context_length_exceeded",
    )


def _limit(info: EngineInfo) -> str:
    """OpenAI's wording: LiteLLM, among others, recognises this error by it and not by its code."""
    return f"This model's maximum context length is {info.max_model_len} tokens"


def check_tokens(prompt: Sequence[int], vocab_size: int, param: str = "prompt") -> None:
    """Raise RequestError about the field `param` unless `prompt` has tokens and all are in the vocabulary."""
    if not prompt:
        raise RequestError(param, "the prompt is empty; it must have at least one token")
    if set(map(type, prompt)) == {int} and min(prompt) >= 0 and max(prompt) < vocab_size:
        return
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(param, f"token id {token!r} is not in the vocabulary [0, {vocab_size})")


def as_rate(rate: Any, default: float) -> ConsumptionRate:
    """A reader's rate as a Python float or "auto". Raises RequestError."""
    if isinstance(rate, str):
        rate = str.__str__(rate)
    elif rate is not None and type(rate) not in (bool, float):
        with contextlib.suppress(TypeError):
            rate = to_number(rate)
    resolve_rate(rate, default)
    return float(rate) if isinstance(rate, float) else rate


def as_priority(priority: Any) -> int:
    """A priority as an int. Raises RequestError."""
    number = to_integer(priority)
    if number is None or not -(2**63) <= number < 2**63:
        raise RequestError("priority", f"priority must be a 64-bit integer, got {priority!r}")
    return number


def check_tenant(tenant: Any) -> None:
    """Raise RequestError unless it is a tenant with a finite weight above 0."""
    is_tenant = isinstance(tenant, Tenant) and isinstance(tenant.name, str) and is_text(tenant.name)
    if not is_tenant or not isinstance(tenant.weight, int | float) or not 0 < tenant.weight < math.inf:
        raise RequestError("tenant", f"tenant must be a Tenant with a name and a weight above 0, got {tenant!r:.200}")


def as_id(request_id: object, reserved: str) -> str:
    """An id that a caller has chosen: text that does not begin with `reserved`. Raises RequestError."""
    is_id = isinstance(request_id, str) and request_id and is_text(request_id)
    if not is_id or str(request_id).startswith(reserved):
        message = (
            f"request_id must be non-empty Unicode text that does not begin with {reserved!r}"
            f" (ids that the engine gives), got {request_id!r}"
        )
        raise RequestError("request_id", message)
    return str.__str__(request_id)  # a subclass of str cannot be encoded in a message to another process


def all_different(ids: list[RequestId]) -> list[RequestId]:
    """The ids of several choices. Raises RequestError if there is none, or one twice."""
    if not ids or len(set(ids)) < len(ids):
        raise RequestError("request_ids", f"request_ids must be one id or more, all different, got {ids!r:.200}")
    return ids


def id_in_use(request_id: RequestId) -> RequestError:
    """The error about an id that another live request has."""
    return RequestError("request_id", f"request id {request_id!r} is in use; give each request its own")


def as_count(value: Any, param: str) -> int:
    """A number of tokens as an int, clamped to 64 bits. Raises RequestError."""
    number = to_integer(value)
    if number is None:
        raise RequestError(param, f"{param} must be an integer, got {value!r}")
    return min(max(number, 0), 2**63 - 1)
