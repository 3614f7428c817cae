"""What one API key may ask for: requests and tokens a minute, and streams at a time. OpenAI's headers tell of it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from tfserve.errors import RequestError
from tfserve.http.errors import ApiError, too_many

_CODE = "rate_limit_exceeded"

_STREAM_RETRY_S = 1.0
"""Retry-After for a key with too many streams: when one of them ends is not known."""


class Allowance:
    """A token bucket: it refills at `per_minute`, holds a minute's worth, and may be overdrawn."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = time.monotonic()

    @property
    def level(self) -> float:
        """What may be taken now; negative if overdrawn."""
        now_s = time.monotonic()
        self._level = min(self._level + (now_s - self._at_s) * self.per_minute / 60, float(self.per_minute))
        self._at_s = now_s
        return self._level

    def take(self, amount: float) -> None:
        """Use up `amount`, or overdraw by it."""
        self._level = self.level - amount

    def wait_s(self, level: float) -> float:
        """Seconds until there is `level`; 0 if there is."""
        return max(level - self.level, 0.0) * 60 / self.per_minute


class Limits:
    """The limits of one key (None: no limit) and how far they are used up. Not thread-safe: for the event loop."""

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_streams: int | None = None,
    ) -> None:
        self._requests = None if requests_per_minute is None else Allowance(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else Allowance(tokens_per_minute)
        self._max_streams = max_streams
        self.num_streams = 0

    def on_request(self) -> None:
        """Count a request. Raises ApiError (429) if that is one too many this minute."""
        if self._requests is None:
            return
        if wait_s := self._requests.wait_s(1.0):
            message = f"This key may send {self._requests.per_minute} requests per minute; wait."
            raise too_many(message, _CODE, wait_s)
        self._requests.take(1.0)

    @contextlib.contextmanager
    def streams(self, count: int, num_prompt_tokens: int) -> Iterator[None]:
        """Count `count` streams while they last, and their prompts' tokens.

        Raises ApiError (429) if that is more than the key has left, RequestError if it is more than it may ever have.
        """
        self._check_streams(count)
        self._check_tokens(num_prompt_tokens)
        self.num_streams += count
        self.on_tokens(num_prompt_tokens)
        try:
            yield
        finally:
            self.num_streams -= count

    def on_tokens(self, count: int) -> None:
        """Count tokens, however many are left: an answer's tokens are known only at its end."""
        if self._tokens is not None:
            self._tokens.take(count)

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's headers: what a minute allows, what is left, and the time until all of it is there again."""
        told: dict[str, str] = {}
        for name, allowance in (("requests", self._requests), ("tokens", self._tokens)):
            if allowance is not None:
                told[f"x-ratelimit-limit-{name}"] = str(allowance.per_minute)
                told[f"x-ratelimit-remaining-{name}"] = str(max(math.floor(allowance.level), 0))
                told[f"x-ratelimit-reset-{name}"] = f"{allowance.wait_s(allowance.per_minute):.3f}s"
        return told

    def _check_streams(self, count: int) -> None:
        most = self._max_streams
        if most is None:
            return
        if count > most:
            raise RequestError("n", f"{count} choices are more than the {most} streams that this key may have at once")
        if self.num_streams + count > most:
            message = f"This key may have {most} streams at once, and has {self.num_streams}; wait for one to end."
            raise too_many(message, _CODE, _STREAM_RETRY_S)

    def _check_tokens(self, count: int) -> None:
        if self._tokens is None:
            return
        most = self._tokens.per_minute
        if count > most:
            prompts = f"Prompts of {count} tokens in all, each choice with its own,"
            message = f"{prompts} are more than the {most} per minute that this key has; shorten them."
            raise ApiError(429, message, kind="rate_limit_error", code=_CODE, recurs=True)
        if wait_s := self._tokens.wait_s(float(max(count, 1))):
            raise too_many(f"This key may use {most} tokens per minute, prompts and answers; wait.", _CODE, wait_s)
