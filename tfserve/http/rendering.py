"""What the words of both generation endpoints have in common: an answer's head, and when it tells token counts."""

from __future__ import annotations

import time
import uuid
from typing import TypeVar, cast

import msgspec

from tfserve.http.ports import TokenizerPort
from tfserve.http.protocol import UsageWish
from tfserve.http.replies import UNSET, Usage
from tfserve.types import RequestOutput

T = TypeVar("T")

_LEAST_LOGPROB = -9999.0


class AnswerHead:
    """Who answers, since when, under which id (`prefix` and a random part), and how often with token counts."""

    def __init__(self, prefix: str, model: str, tokenizer: TokenizerPort, wish: UsageWish) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.model = model
        self.created = int(time.time())
        self.tokenizer = tokenizer
        self.wish = wish
        self.encode = msgspec.json.Encoder().encode

    def part(self, value: T) -> T:
        """`value` as JSON that an encoder takes as it is.

        Made of such parts, a large answer keeps the interpreter lock, and memory for its objects, for one part at once.
        """
        return cast(T, msgspec.Raw(self.encode(value)))

    def chunk_usage(self, usage: Usage) -> Usage | msgspec.UnsetType | None:
        """What an ordinary chunk has for `usage`: absent unless the client asked, null before the last chunk."""
        return {UsageWish.NEVER: UNSET, UsageWish.LAST: None, UsageWish.ALWAYS: usage}[self.wish]

    def token_text(self, token_id: int) -> str:
        """One token for display; what is no whole characters as OpenAI's completions have it: `bytes:\\xf0\\x9f`."""
        raw = self.tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return f"bytes:{repr(raw)[2:-1]}"


def logprob(value: float) -> float:
    """A log probability as JSON can have it: OpenAI's -9999 for what cannot be."""
    return max(_LEAST_LOGPROB, value)  # in this order, which makes -9999 of NaN too


def tells_nothing(output: RequestOutput) -> bool:
    """True for an output that a stream need not mention."""
    return not (output.text or output.logprobs or output.prompt_logprobs or output.finished)
