"""One streaming request to any OpenAI-compatible server, time-stamped chunk by chunk.

What is known about a token's arrival: all tokens of an SSE chunk arrive when the chunk does. A chunk is taken to hold
one token unless the server sends a running `usage.completion_tokens` with each chunk, which tells exactly. When the
final usage counts more tokens than the chunks did (held-back UTF-8, tokens without text, several tokens a chunk), the
rest are `unplaced`: they count in totals and throughput, and no arrival time is made up for them.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from typing import Any, Literal

import aiohttp
import msgspec

from tfserve.bench.workload import Work
from tfserve.errors import NOT_JSON, TfserveError
from tfserve.misfit import why_not_json

Endpoint = Literal["chat", "completions"]

_PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_TEXT_FIELDS = ("content", "reasoning_content", "reasoning")
_DETAIL_CHARS = 300
_LISTING_S = 30.0
_MOST_TOKENS = 1_000_000


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The server and what every request to it has in common; `base_url` with or without a trailing /v1."""

    base_url: str
    model: str
    endpoint: Endpoint = "chat"
    temperature: float = 0.0
    ignore_eos: bool = False

    @property
    def url(self) -> str:
        """Where requests are posted."""
        return server_root(self.base_url) + _PATHS[self.endpoint]

    def body(self, work: Work) -> dict[str, Any]:
        """The request's JSON. `ignore_eos` and `consumption_rate` are not OpenAI's: sent only when asked for."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": work.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": work.prompt}]
        else:
            body["prompt"] = work.prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        if work.rate is not None:
            body["consumption_rate"] = work.rate
        return body


class RequestRecord(msgspec.Struct, kw_only=True):
    """What one request saw. Times in seconds since the run began.

    `chunks` holds (time, tokens) per SSE chunk that carried text. `prompt_tokens`, `output_tokens` and
    `num_preemptions` are the server's usage, None where it gave none. `rate`, tokens/s, is what it is scored at.
    `error` is the kind of failure, None for a request that completed.
    """

    index: int
    arrival_s: float
    rate: float | None = None
    sent_s: float = 0.0
    end_s: float = 0.0
    chunks: list[tuple[float, int]] = []
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    num_preemptions: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    error_detail: str | None = None

    @property
    def placed_tokens(self) -> int:
        """Tokens whose arrival time is known."""
        return sum(n for _, n in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Output tokens by usage, else by counting chunks."""
        return self.placed_tokens if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first chunk with text; None without one."""
        return self.chunks[0][0] - self.sent_s if self.chunks else None

    @property
    def gaps_s(self) -> list[float]:
        """Times between one chunk with text and the next."""
        return [later - sooner for (sooner, _), (later, _) in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first chunk, whatever the chunking; None for fewer than two chunks."""
        rest = self.num_tokens - self.chunks[0][1] if self.chunks else 0
        return (self.chunks[-1][0] - self.chunks[0][0]) / rest if len(self.chunks) > 1 and rest > 0 else None


class SseParser:
    """Cuts a byte stream into the payloads of server-sent events, wherever the network cut it."""

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> Iterator[bytes]:
        """Yield the payload of each event that `received` completes."""
        *lines, self._tail = (self._tail + received).split(b"\n")
        for line in lines:
            yield from self._line(line.removesuffix(b"\r"))

    def close(self) -> Iterator[bytes]:
        """Yield what an ending without a blank line left over: some servers forget the last one."""
        yield from self._line(self._tail.removesuffix(b"\r"))
        yield from self._line(b"")

    def _line(self, line: bytes) -> Iterator[bytes]:
        if not line:
            if self._data:
                yield b"\n".join(self._data)
                self._data = []
            return
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))


