"""From validated prompts to a response, streamed or whole: what chat and plain completions have in common."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import StreamReader, http_exceptions, web
from msgspec import UnsetType

from tfserve.engine.frontend.validation import check_text
from tfserve.errors import QueueFullError, RequestError
from tfserve.http.bodies import BodyHold
from tfserve.http.errors import JSON, ApiError
from tfserve.http.exchange import Exchange
from tfserve.http.keys import CALLER
from tfserve.http.off_loop import ENCODING, LONG, native_off_loop, off_loop
from tfserve.http.pacing import pacers_for
from tfserve.http.packing import packing_of, unpacked
from tfserve.http.parsing import PART_BYTES, num_parts
from tfserve.http.ports import EnginePort
from tfserve.http.replies import Usage
from tfserve.http.service import Service
from tfserve.http.sse import ChunkRenderer, stream_answer
from tfserve.packed_logprobs import PackedLogprobs
from tfserve.types import MAX_LOGPROBS, ConsumptionRate, RequestOutput, SamplingParams

USAGE = web.RequestKey("usage", Usage)
"""Where the tokens of an answer are noted on the request, for the access log."""

BODY_TIMEOUT_S = 60.0
"""How long a client has to send its request's body."""

_FEW_PARTS = 1000
"""Parts of a body that need not be counted exactly."""

SCORED_TOKEN_BYTES = 256
"""About what a token with its log probabilities is in an answer."""

MAX_LOGPROBS_TOLD = 2**21
"""Most log probabilities of one answer; in any case as many as one choice can have."""


@dataclass(slots=True)
class Result:
    """All of one choice."""

    text: list[str] = field(default_factory=list)
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    logprobs: PackedLogprobs = field(default_factory=PackedLogprobs)
    prompt_logprobs: PackedLogprobs = field(default_factory=PackedLogprobs)
    finish_reason: str = ""

    @property
    def size(self) -> int:
        """How much work it is to word this, as bytes of JSON to be made."""
        return sum(map(len, self.text)) + (len(self.logprobs) + len(self.prompt_logprobs)) * SCORED_TOKEN_BYTES

    def add(self, output: RequestOutput) -> None:
        """Append what is new."""
        self.text.append(output.text)
        self.token_ids.extend(output.token_ids)
        self.logprobs.extend(output.logprobs or ())
        self.prompt_logprobs.extend(output.prompt_logprobs or ())
        self.finish_reason = output.finish_reason or ""


class Renderer(ChunkRenderer, Protocol):
    """The words of one endpoint. `id` names the answer."""

    @property
    def id(self) -> str:
        """The answer's id; unique."""
        ...

    def whole(self, results: Sequence[Result], usage: Usage) -> bytes:
        """The JSON body of an answer that is not streamed."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A request ready for the engine: each prompt runs `num_choices` times, and `renderer` words the answer.

    `num_echoed` is how many characters of prompts the whole answer begins its choices with.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    num_choices: int
    renderer: Renderer
    num_echoed: int = 0


async def read_body(request: web.Request, max_bytes: int, hold: BodyHold) -> bytes:
    """The whole body, unpacked, counted in `hold` with what it will take as objects.

    Raises ApiError for one that is too large (413), too slow (408), or broken (400), and where too many are being read
    (503). A body that says it is too large, or is packed in an unknown way (415), is not read at all. One that a web
    page sends must be called JSON (else 415): any site's page may send text, but before JSON browsers ask whether it
    may (http/cors.py).
    """
    if "Origin" in request.headers and request.content_type != JSON:
        message = f"A web page's request must have the Content-Type {JSON}."
        raise ApiError(415, message, code="unsupported_media_type")
    packing = packing_of(request.headers.get("Content-Encoding", ""))
    body: bytes | None = None
    try:
        if (request.content_length or 0) <= max_bytes:
            async with hold.reading(BODY_TIMEOUT_S):
                body = await _all_bytes(request.content, max_bytes, hold)
    except TimeoutError:
        message = f"The body did not come within {BODY_TIMEOUT_S:.0f} s."
        raise ApiError(408, message, code="body_timeout", headers={"Connection": "close"}) from None
    except (web.RequestPayloadError, http_exceptions.PayloadEncodingError):
        message = "The body cannot be read; it does not come as its headers say."
        raise ApiError(400, message, code="invalid_body", headers={"Connection": "close"}) from None
    if body is not None and packing is not None:
        body = await native_off_loop(len(body), unpacked, body, packing, max_bytes)
    if body is None:
        message = f"The body is larger than {max_bytes} bytes, this server's limit (server.max_body_bytes)."
        raise ApiError(413, message, code="body_too_large")
    hold.resize(len(body) + PART_BYTES * await off_loop(len(body), num_parts, body, _FEW_PARTS))
    return body


async def _all_bytes(content: StreamReader, max_bytes: int, hold: BodyHold) -> bytes | None:
    """What comes until the end; None if it is more than `max_bytes`.

    aiohttp's own `Request.read` would keep the bytes for as long as the answer takes.
    """
    body = bytearray()
    while chunk := await content.readany():
        body += chunk
        if len(body) > max_bytes:
            return None
        hold.resize(len(body))
    return bytes(body)


async def encode_prompt(engine: EnginePort, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a prompt. Raises RequestError for one that cannot fit; a long one is tokenised off the loop."""

    def encode() -> list[int]:
        check_text(engine.tokenizer, text, engine.info)
        return engine.tokenizer.encode(text, add_special_tokens)

    return await native_off_loop(ENCODING * len(text), encode)


