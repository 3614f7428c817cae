"""One streaming request to any OpenAI-compatible server, time-stamped chunk by chunk.

The arrival time of a token is that of its SSE chunk. A chunk counts as one token, unless the server sends a running
`usage.completion_tokens` with each chunk. If the final usage counts more tokens than the chunks (held-back UTF-8,
tokens without text, several tokens a chunk), the rest are `unplaced`: they count in totals and throughput, but have no
arrival time.

Every request has its own connection, and the time to open it is not counted. Some servers close a connection after each
answer without notice, so the next request on it would fail; a burst needs a connection per request anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, Literal

import aiohttp
import msgspec

from tfserve.bench.sse_parser import SseParser
from tfserve.bench.workload import Work
from tfserve.errors import NOT_JSON, TfserveError
from tfserve.misfit import why_not_json
from tfserve.strict_json import mend

Endpoint = Literal["chat", "completions"]

_PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_TEXT_FIELDS = ("content", "reasoning_content", "reasoning")
_DETAIL_CHARS = 300
_LISTING_S = 30.0
_MAX_TOKENS = 1_000_000

_GOODBYE_S = 1.0
"""Time limit for the end of a response after its last event."""

_HINTS = {
    "ignore_eos": "leave --ignore-eos out",
    "consumption_rate": "leave --rate and --rate-mix out; --score-rate scores without sending",
}
"""Fields that are not OpenAI's, and the advice for a server that refuses them."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The server and the common part of all requests to it; `base_url` with or without a trailing /v1."""

    base_url: str
    model: str
    endpoint: Endpoint = "chat"
    temperature: float = 0.0
    ignore_eos: bool = False

    @property
    def url(self) -> str:
        """Where requests are posted."""
        return server_root(self.base_url) + _PATHS[self.endpoint]

    def body(self, work: Work, without: Collection[str] = ()) -> dict[str, Any]:
        """The request's JSON, `without` names that the server does not know (`stream_options`, `max_tokens`).

        `ignore_eos` and `consumption_rate` are not OpenAI's: sent only when asked for.
        """
        limit = "max_tokens" if "max_tokens" not in without else "max_completion_tokens"
        body: dict[str, Any] = {
            "model": self.model,
            limit: work.max_tokens,
            "temperature": self.temperature,
            "stream": True,
        }
        if "stream_options" not in without:
            body["stream_options"] = {"include_usage": True}
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
    """The record of one request. Times in seconds since the start of the run; `sent_s` is when its connection was open.

    `chunks` has (time, tokens) per SSE chunk with text. `prompt_tokens`, `output_tokens` and `num_preemptions` are from
    the server's usage, None without one. `rate` in tokens/s is used for the score. `error` is the kind of failure, None
    for a completed request.
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


class _StreamError(Exception):
    """A stream that broke the protocol; `kind` is its class in the report."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class StreamClient:
    """Sends streaming requests to one target. All recorded times count from its creation."""

    def __init__(self, session: aiohttp.ClientSession, target: Target) -> None:
        self._session = session
        self._target = target
        self._origin = time.perf_counter()
        self._without: set[str] = set()

    def now(self) -> float:
        """Seconds since the start of the run, rounded to microseconds to keep records small."""
        return round(time.perf_counter() - self._origin, 6)

    async def send(self, record: RequestRecord, work: Work) -> None:
        """Send one request now and fill `record` with the result, also with a failure of any kind."""
        record.sent_s = self.now()
        try:
            while not await self._answered(record, work):
                pass
        except _StreamError as error:
            _fail(record, error.kind, str(error))
        except TimeoutError:
            _fail(record, "timeout", "no complete answer within the time allowed")
        except aiohttp.ClientConnectorError as error:
            _fail(record, "connect", str(error))
        except (aiohttp.ClientError, OSError) as error:
            # Some servers close the connection instead of ending the response; the text is complete then.
            if record.finish_reason is None:
                _fail(record, "disconnected", str(error) or type(error).__name__)
        except ValueError as error:
            # aiohttp raises it for an address or a header that cannot be sent.
            _fail(record, "invalid", str(error))
        record.end_s = record.end_s or self.now()

    async def count_prompt_tokens(self, work: Work) -> int | None:
        """`usage.prompt_tokens` of an answer that is not streamed; None if the server reports no usage."""
        body = {**self._target.body(work, {*self._without, "stream_options"}), "stream": False}
        try:
            async with self._session.post(self._target.url, json=body) as response:
                return int(msgspec.json.decode(await response.read())["usage"]["prompt_tokens"])
        except (*NOT_JSON, TimeoutError, aiohttp.ClientError, OSError, LookupError, TypeError, ValueError):
            return None

    async def _answered(self, record: RequestRecord, work: Work) -> bool:
        """Ask once. False if the server refused a field that the request can do without: ask again."""
        body = self._target.body(work, self._without)
        context = SimpleNamespace(record=record, now=self.now)
        async with self._session.post(self._target.url, json=body, trace_request_ctx=context) as response:
            if response.method != "POST":
                raise _StreamError("redirected", f"the server redirects to {response.url}: give that as --base-url")
            if response.status != 200:
                detail = (await response.read()).decode(errors="replace")
                if response.status in (400, 422) and (refused := _refused_field(body, detail)):
                    self._without.add(refused)
                    return False
                hints = "".join(f"{hint}: " for name, hint in _HINTS.items() if name in body and name in detail)
                raise _StreamError(f"http_{response.status}", hints + (detail or f"POST {response.url}"))
            await self._read(response, record)
        return True

    async def _read(self, response: aiohttp.ClientResponse, record: RequestRecord) -> None:
        """Read to the end, also after [DONE]: closing earlier would look like a lost client to the server."""
        parser, head, done = SseParser(), b"", False
        async for received in response.content.iter_any():
            now = self.now()
            head = head or received[:100]
            for payload in parser.feed(received):
                if _take_event(payload, record, now):
                    record.end_s = now
                    await _await_end(response)
                    return
        for payload in parser.close():
            done = _take_event(payload, record, self.now())
        # Some servers send no [DONE]; a finish reason is enough.
        if not done and record.finish_reason is None:
            if head.lstrip()[:1] in (b"{", b"<"):
                raise _StreamError("no_stream", f"the answer is no stream of events: {head!r}")
            raise _StreamError("truncated", "the stream ended without a finish_reason or [DONE]")


