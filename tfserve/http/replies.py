"""What clients get back: OpenAI's response bodies and stream chunks as Structs."""

from __future__ import annotations

from typing import Literal

import msgspec
from aiohttp import web

from tfserve.http.errors import JSON
from tfserve.types import EngineStats

UNSET = msgspec.UNSET


def json_response(body: msgspec.Struct, status: int = 200) -> web.Response:
    """A Struct as a whole answer."""
    return web.Response(status=status, body=msgspec.json.encode(body), content_type=JSON)


class PromptTokensDetails(msgspec.Struct):
    """`cached_tokens` are prompt tokens whose KV was there already: none, because requests share no KV."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """`reasoning_tokens` are those of the thoughts before the answers, their tags included."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """Token counts of an answer, over all its choices; a prompt counts once, however many choices it has.

    `completion_tokens_details` are those of a chat whose model parts its thoughts from its answers.

    Ours, once it has ended: how often the scheduler interrupted it, when its first token came after its arrival (the
    latest choice's), and how long its reader had nothing to read after that.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = msgspec.field(default_factory=PromptTokensDetails)
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = UNSET
    num_preemptions: int | msgspec.UnsetType = UNSET
    ttft_s: float | msgspec.UnsetType = UNSET
    stall_s: float | msgspec.UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """One token and its natural-log probability; `bytes` are exact where `token` had to be patched up."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    """A generated token with the most likely alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log probabilities of a chat choice."""

    content: list[ChatTokenLogprob]


class CompletionLogprobs(msgspec.Struct):
    """Log probabilities of a completion choice; `text_offset` counts characters from the start of the choice's text.

    The first token of an echoed prompt has none: nothing predicts it.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class FunctionCallReply(msgspec.Struct):
    """The function that the model calls; `arguments` is the JSON of an object."""

    name: str
    arguments: str


class ToolCallReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One tool call, whole; `index` is its place among the calls of a choice, in a stream."""

    index: int | msgspec.UnsetType = UNSET
    id: str
    type: Literal["function"]
    function: FunctionCallReply


class Delta(msgspec.Struct, omit_defaults=True):
    """What a chat chunk adds. A tool call comes in one piece."""

    role: str | msgspec.UnsetType = UNSET
    content: str | msgspec.UnsetType = UNSET
    reasoning_content: str | msgspec.UnsetType = UNSET
    tool_calls: list[ToolCallReply] | msgspec.UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """One choice's part of a chat chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct):
    """A chunk of a streamed chat answer. `usage` is null in all but the last chunk when asked for, else left out."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class AssistantMessage(msgspec.Struct):
    """The model's turn; `content` is null where it only calls tools, or has not come further than its thoughts."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = UNSET
    tool_calls: list[ToolCallReply] | msgspec.UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """A whole chat answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct):
    """Body of a chat answer that is not streamed."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class CompletionChoice(msgspec.Struct):
    """One choice of a completion, whole or a chunk of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """A completion, whole or a chunk of it (OpenAI gives both the same name)."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class ModelCard(msgspec.Struct):
    """A model that this server serves; `max_model_len` is the context length in tokens."""

    id: str
    created: int
    max_model_len: int
    owned_by: str = "tfserve"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct):
    """Body of GET /v1/models."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Status(msgspec.Struct):
    """Body of GET /health and GET /ready: the server's phase, or what is wrong; and a living engine's counts."""

    status: str
    engine: EngineStats | msgspec.UnsetType = UNSET


class Version(msgspec.Struct):
    """Body of GET /version."""

    version: str
