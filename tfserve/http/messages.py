"""The messages of a chat: what clients send, and what a model's chat template is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from tfserve import strict_json
from tfserve.errors import RequestError
from tfserve.http.documented import documented
from tfserve.http.parts import MAX_PARTS, num_parts

MAX_MESSAGES = 2048
"""Most messages of one request (OpenAI's limit)."""

_ROLES = ("system", "user", "assistant", "tool")


class ContentPart(msgspec.Struct, kw_only=True):
    """A piece of a message; only text can be served, and what an assistant refused with."""

    type: str
    text: str | None = None
    refusal: str | None = None

    def shown(self, role: str) -> str | None:
        """The text that a model is shown; None if this is no text."""
        if self.type == "refusal" and role == "assistant":
            return self.refusal
        return self.text if self.type == "text" else None


class FunctionCall(msgspec.Struct, kw_only=True):
    """A call that the model made earlier; `arguments` is the JSON of an object."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A tool call of an earlier turn."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, kw_only=True):
    """One turn of a conversation. The chat template decides what becomes of a `name` and of thoughts.

    `reasoning` is vLLM's word for `reasoning_content`. A `refusal` is what the assistant said instead of a content.
    """

    role: Annotated[str, documented(enum=["system", "developer", "user", "assistant", "tool"])]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self, index: int) -> dict[str, Any]:
        """The message as chat templates expect it: a role they know and plain text. Raises RequestError."""
        where = f"messages[{index}]"
        role = "system" if self.role == "developer" else self.role
        if role not in _ROLES:
            message = f"{where}.role must be system, user, assistant or tool, got {self.role[:100]!r}"
            raise RequestError(f"{where}.role", message)
        turn: dict[str, Any] = {"role": role, "content": self._text(where)}
        if self.tool_calls:
            if role != "assistant":
                raise RequestError(f"{where}.tool_calls", f"{where}.tool_calls: only the assistant calls tools")
            turn["tool_calls"] = [
                _call_for_template(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(self.tool_calls)
            ]
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        extras = {"tool_call_id": self.tool_call_id, "name": self.name, "reasoning_content": reasoning}
        return turn | {name: value for name, value in extras.items() if value is not None}

    def _text(self, where: str) -> str:
        if self.refusal and (self.content or self.role != "assistant"):
            message = f"{where}.refusal: only the assistant refuses, and without a content; put the text into content"
            raise RequestError(f"{where}.refusal", message)
        if self.content is None:
            if self.role != "assistant":
                raise RequestError(f"{where}.content", f"{where}.content is required for the role {self.role}")
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content or self.refusal or ""
        texts = [part.shown(self.role) for part in self.content]
        for number, text in enumerate(texts):
            if text is None:
                here = f"{where}.content[{number}]"
                kind = self.content[number].type[:100]
                raise RequestError(here, f"{here} must be {{'type': 'text', 'text': ...}}, got type {kind!r}")
        return "".join(text or "" for text in texts) or self.refusal or ""


Messages = Annotated[list[ChatMessage], msgspec.Meta(max_length=MAX_MESSAGES), documented(minItems=1)]


def conversation(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages for the chat template. Raises RequestError naming the message that cannot be served."""
    if not messages:
        raise RequestError("messages", "messages must hold at least one message")
    return [message.for_template(index) for index, message in enumerate(messages)]


def _call_for_template(call: ToolCall, where: str) -> dict[str, Any]:
    """Templates print the arguments as JSON themselves, so they get the object."""
    name = f"{where}.function.arguments"
    text = call.function.arguments or "{}"
    if num_parts(text.encode(errors="replace"), MAX_PARTS) > MAX_PARTS:
        raise RequestError(name, f"{name} holds more than {MAX_PARTS} objects, lists and fields; send fewer")
    try:
        arguments = strict_json.loads(text)
    except ValueError as error:
        raise RequestError(name, f"{name} is not valid JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise RequestError(name, f"{name} must be the JSON of an object")
    turn: dict[str, Any] = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return turn if call.id is None else {**turn, "id": call.id}
