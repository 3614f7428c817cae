"""What the answers of both generation endpoints have in common: their head, and which events carry token counts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import msgspec

from tfserve.http.protocol import UsageWish
from tfserve.http.replies import UNSET, ChatChunk, ChatCompletion, Completion, Usage
from tfserve.http.sse import event
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.types import RequestOutput

T = TypeVar("T")

Body = ChatCompletion | ChatChunk | Completion

_MIN_LOGPROB = -9999.0


class AnswerHead:
    """What every event of an answer repeats: its id (`prefix` and a random part), time and model.

    `wish` says which events carry token counts."""

    def __init__(self, prefix: str, model: str, tokenizer: Tokenizer, wish: UsageWish) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.model = model
        self.created = int(time.time())
        self.tokenizer = tokenizer
        self.wish = wish
        self.encode = msgspec.json.Encoder().encode

    def part(self, value: T) -> T:
        """`value` as JSON that an encoder takes as it is.

        Made of such parts, a large choice keeps the interpreter lock, and memory for its objects, for one part at once.
        """
        return cast(T, msgspec.Raw(self.encode(value)))

    def body(self, kind: type[Body], choices: list[Any], usage: Usage | msgspec.UnsetType | None) -> bytes:
        """JSON of an answer, or of a chunk of it."""
        return self.encode(kind(self.id, self.created, self.model, choices, usage))  # type: ignore[arg-type]

    def whole(self, kind: type[Body], choices: Iterable[Any], usage: Callable[[], Usage]) -> Iterator[bytes]:
        """JSON of an answer in pieces, one for each choice, made when it is asked for; `usage` is known last.

        Joined and sent at once, an answer of 70 MB would hold the event loop for half a second.
        """
        piece = self._around_choices(kind, Usage(0, 0, 0))[0]
        for choice in choices:
            yield piece + self.encode(choice)
            piece = b","
        yield self._around_choices(kind, usage())[1]

    def _around_choices(self, kind: type[Body], usage: Usage) -> tuple[bytes, bytes]:
        before, after = self.body(kind, [self.id], usage).rsplit(self.encode(self.id), 1)
        return before, after

    def event(self, kind: type[Body], choice: Any, usage: Usage) -> bytes:
        """The event of an ordinary chunk; its `usage` is absent unless the client asked, and null before the last."""
        told = {UsageWish.NEVER: UNSET, UsageWish.LAST: None, UsageWish.ALWAYS: usage}[self.wish]
        return event(self.body(kind, [choice], told))

    def usage_event(self, kind: type[Body], usage: Usage) -> bytes:
        """The event with token counts; empty when the client did not ask for it."""
        return b"" if self.wish is UsageWish.NEVER else event(self.body(kind, [], usage))

    def frame(self, kind: type[Body], choice: Any) -> tuple[bytes, bytes]:
        """What surrounds the text in an event of `choice`, whose text is the answer's id."""
        before, after = self.event(kind, choice, Usage(0, 0, 0)).rsplit(self.encode(self.id), 1)
        return before, after

    def token_text(self, token_id: int) -> str:
        """One token for display; what is no whole characters as OpenAI's completions have it: `bytes:\\xf0\\x9f`."""
        raw = self.tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return f"bytes:{repr(raw)[2:-1]}"


def logprob(value: float) -> float:
    """A log probability as JSON can have it: OpenAI's -9999 for what cannot be."""
    return max(_MIN_LOGPROB, value)  # in this order, which makes -9999 of NaN too


def tells_nothing(output: RequestOutput) -> bool:
    """True for an output that a stream need not mention."""
    return not (output.text or output.logprobs or output.prompt_logprobs or output.finished)