class _StreamError(Exception):
    """A stream that broke its promise; `kind` is what the report counts it as."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class StreamClient:
    """Sends streaming requests to one target. The clock starts with it: all recorded times count from then."""

    def __init__(self, session: aiohttp.ClientSession, target: Target) -> None:
        self._session = session
        self._target = target
        self._origin = time.perf_counter()

    def now(self) -> float:
        """Seconds since the run began, to the microsecond: records of many chunks stay small."""
        return round(time.perf_counter() - self._origin, 6)

    async def send(self, record: RequestRecord, work: Work) -> None:
        """Send one request now and fill `record` with what came back; a failure of any kind ends up in it too."""
        record.sent_s = self.now()
        try:
            async with self._session.post(self._target.url, json=self._target.body(work)) as response:
                if response.status != 200:
                    raise _StreamError(f"http_{response.status}", (await response.read()).decode(errors="replace"))
                await self._read(response, record)
        except _StreamError as error:
            _fail(record, error.kind, str(error))
        except TimeoutError:
            _fail(record, "timeout", "no complete answer within the time allowed")
        except aiohttp.ClientConnectorError as error:
            _fail(record, "connect", str(error))
        except (aiohttp.ClientError, OSError) as error:
            _fail(record, "disconnected", str(error) or type(error).__name__)
        except ValueError as error:
            # aiohttp's word for an address or a header that cannot be sent.
            _fail(record, "invalid", str(error))
        record.end_s = self.now()

    async def _read(self, response: aiohttp.ClientResponse, record: RequestRecord) -> None:
        """Read to the end even after [DONE]: hanging up before the server closes would look like a lost client."""
        parser = SseParser()
        done = False
        async for received in response.content.iter_any():
            now = self.now()
            for payload in parser.feed(received):
                done = done or _take_event(payload, record, now)
        for payload in parser.close():
            done = done or _take_event(payload, record, self.now())
        # Some servers send no [DONE]; a finish reason says as much.
        if not done and record.finish_reason is None:
            raise _StreamError("truncated", "the stream ended without a finish_reason or [DONE]")


def _fail(record: RequestRecord, kind: str, detail: str) -> None:
    record.error, record.error_detail = kind, detail[:_DETAIL_CHARS]


def _take_event(payload: bytes, record: RequestRecord, now: float) -> bool:
    """Add one event's text, usage and finish reason to the record; True for the [DONE] that ends a stream."""
    if payload.strip() == b"[DONE]":
        return True
    try:
        event = msgspec.json.decode(payload)
    except NOT_JSON:
        raise _StreamError("malformed", f"{why_not_json(payload, dict)} in {payload[:100]!r}") from None
    if not isinstance(event, dict):
        raise _StreamError("malformed", f"an event must be a JSON object, got {payload[:100]!r}")
    if event.get("error") is not None or event.get("object") == "error":
        raise _StreamError("stream_error", _error_text(event))
    tokens = _take_usage(event.get("usage"), record)
    choices = event.get("choices") or []
    if not isinstance(choices, list):
        raise _StreamError("malformed", f"choices must be a list, got {payload[:100]!r}")
    for choice in choices:
        if not isinstance(choice, dict):
            raise _StreamError("malformed", f"a choice must be a JSON object, got {payload[:100]!r}")
        if _has_text(choice):
            record.chunks.append((now, tokens))
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
    return False


def _take_usage(usage: object, record: RequestRecord) -> int:
    """Record the usage, if any, and return how many tokens the chunk that carries it is taken to hold."""
    if not isinstance(usage, dict):
        return 1
    if isinstance(usage.get("prompt_tokens"), int):
        record.prompt_tokens = usage["prompt_tokens"]
    if isinstance(usage.get("num_preemptions"), int):
        record.num_preemptions = usage["num_preemptions"]
    if not isinstance(usage.get("completion_tokens"), int):
        return 1
    if not 0 <= usage["completion_tokens"] <= _MOST_TOKENS:
        raise _StreamError("malformed", f"the usage counts {usage['completion_tokens']} completion tokens")
    # Usage that comes only at the end says nothing about its own chunk; a running one does, from the first chunk on.
    running = record.output_tokens is not None or not record.chunks
    record.output_tokens = usage["completion_tokens"]
    return max(record.output_tokens - record.placed_tokens, 0) if running else 1


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(delta.get(field) for field in _TEXT_FIELDS)
    return bool(choice.get("text"))


def _error_text(event: dict[str, Any]) -> str:
    error = event.get("error", event)
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def server_root(base_url: str) -> str:
    """The server's address without a trailing slash or /v1."""
    return base_url.rstrip("/").removesuffix("/v1")


def open_session(api_key: str | None, timeout_s: float) -> aiohttp.ClientSession:
    """A session that never makes a request wait for another one's connection; `timeout_s` is per request."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
    )


async def first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    """The first model the server lists, waiting half a minute at most. Raises TfserveError if there is none."""
    url = server_root(base_url) + "/v1/models"
    timeout = aiohttp.ClientTimeout(total=min(_LISTING_S, session.timeout.total or _LISTING_S))
    try:
        async with session.get(url, timeout=timeout) as response:
            status, raw = response.status, await response.read()
    except aiohttp.ClientConnectorError as error:
        reason = "connection refused" if error.errno == errno.ECONNREFUSED else str(error)
        raise TfserveError(f"cannot reach {base_url}: {reason}; start the server or correct --base-url") from None
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise TfserveError(f"GET {url} failed: {reason}; correct --base-url, or --api-key") from None
    if status == 401:
        raise TfserveError(f"GET {url} answered 401: give the server's key with --api-key")
    try:
        name = msgspec.json.decode(raw)["data"][0]["id"]
    except (*NOT_JSON, LookupError, TypeError):
        raise TfserveError(f"GET {url} answered {status} without a list of models; name one with --model") from None
    return str(name)
