"""What clients get back: OpenAI's response bodies and stream chunks as Structs."""

from __future__ import annotations

from typing import Literal

import msgspec

UNSET = msgspec.UNSET


class Usage(msgspec.Struct):
    """Token counts of an answer, over all its choices.

    Ours, once it has ended: how often the scheduler interrupted it, when its first token came after its arrival (the
    latest choice's), and how long its reader had nothing to read after that.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
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
    """Log probabilities of a completion choice; `text_offset` counts characters from the start of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None


class Delta(msgspec.Struct, omit_defaults=True):
    """What a chat chunk adds."""

    role: str | msgspec.UnsetType = UNSET
    content: str | msgspec.UnsetType = UNSET


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
    """The model's turn."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


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
