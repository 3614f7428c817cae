"""POST /tokenize and POST /detokenize: what vLLM's server calls by these names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from tfserve.engine.frontend.validation import check_tokens
from tfserve.errors import RequestError
from tfserve.http.answer import read_body
from tfserve.http.bodies import BodyHold
from tfserve.http.chat_prompt import chat_prompt
from tfserve.http.errors import JSON
from tfserve.http.keys import CALLER
from tfserve.http.known_fields import TOKENIZE_FIELDS
from tfserve.http.messages import Messages
from tfserve.http.off_loop import ENCODING, native_off_loop, off_loop
from tfserve.http.parsing import BodyParser
from tfserve.http.ports import TokenizerPort
from tfserve.http.protocol import Int
from tfserve.http.service import Service
from tfserve.http.tools import NamedToolChoice, Tool, ToolPlan

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
    tools: list[Tool] | None = None
    tool_choice: str | NamedToolChoice | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class TokenizeReply(msgspec.Struct):
    """Body of an answer to POST /tokenize; `token_strs` are for display (part of a character is U+FFFD)."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize. Special tokens are text unless they are skipped."""

    tokens: list[Int]
    model: str | None = None
    skip_special_tokens: bool | None = None


class DetokenizeReply(msgspec.Struct):
    """Body of an answer to POST /detokenize: the text of the tokens."""

    prompt: str


class TokenEndpoints:
    """Answers questions about tokens with a Service's tokenizer."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tokenize = BodyParser(TokenizeRequest, TOKENIZE_FIELDS)
        self._detokenize = BodyParser(DetokenizeRequest, {})

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize. Raises ApiError, RequestError."""
        with self._service.bodies.hold() as hold:
            body = await self._body(request, hold)
            asked = await off_loop(len(body), self._tokenize.parse, body)
            return await self._tokens(asked, len(body))

    async def _tokens(self, asked: TokenizeRequest, size: int) -> web.Response:
        engine = self._service.engine
        self._service.check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise RequestError("prompt", "send either a prompt or messages")
        if asked.messages is None:
            text, special = _plain_text(asked), asked.add_special_tokens is not False
        else:
            tools = ToolPlan(asked.tools, asked.tool_choice, True, engine.tokenizer.tool_format)
            await tools.measure()
            text = await off_loop(size, chat_prompt, engine.tokenizer, asked.messages, asked, tools.for_template)
            special = bool(asked.add_special_tokens)
        limit = max(MAX_TOKENIZE_CHARS, _CHARS_PER_TOKEN * engine.info.max_model_len)
        if len(text) > limit:
            name = "prompt" if asked.messages is None else "messages"
            raise RequestError(name, f"{name}: the text has {len(text)} characters; send at most {limit} at once")
        tokens = await native_off_loop(ENCODING * len(text), engine.tokenizer.encode, text, special)
        reply = TokenizeReply(len(tokens), engine.info.max_model_len, tokens)
        if asked.return_token_strs:
            reply.token_strs = await off_loop(len(tokens), _shown, engine.tokenizer, tokens)
        return web.Response(body=msgspec.json.encode(reply), content_type=JSON)

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize. Raises ApiError, RequestError."""
        engine = self._service.engine
        with self._service.bodies.hold() as hold:
            body = await self._body(request, hold)
            asked = await off_loop(len(body), self._detokenize.parse, body)
        self._service.check_model(asked.model)
        limit = engine.info.max_model_len
        if len(asked.tokens) > limit:
            message = f"tokens: {len(asked.tokens)} tokens are more than a text of this model has; send at most {limit}"
            raise RequestError("tokens", message)
        if asked.tokens:
            check_tokens(asked.tokens, engine.info.vocab_size, "tokens")
        skips = bool(asked.skip_special_tokens)
        text = await off_loop(len(asked.tokens), engine.tokenizer.decode, asked.tokens, skips)
        reply = DetokenizeReply(text)
        return web.Response(body=msgspec.json.encode(reply), content_type=JSON)

    async def _body(self, request: web.Request, hold: BodyHold) -> bytes:
        request[CALLER].limits.on_request()
        return await read_body(request, self._service.config.server.max_body_bytes, hold)


def _shown(tokenizer: TokenizerPort, tokens: Sequence[int]) -> list[str]:
    return [tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]


def _plain_text(asked: TokenizeRequest) -> str:
    """The prompt as it is. Raises RequestError for a field that only messages have."""
    for name in ("tools", "tool_choice", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
        if getattr(asked, name) not in (None, False, "none", "auto", [], {}):
            raise RequestError(name, f"{name} goes with messages, not with a prompt; remove it")
    return asked.prompt or ""