async def answer(
    request: web.Request,
    service: Service,
    job: Job,
    *,
    rate: ConsumptionRate | UnsetType,
    priority: int,
    stream: bool,
) -> web.StreamResponse:
    """Run a job, or nothing of it if one of its prompts is refused, and answer with all the choices."""
    renderer = job.renderer
    num_choices = len(job.prompts) * job.num_choices
    _check_room(service, len(job.prompts), job.num_choices)
    _check_logprobs(service, job, stream)
    caller = request[CALLER]
    # Each choice computes its prompt.
    num_prompt_tokens = sum(map(len, job.prompts)) * job.num_choices
    num_echoed = job.num_echoed
    with caller.limits.streams(num_choices, num_prompt_tokens), service.exchange(renderer.id, caller) as exchange:
        try:
            num_tokens = 0
            for prompt in job.prompts:
                exchange.submit(prompt, job.params, job.num_choices, renderer.id, rate=rate, priority=priority)
                num_tokens += len(prompt)
                if num_tokens > LONG:
                    num_tokens = 0
                    await asyncio.sleep(0)
        except QueueFullError:
            service.metrics.on_refusal("queue_full")
            raise
        del job  # the engine has its prompts
        try:
            if stream:
                if service.config.scheduler.overload == "shed":
                    # A refusal must come as a status, so the headers wait for the policy's word.
                    await exchange.admitted()
                server = service.config.server
                pacers = pacers_for(exchange.streams, rate) if server.pacing == "smooth" else None
                return await stream_answer(
                    request,
                    exchange,
                    renderer,
                    pacers=pacers,
                    keep_alive_s=server.keep_alive_s,
                    num_echoed=num_echoed,
                )
            results = await _collect(exchange, num_choices)
            size = num_echoed + sum(result.size for result in results)
            body = await off_loop(size, renderer.whole, results, exchange.usage)
            return web.Response(body=body, content_type=JSON)
        finally:
            usage = request[USAGE] = exchange.usage
            caller.limits.on_tokens(exchange.num_generated)
            service.metrics.on_answer(caller.key_name, usage.prompt_tokens, exchange.num_generated)


def _check_room(service: Service, num_prompts: int, num_choices: int) -> None:
    """Raise RequestError for more choices than run and wait at most: no retry could help."""
    limit = service.engine.info.max_num_seqs + service.config.server.max_queued_requests
    if num_prompts * num_choices > limit:
        wish = f"{num_prompts} prompts with n={num_choices}"
        message = f"{wish} are more than the {limit} requests that this server runs and queues at once; send fewer"
        raise RequestError("n" if num_choices > 1 else "prompt", message)


def _check_logprobs(service: Service, job: Job, stream: bool) -> None:
    """Raise RequestError for more log probabilities than an answer may have: those of prompts, and of what is whole."""
    params = job.params
    max_model_len = service.engine.info.max_model_len
    of_prompt = 0 if params.prompt_logprobs is None else 1 + params.prompt_logprobs
    of_text = 0 if params.logprobs is None or stream else 1 + params.logprobs
    most_tokens = max_model_len if params.max_tokens is None else params.max_tokens
    each = [len(prompt) * of_prompt + min(most_tokens, max_model_len) * of_text for prompt in job.prompts]
    wish = sum(each) * job.num_choices
    limit = max(MAX_LOGPROBS_TOLD, (1 + MAX_LOGPROBS) * max_model_len)
    if wish > limit:
        message = f"this may be {wish} log probabilities, and one answer may have {limit}"
        advice = "ask for fewer alternatives, choices, prompts or tokens (max_tokens)"
        raise RequestError("logprobs", f"logprobs: {message}; {advice}")


async def _collect(exchange: Exchange, num_choices: int) -> list[Result]:
    results = [Result() for _ in range(num_choices)]
    while not exchange.finished:
        for index, output in await exchange.next():
            results[index].add(output)
    return results