def _refused_field(body: dict[str, Any], detail: str) -> str | None:
    """The field that the server refuses by its message, if the request can be sent without it."""
    if "stream_options" in body and "stream_options" in detail:
        return "stream_options"
    return "max_tokens" if "max_tokens" in body and "max_completion_tokens" in detail else None


async def _await_end(response: aiohttp.ClientResponse) -> None:
    """Wait for the end of a response after its last event; any kind of end is accepted."""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(_GOODBYE_S):
            async for _ in response.content.iter_any():
                pass


def _fail(record: RequestRecord, kind: str, detail: str) -> None:
    record.error, record.error_detail = kind, detail[:_DETAIL_CHARS]


def _take_event(payload: bytes, record: RequestRecord, now: float) -> bool:
    """Add one event's text, usage and finish reason to the record; True for the [DONE] that ends a stream."""
    if payload.strip() == b"[DONE]":
        return True
    if not payload.strip():  # a keep-alive
        return False
    payload = mend(payload)  # parsed once, so that an error is about the same value
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
        if reason := choice.get("finish_reason"):
            record.finish_reason = str(reason)
    return False


def _take_usage(usage: object, record: RequestRecord) -> int:
    """Record the usage, if any. Returns the number of tokens that the chunk counts as."""
    if not isinstance(usage, dict):
        return 1
    if (prompt_tokens := _whole(usage.get("prompt_tokens"))) is not None:
        record.prompt_tokens = prompt_tokens
    if (num_preemptions := _whole(usage.get("num_preemptions"))) is not None:
        record.num_preemptions = num_preemptions
    output_tokens = _whole(usage.get("completion_tokens"))
    if output_tokens is None:
        return 1
    if not 0 <= output_tokens <= _MAX_TOKENS:
        raise _StreamError("malformed", f"the usage counts {output_tokens} completion tokens")
    # Usage only at the end does not count its own chunk; a running usage does, from the first chunk on.
    running = record.output_tokens is not None or not record.chunks
    record.output_tokens = output_tokens
    return max(record.output_tokens - record.placed_tokens, 0) if running else 1


def _whole(value: object) -> int | None:
    """A count, which some servers write as a float; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


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
    """A session that gives every request a connection of its own, at once; `timeout_s` is per request."""
    connected = aiohttp.TraceConfig()
    connected.on_connection_create_end.append(_note_connected)
    headers = {"Connection": "close"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers=headers,
        trace_configs=[connected],
    )


async def _note_connected(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    """Set the request's start time when its connection is open."""
    sender = context.trace_request_ctx
    if sender is not None:
        sender.record.sent_s = sender.now()


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
