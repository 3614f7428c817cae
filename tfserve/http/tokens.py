"""POST /tokenize and POST /detokenize, as in vLLM's server."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web

from tfserve.engine.frontend.validation import check_tokens
from tfserve.errors import RequestError
from tfserve.http.chat_prompt import TemplateVariables, chat_prompt
from tfserve.http.known_fields import TOKENIZE_FIELDS
from tfserve.http.messages import Messages
from tfserve.http.off_loop import ENCODING, native_off_loop, off_loop
from tfserve.http.parsing import BodyParser
from tfserve.http.protocol import TokenId
from tfserve.http.reading import ASKED_ERRORS, asked_of
from tfserve.http.replies import json_response
from tfserve.http.route import Route, register
from tfserve.http.service import SERVICE
from tfserve.http.tools import ToolChoice, ToolPlan, Tools
from tfserve.model.text.tokenizer import Tokenizer

MAX_TOKENIZE_CHARS = 1_000_000
"""Most characters of a text for /tokenize, unless the model takes longer ones."""

_CHARS_PER_TOKEN = 8


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: a `prompt`, or the `messages` of a chat, which the model's template makes a prompt of.

    `add_special_tokens` is true for a prompt and false for messages unless given: templates write special tokens. The
    last six fields go with messages, and mean what they mean in a chat.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: str | None = None


class TokenizeReply(msgspec.Struct):
    """Body of an answer to POST /tokenize; `token_strs` are for display (part of a character is U+FFFD)."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize. Special tokens are text unless they are skipped."""

    tokens: list[TokenId]
    model: str | None = None
    skip_special_tokens: bool | None = None


class DetokenizeReply(msgspec.Struct):
    """Body of an answer to POST /detokenize: the text of the tokens."""

    prompt: str


_TOKENIZE = BodyParser(TokenizeRequest, TOKENIZE_FIELDS)
_DETOKENIZE = BodyParser(DetokenizeRequest, {})


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize. Raises ApiError, RequestError."""
    async with asked_of(request, _TOKENIZE) as (asked, size):
        engine = request.app[SERVICE].engine
        text, special = await _text(asked, size, engine.tokenizer)
        limit = max(MAX_TOKENIZE_CHARS, _CHARS_PER_TOKEN * engine.info.max_model_len)
        if len(text) > limit:
            name = "prompt" if asked.messages is None else "messages"
            raise RequestError(name, f"{name}: the text has {len(text)} characters; send at most {limit} at once")
        tokens = await native_off_loop(ENCODING * len(text), engine.tokenizer.encode, text, special)
        reply = TokenizeReply(len(tokens), engine.info.max_model_len, tokens)
        if asked.return_token_strs:
            reply.token_strs = await off_loop(len(tokens), _shown, engine.tokenizer, tokens)
        return json_response(reply)


async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize. Raises ApiError, RequestError."""
    engine = request.app[SERVICE].engine
    async with asked_of(request, _DETOKENIZE) as (asked, _):
        tokens, limit = asked.tokens, engine.info.max_model_len
        if len(tokens) > limit:
            message = f"tokens: {len(tokens)} tokens are more than a text of this model has; send at most {limit}"
            raise RequestError("tokens", message)
        if tokens:
            check_tokens(tokens, engine.info.vocab_size, "tokens")
        skips = bool(asked.skip_special_tokens)
        return json_response(DetokenizeReply(await off_loop(len(tokens), engine.tokenizer.decode, tokens, skips)))


async def _text(asked: TokenizeRequest, size: int, tokenizer: Tokenizer) -> tuple[str, bool]:
    """What to tokenise, of a body of `size` bytes, and whether special tokens are added. Raises RequestError."""
    if (asked.prompt is None) == (asked.messages is None):
        raise RequestError("prompt", "send either a prompt or messages")
    if asked.messages is None:
        return _plain_text(asked), asked.add_special_tokens is not False
    tools = ToolPlan(asked.tools, asked.tool_choice, True, tokenizer.tool_format)
    await tools.measure()
    text = await off_loop(size, chat_prompt, tokenizer, asked.messages, asked, tools.for_template)
    return text, bool(asked.add_special_tokens)


def _shown(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    return [tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]


def _plain_text(asked: TokenizeRequest) -> str:
    """The prompt as it is. Raises RequestError for a field that only messages have."""
    for name in ("tools", "tool_choice", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
        if getattr(asked, name) not in (None, False, "none", "auto", [], {}):
            raise RequestError(name, f"{name} goes with messages, not with a prompt; remove it")
    return asked.prompt or ""


register(
    Route(
        "POST",
        "/tokenize",
        tokenize,
        "The token ids of a text or a conversation",
        TokenizeReply,
        TokenizeRequest,
        errors=ASKED_ERRORS,
    ),
    Route(
        "POST",
        "/detokenize",
        detokenize,
        "The text of token ids",
        DetokenizeReply,
        DetokenizeRequest,
        errors=ASKED_ERRORS,
    ),
)
