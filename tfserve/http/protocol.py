"""What clients may send: OpenAI's request bodies as Structs, with our own fields beside theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from tfserve.errors import RequestError
from tfserve.types import MAX_LOGPROBS, ConsumptionRate, SamplingParams

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer that fits the engine's messages."""

MAX_STOP = 64
"""Most stop strings or stop token ids of a request: each costs time at every token."""

MAX_PROMPTS = 256
"""Most prompts of one completion request: all are tokenised before the queue can refuse any."""

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; chat has none but the context length."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """Extras of a streamed answer; `include_usage` adds a last chunk with token counts."""

    include_usage: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields that chat and plain completions share. None means the default, as does leaving the field out.

    The lines after `stop` are ours; their names are vLLM's, but for `consumption_rate`: how fast the reader reads, in
    tokens/s or by name. There, null means that nobody reads along.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Int] | None = None
    skip_special_tokens: bool | None = None
    consumption_rate: ConsumptionRate | msgspec.UnsetType = msgspec.UNSET

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk. Raises RequestError when the answer is not streamed at all."""
        wanted = self.stream_options is not None and bool(self.stream_options.include_usage)
        if wanted and not self.stream:
            raise RequestError("stream_options", "stream_options.include_usage needs stream to be true")
        return wanted

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's parameters. The engine checks the values; here only what it could not name is checked."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        for name, entries in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if entries is not None and len(entries) > MAX_STOP:
                raise RequestError(name, f"{name} must have at most {MAX_STOP} entries, got {len(entries)}")
        given: dict[str, Any] = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if stop:
            given["stop"] = tuple(stop)
        if self.stop_token_ids:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)


_SAMPLING_FIELDS = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if name in GenerationRequest.__struct_fields__ and name not in {"max_tokens", "stop", "stop_token_ids"}
)


class ContentPart(msgspec.Struct, kw_only=True):
    """A piece of a message; only text can be served."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One turn of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[msgspec.Raw] | None = None

    def for_template(self, index: int) -> dict[str, Any]:
        """The message as chat templates expect it: a role they know and plain text. Raises RequestError."""
        where = f"messages[{index}]"
        role = "system" if self.role == "developer" else self.role
        if role not in {"system", "user", "assistant"}:
            raise RequestError(f"{where}.role", f"{where}.role must be system, user or assistant, got {self.role!r}")
        if self.tool_calls:
            raise RequestError(f"{where}.tool_calls", f"{where}.tool_calls: tool calls are not supported; remove them")
        if self.content is None and role != "assistant":
            raise RequestError(f"{where}.content", f"{where}.content is required for the role {self.role}")
        if self.content is None or isinstance(self.content, str):
            return {"role": role, "content": self.content or ""}
        for number, part in enumerate(self.content):
            if part.type != "text" or part.text is None:
                here = f"{where}.content[{number}]"
                raise RequestError(here, f"{here} must be {{'type': 'text', 'text': ...}}, got type {part.type!r}")
        return {"role": role, "content": "".join(part.text or "" for part in self.content)}


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages for the chat template. Raises RequestError naming the message that cannot be served."""
        if not self.messages:
            raise RequestError("messages", "messages must hold at least one message")
        return [message.for_template(index) for index, message in enumerate(self.messages)]

    def sampling_params(self) -> SamplingParams:
        """Parameters for the engine. Raises RequestError in this endpoint's own field names."""
        top = self.top_logprobs
        if top and not self.logprobs:
            raise RequestError("top_logprobs", "top_logprobs needs logprobs to be true")
        if top is not None and not 0 <= top <= MAX_LOGPROBS:
            raise RequestError("top_logprobs", f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {top}")
        newer = self.max_completion_tokens
        if newer is not None and newer < 1:
            message = f"max_completion_tokens must be an integer of at least 1, got {newer}"
            raise RequestError("max_completion_tokens", message)
        max_tokens = self.max_tokens if newer is None else newer
        return self.sampling(max_tokens, (top or 0) if self.logprobs else None)


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/completions. `prompt` is a string, token ids, or a list of either."""

    prompt: str | list[str | Int | list[Int]]
    logprobs: Int | None = None

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, one per answer. Raises RequestError for an empty or mixed list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        texts = [item for item in self.prompt if isinstance(item, str)]
        lists = [item for item in self.prompt if isinstance(item, list)]
        if not self.prompt or max(len(tokens), len(texts), len(lists)) < len(self.prompt):
            meaning = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
            raise RequestError("prompt", f"prompt must be {meaning}; it must not be empty and not mix them")
        if len(texts) > MAX_PROMPTS or len(lists) > MAX_PROMPTS:
            raise RequestError("prompt", f"{len(self.prompt)} prompts in one request; send at most {MAX_PROMPTS}")
        return [tokens] if tokens else texts or lists

    def sampling_params(self) -> SamplingParams:
        """Parameters for the engine. Raises RequestError."""
        max_tokens = COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling(max_tokens, self.logprobs)
