"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web

from tfserve.engine.engine import Engine
from tfserve.engine.frontend.validation import check_tokens
from tfserve.errors import RequestError
from tfserve.http.answer import Job, Result, encode_prompt
from tfserve.http.endpoint import ERRORS, generate
from tfserve.http.known_fields import COMPLETION_FIELDS
from tfserve.http.off_loop import off_loop
from tfserve.http.parsing import BodyParser
from tfserve.http.protocol import CompletionRequest, UsageWish
from tfserve.http.rendering import AnswerHead, logprob, tells_nothing
from tfserve.http.replies import Completion, CompletionChoice, CompletionLogprobs, Usage
from tfserve.http.route import Route, register
from tfserve.http.structured import response_grammar
from tfserve.http.text_offsets import TextOffsets
from tfserve.types import RequestOutput, Tenant, TokenLogprob

MAX_ECHOED_CHARS = 2**24
"""Most characters of prompts that all choices of an answer begin with: a token may stand for a hundred spaces."""

_Token = tuple[int, float | None, dict[str, float] | None]
"""A token, its log probability and the alternatives to it."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that its choices begin with: its text, and the token that it begins with."""

    text: str
    first_token: int


class CompletionRenderer:
    """One completion in OpenAI's words, with `num_samples` choices per prompt.

    `num_logprobs` is how many alternatives each token is told with; None: no log probabilities. `special_are_text`:
    special tokens are in the text. `echoes` has every prompt, if its choices are to begin with it, or nothing.
    """

    def __init__(
        self,
        head: AnswerHead,
        *,
        num_samples: int,
        num_logprobs: int | None,
        special_are_text: bool,
        echoes: Sequence[Echo] = (),
    ) -> None:
        self.id = head.id
        self._head = head
        self._num_samples = num_samples
        self._num_logprobs = num_logprobs
        self._special_are_text = special_are_text
        self._echoes = echoes
        self._offsets: dict[int, TextOffsets] = {}  # by choice that has begun: of the model's text

    def chunk(self, index: int, output: RequestOutput, usage: Usage) -> bytes:
        """The event for what is new in choice `index`; the finish reason comes with the last text."""
        if tells_nothing(output):
            return b""
        scored = output.prompt_logprobs or (), output.logprobs or ()
        choice = self._choice(index, output.text, *scored, output.finish_reason)
        return self._head.event(Completion, choice, usage)

    def template(self, index: int) -> tuple[bytes, bytes] | None:
        """What surrounds the text in every further event of choice `index` that has nothing else.

        None where each event tells the token counts.
        """
        head = self._head
        if head.wish is UsageWish.ALWAYS:
            return None
        return head.frame(Completion, CompletionChoice(index, self.id))

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event with token counts; empty when the client did not ask for it."""
        return self._head.usage_event(Completion, usage)

    def whole(self, results: Sequence[Result], usage: Usage) -> Iterator[bytes]:
        """The JSON body of an answer that is not streamed, in pieces."""
        choices = (
            self._choice(
                index, "".join(result.text), list(result.prompt_logprobs), list(result.logprobs), result.finish_reason
            )
            for index, result in enumerate(results)
        )
        return self._head.whole(Completion, choices, lambda: usage)

    def _choice(
        self,
        index: int,
        text: str,
        of_prompt: Sequence[TokenLogprob],
        of_text: Sequence[TokenLogprob],
        finish_reason: str | None,
    ) -> CompletionChoice:
        """A choice, or what is new in it; it begins with the prompt, if that is to be echoed."""
        tokens: list[_Token] = []
        offsets: list[int] = []
        if index not in self._offsets:
            echo = self._echoes[index // self._num_samples] if self._echoes else None
            if echo is not None:
                text = echo.text + text
                tokens = [(echo.first_token, None, None), *map(self._token, of_prompt)]
                places = TextOffsets(self._head.tokenizer, echo.text.startswith)
                offsets = [min(places.next(token_id), len(echo.text)) for token_id, _, _ in tokens]
            start = 0 if echo is None else len(echo.text)
            self._offsets[index] = TextOffsets(self._head.tokenizer, lambda *_: self._special_are_text, start)
        tokens += map(self._token, of_text)
        offsets += [self._offsets[index].next(entry.token_id) for entry in of_text]
        # A prompt may have been scored though no log probabilities are wanted: with max_tokens 0 the engine scores it.
        wanted = bool(tokens) and self._num_logprobs is not None
        return CompletionChoice(index, text, self._logprobs(tokens, offsets) if wanted else None, finish_reason)

    def _logprobs(self, tokens: Sequence[_Token], offsets: list[int]) -> CompletionLogprobs:
        token_ids, chosen, tops = map(list, zip(*tokens, strict=True))
        texts = [self._head.token_text(token_id) for token_id in token_ids]
        return CompletionLogprobs(offsets, chosen, texts, tops if self._num_logprobs else None)

    def _token(self, entry: TokenLogprob) -> _Token:
        """A token, with the most likely ones and itself as alternatives; of two that read the same, the likelier."""
        value = logprob(entry.logprob)
        if not self._num_logprobs:
            return entry.token_id, value, None
        table: dict[str, float] = {}
        for token_id, each in (*entry.top, (entry.token_id, value)):
            table.setdefault(self._head.token_text(token_id), logprob(each))
        return entry.token_id, value, self._head.part(table)


async def _prepare(asked: CompletionRequest, _size: int, model: str, engine: Engine, tenant: Tenant) -> Job:
    """The prompts as token ids, in order."""
    tokenizer = engine.tokenizer
    grammar = await response_grammar(asked.response_format, engine.info, tenant)
    params = msgspec.structs.replace(asked.sampling_params(), grammar=grammar)
    head = AnswerHead("cmpl", model, tokenizer, asked.usage_wish)
    prompts: list[Sequence[int]] = []
    texts = []
    for prompt in asked.prompts(engine.info):
        if isinstance(prompt, str):
            special = asked.add_special_tokens is not False
            prompts.append(await encode_prompt(engine, prompt, add_special_tokens=special))
            texts.append(prompt)
        else:
            prompts.append(prompt)
            texts.append(await _echoed(engine, prompt, params.skip_special_tokens) if asked.echo else "")
        # Many prompts of moderate length: let other requests in between two of them.
        await asyncio.sleep(0)
    echoes: list[Echo] = []
    if asked.echo:
        echoes = [Echo(text, token_ids[0]) for text, token_ids in zip(texts, prompts, strict=True) if token_ids]
    num_echoed = asked.num_samples * sum(len(echo.text) for echo in echoes)
    if num_echoed > MAX_ECHOED_CHARS:
        wish = f"the prompts that the choices are to begin with have {num_echoed} characters together"
        raise RequestError("echo", f"echo: {wish}, and {MAX_ECHOED_CHARS} are allowed; lower n or leave echo out")
    return Job(
        prompts,
        params,
        asked.num_samples,
        CompletionRenderer(
            head,
            num_samples=asked.num_samples,
            num_logprobs=asked.logprobs,
            special_are_text=not params.skip_special_tokens,
            echoes=echoes,
        ),
        num_echoed=num_echoed,
    )


async def _echoed(engine: Engine, prompt: Sequence[int], skip_special_tokens: bool) -> str:
    """The text of a prompt of token ids. Raises RequestError for tokens that there are not."""
    check_tokens(prompt, engine.info.vocab_size)
    return await off_loop(len(prompt), engine.tokenizer.decode, prompt, skip_special_tokens)


_PARSER = BodyParser(CompletionRequest, COMPLETION_FIELDS)


async def complete(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions."""
    return await generate(request, _PARSER, _prepare)


register(
    Route(
        "POST",
        "/v1/completions",
        complete,
        "Continue prompts, whole or as a stream of events",
        Completion,
        CompletionRequest,
        chunk=Completion,
        errors=ERRORS,
    )
)
