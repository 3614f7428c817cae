"""From prompts to a response, streamed or whole: the part that chat and plain completions share."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web
from msgspec import UnsetType

from tfserve.engine.engine import Engine
from tfserve.engine.frontend.validation import check_text
from tfserve.errors import QueueFullError, RequestError
from tfserve.http.errors import JSON
from tfserve.http.keys import CALLER
from tfserve.http.off_loop import ENCODING, LONG, native_off_loop, off_loop
from tfserve.http.pacing import pacers_for
from tfserve.http.replies import Usage
from tfserve.http.request_group import RequestGroup
from tfserve.http.service import Service
from tfserve.http.sse import ChunkRenderer, stream_answer
from tfserve.packed_logprobs import PackedLogprobs
from tfserve.types import MAX_LOGPROBS, ConsumptionRate, RequestOutput, SamplingParams

USAGE = web.RequestKey("usage", Usage)
"""Where the tokens of an answer are noted on the request, for the access log."""

SCORED_TOKEN_BYTES = 256
"""About how many bytes a token with its log probabilities takes in an answer."""

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
    num_thought_tokens: int = 0

    @property
    def size(self) -> int:
        """About how many bytes its JSON has: the work of encoding it."""
        return sum(map(len, self.text)) + (len(self.logprobs) + len(self.prompt_logprobs)) * SCORED_TOKEN_BYTES

    def add(self, output: RequestOutput) -> None:
        """Append what is new."""
        self.text.append(output.text)
        self.token_ids.extend(output.token_ids)
        self.logprobs.extend(output.logprobs or ())
        self.prompt_logprobs.extend(output.prompt_logprobs or ())
        self.finish_reason = output.finish_reason or ""
        self.num_thought_tokens = output.num_thought_tokens


class Renderer(ChunkRenderer, Protocol):
    """The words of one endpoint. `id` names the answer."""

    @property
    def id(self) -> str:
        """The answer's id; unique."""
        ...

    def whole(self, results: Sequence[Result], usage: Usage) -> Iterator[bytes]:
        """The JSON body of an answer that is not streamed, in pieces."""
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


async def encode_prompt(engine: Engine, text: str, *, add_special_tokens: bool) -> list[int]:
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
    _check_room(service, len(job.prompts), job.num_choices)
    _check_logprobs(service, job, stream)
    caller, renderer, num_echoed = request[CALLER], job.renderer, job.num_echoed
    num_choices = len(job.prompts) * job.num_choices
    # Each choice computes its prompt.
    num_prompt_tokens = sum(map(len, job.prompts)) * job.num_choices
    with caller.limits.streams(num_choices, num_prompt_tokens), service.group(renderer.id, caller) as group:
        await _submit(service, group, job, rate=rate, priority=priority)
        del job  # the engine has its prompts
        try:
            if stream:
                return await _streamed(request, service, group, renderer, rate=rate, num_echoed=num_echoed)
            return await _whole(group, renderer, num_echoed)
        finally:
            usage = request[USAGE] = group.usage
            caller.limits.on_tokens(group.num_generated)
            service.metrics.on_answer(caller.key_name, usage.prompt_tokens, group.num_generated)


async def _submit(
    service: Service, group: RequestGroup, job: Job, *, rate: ConsumptionRate | UnsetType, priority: int
) -> None:
    """Queue all prompts; other requests get their turn between two long ones."""
    try:
        num_tokens = 0
        for prompt in job.prompts:
            group.submit(prompt, job.params, job.num_choices, job.renderer.id, rate=rate, priority=priority)
            num_tokens += len(prompt)
            if num_tokens > LONG:
                num_tokens = 0
                await asyncio.sleep(0)
    except QueueFullError:
        service.metrics.on_refusal("queue_full")
        raise


async def _streamed(
    request: web.Request,
    service: Service,
    group: RequestGroup,
    renderer: Renderer,
    *,
    rate: ConsumptionRate | UnsetType,
    num_echoed: int,
) -> web.StreamResponse:
    """The choices as events."""
    if service.config.scheduler.overload == "shed":
        # A refusal must come as a status, so the headers wait for the policy's word.
        await group.admitted()
    server = service.config.server
    pacers = pacers_for(group.streams, rate) if server.pacing == "smooth" else None
    return await stream_answer(
        request, group, renderer, pacers=pacers, keep_alive_s=server.keep_alive_s, num_echoed=num_echoed
    )


async def _whole(group: RequestGroup, renderer: Renderer, num_echoed: int) -> web.Response:
    """The choices as one body, once all have ended."""
    results = [Result() for _ in group.streams]
    while not group.finished:
        for index, output in await group.next():
            results[index].add(output)
    size = num_echoed + sum(result.size for result in results)
    pieces = renderer.whole(results, group.usage)
    if size < LONG:
        return web.Response(body=b"".join(pieces), content_type=JSON)
    return web.Response(body=_sent_in_pieces(pieces), content_type=JSON)


async def _sent_in_pieces(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Each piece is made off the loop once the client has taken those before it."""
    while piece := await off_loop(LONG, next, pieces, b""):
        yield piece


def _check_room(service: Service, num_prompts: int, num_choices: int) -> None:
    """Raise RequestError for more choices than run and wait at most: no retry could help."""
    limit = service.engine.info.max_num_seqs + service.config.server.max_queued_requests
    if num_prompts * num_choices > limit:
        wish = f"{num_prompts} prompts with n={num_choices}"
        message = f"{wish} are more than the {limit} requests that this server runs and queues at once; send fewer"
        raise RequestError("n" if num_choices > 1 else "prompt", message)


def _check_logprobs(service: Service, job: Job, stream: bool) -> None:
    """Raise RequestError for more log probabilities than an answer may have, of prompts and of a whole text."""
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
