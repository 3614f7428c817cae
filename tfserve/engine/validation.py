"""Everything that can be wrong with a request, found before it reaches the loop. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tfserve.errors import RequestError
from tfserve.misfit import Misfit, find_misfit
from tfserve.model.grammar import check_grammar
from tfserve.types import EngineInfo, SamplingParams


def validate(prompt: Sequence[int], params: SamplingParams, info: EngineInfo) -> SamplingParams:
    """Params with max_tokens resolved, for a prompt of token ids. Raises RequestError naming the field at fault."""
    try:
        # An embedding user's Struct was never type-checked; a server's was, and passes unchanged.
        params = msgspec.convert(msgspec.to_builtins(params), SamplingParams)
    except msgspec.ValidationError:
        misfit = find_misfit(msgspec.to_builtins(params), SamplingParams)
        wrong = misfit or Misfit("params", "must be a SamplingParams whose fields have their types")
        raise RequestError(wrong.path, str(wrong)) from None
    except TypeError:
        raise RequestError("params", "params must be a SamplingParams of numbers, text, lists and mappings") from None
    check_tokens(prompt, info.vocab_size)
    if params.grammar is not None:
        check_grammar(params.grammar)
        if not info.grammars:
            raise RequestError("grammar", "this model's outputs cannot be held to a grammar; the server's log says why")
    room = info.max_model_len - len(prompt)
    if params.max_tokens is None and room >= 1:
        params = msgspec.structs.replace(params, max_tokens=room)
    params.verify(info.vocab_size)
    if room < 1:
        raise RequestError(
            "prompt",
            f"{_limit(info)}; the prompt has {len(prompt)} tokens, and at least one token of output must fit. Shorten"
            " the prompt",
            "context_length_exceeded",
        )
    if params.max_tokens is not None and params.max_tokens > room:
        raise RequestError(
            "max_tokens",
            f"{_limit(info)}; prompt ({len(prompt)} tokens) and max_tokens ({params.max_tokens}) exceed it. Shorten the"
            f" prompt or ask for at most {room}",
            "context_length_exceeded",
        )
    return params


def _limit(info: EngineInfo) -> str:
    """OpenAI's words: LiteLLM, among others, knows this error by them and not by its code."""
    return f"This model's maximum context length is {info.max_model_len} tokens"


def check_tokens(prompt: Sequence[int], vocab_size: int, param: str = "prompt") -> None:
    """Raise RequestError about the field `param` unless `prompt` has tokens and all are in the vocabulary."""
    if not prompt:
        raise RequestError("prompt", "the prompt is empty; it must have at least one token")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(param, f"token id {token!r} is not in the vocabulary [0, {vocab_size})")
