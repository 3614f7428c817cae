"""POST /v1/chat/completions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web

from tfserve.engine.engine import Engine
from tfserve.engine.frontend.validation import require_grammars
from tfserve.errors import RequestError
from tfserve.http.answer import Job, Result, encode_prompt
from tfserve.http.chat_prompt import chat_prompt
from tfserve.http.endpoint import ERRORS, generate
from tfserve.http.known_fields import CHAT_FIELDS
from tfserve.http.off_loop import off_loop
from tfserve.http.parsing import BodyParser
from tfserve.http.protocol import ChatRequest, UsageWish
from tfserve.http.reasoning import ThoughtParser
from tfserve.http.rendering import AnswerHead, logprob, tells_nothing
from tfserve.http.replies import (
    UNSET,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionTokensDetails,
    Delta,
    FunctionCallReply,
    ToolCallReply,
    TopLogprob,
    Usage,
)
from tfserve.http.route import Route, register
from tfserve.http.structured import response_grammar
from tfserve.http.tool_parsing import new_call_id, tool_call_parser
from tfserve.http.tools import ToolPlan
from tfserve.model.text.thoughts import first_place
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.types import EngineInfo, FinishReason, Place, PromptTokens, RequestOutput, Tenant, TokenLogprob


class ChatRenderer:
    """One chat answer in OpenAI's words, its choices read as `reading` says."""

    def __init__(self, head: AnswerHead, reading: Reading) -> None:
        self.id = head.id
        self._head = head
        self._reading = reading
        self._choices: dict[int, _Choice] = {}

    def chunk(self, index: int, output: RequestOutput, usage: Usage) -> bytes:
        """Events for what is new in choice `index`: the role comes first, the finish reason with the last text."""
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(self._reading)
        choice.num_thought_tokens = output.num_thought_tokens
        thoughts, content, calls = choice.read(output.text, output.finished)
        if tells_nothing(output):
            return b""
        start = b""
        if not choice.has_begun:
            choice.has_begun = True
            start = self._event(ChatChunkChoice(index, Delta(role="assistant", content="")), usage)
        logprobs = self._logprobs(output.logprobs)
        if not (thoughts or content or calls or logprobs or output.finished):
            return start
        delta = Delta()
        if thoughts:
            delta.reasoning_content = thoughts
        if content:
            delta.content = content
        if calls:
            delta.tool_calls = calls
        return start + self._event(ChatChunkChoice(index, delta, logprobs, choice.reason(output.finish_reason)), usage)

    def template(self, index: int) -> tuple[bytes, bytes] | None:
        """What surrounds the text in every further event of choice `index` that has nothing else.

        None where the text may hold tool calls or thoughts, or each event tells the token counts.
        """
        head = self._head
        if head.wish is UsageWish.ALWAYS or not self._choices[index].is_plain:
            return None
        return head.frame(ChatChunk, ChatChunkChoice(index, Delta(content=self.id)))

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event with token counts; empty when the client did not ask for it."""
        return self._head.usage_event(ChatChunk, self._counted(usage))

    def whole(self, results: Sequence[Result], usage: Usage) -> Iterator[bytes]:
        """The JSON body of an answer that is not streamed, in pieces."""
        choices = (self._whole_choice(index, result) for index, result in enumerate(results))
        return self._head.whole(ChatCompletion, choices, lambda: self._counted(usage))

    def _whole_choice(self, index: int, result: Result) -> ChatChoice:
        choice = self._choices[index] = _Choice(self._reading)
        choice.num_thought_tokens = result.num_thought_tokens
        thoughts, content, calls = choice.read("".join(result.text), finished=True)
        message = AssistantMessage(content)
        if thoughts or calls:
            message.content = content or None
        if thoughts:
            message.reasoning_content = thoughts
        if calls:
            for call in calls:
                call.index = UNSET
            message.tool_calls = calls
        reason = choice.reason(result.finish_reason) or ""
        return ChatChoice(index, message, self._logprobs(list(result.logprobs)), reason)

    def _counted(self, usage: Usage) -> Usage:
        """`usage`, and in it the tokens of the thoughts so far."""
        if self._reading.place is not None:
            num_tokens = sum(choice.num_thought_tokens for choice in self._choices.values())
            usage.completion_tokens_details = CompletionTokensDetails(num_tokens)
        return usage

    def _event(self, choice: ChatChunkChoice, usage: Usage) -> bytes:
        return self._head.event(ChatChunk, choice, self._counted(usage))

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
        if not entries:
            return None
        return ChatLogprobs([self._head.part(self._token(entry)) for entry in entries])

    def _token(self, entry: TokenLogprob) -> ChatTokenLogprob:
        raw = self._head.tokenizer.token_bytes(entry.token_id)
        top = [self._alternative(token_id, value) for token_id, value in entry.top]
        return ChatTokenLogprob(raw.decode(errors="replace"), logprob(entry.logprob), list(raw), top)

    def _alternative(self, token_id: int, value: float) -> TopLogprob:
        raw = self._head.tokenizer.token_bytes(token_id)
        return TopLogprob(raw.decode(errors="replace"), logprob(value), list(raw))


@dataclass(frozen=True, slots=True)
class Reading:
    """How the text of an answer is read.

    `tools` may be called; at most one call counts unless they are `parallel`. `place` is where the text begins, None if
    it has no thoughts or they are not told from the rest; `shows_thoughts`: they are part of the answer.
    """

    tools: ToolPlan
    parallel: bool = True
    place: Place | None = None
    shows_thoughts: bool = True


class _Choice:
    """One choice as far as it has come: its thoughts, and which tool calls there were in it. The role begins it."""

    def __init__(self, reading: Reading) -> None:
        tools = reading.tools
        self.has_begun = False
        self.num_thought_tokens = 0
        self._format = tools.format
        self._parser = None if tools.format is None else tool_call_parser(tools.format, tools.names)
        self._thinker = None if reading.place is None else ThoughtParser(reading.place)
        self._shows_thoughts = reading.shows_thoughts
        self._most_calls = math.inf if reading.parallel else 1
        self._num_calls = 0

    @property
    def is_plain(self) -> bool:
        """True if all further text is text for the reader."""
        return self._parser is None and (self._thinker is None or self._thinker.is_over)

    def read(self, text: str, finished: bool) -> tuple[str, str, list[ToolCallReply]]:
        """New thoughts, new text for the reader and new calls in `text`, which is the last if `finished`."""
        thoughts = ""
        if self._thinker is not None:
            thoughts, text = self._thinker.push(text)
            if finished:
                rest, more = self._thinker.finish()
                thoughts, text = thoughts + rest, text + more
        content, calls = self._calls(text, finished)
        return thoughts if self._shows_thoughts else "", content, calls

    def _calls(self, text: str, finished: bool) -> tuple[str, list[ToolCallReply]]:
        if self._parser is None:
            return text, []
        content, found = self._parser.push(text)
        if finished:
            rest, more = self._parser.finish()
            content, found = content + rest, [*found, *more]
        calls = []
        for call in found:
            if self._num_calls < self._most_calls:
                function = FunctionCallReply(call.name, call.arguments)
                id = new_call_id(self._format)
                calls.append(ToolCallReply(index=self._num_calls, id=id, type="function", function=function))
                self._num_calls += 1
        return content, calls

    def reason(self, finish_reason: str | None) -> str | None:
        """The finish reason in OpenAI's words."""
        return "tool_calls" if self._num_calls and finish_reason == FinishReason.STOP else finish_reason


async def _grammar(asked: ChatRequest, tools: ToolPlan, info: EngineInfo, tenant: Tenant) -> str | None:
    """What the answer must follow, checked: a forced call or the response format. Raises TfserveError."""
    wanted = await response_grammar(asked.response_format, info, tenant)
    if wanted is not None and tools.format is not None:
        message = "response_format: JSON cannot be had together with tools; send tool_choice 'none' or leave one out"
        raise RequestError("response_format", message)
    forced = await tools.grammar(tenant)
    if forced is None:
        return wanted
    require_grammars(info, "tool_choice")
    return forced


def _place(asked: ChatRequest, tokenizer: Tokenizer, prompt: str, grammar: str | None) -> Place | None:
    """Where the answer begins; None where thoughts are not told from it: a grammar leaves no room for any."""
    if not tokenizer.thinks or grammar is not None or asked.separate_reasoning is False:
        return None
    continued = asked.messages[-1].for_template(0)["content"] if asked.continue_final_message else None
    return first_place(prompt, continued)


async def _prepare(asked: ChatRequest, size: int, model: str, engine: Engine, tenant: Tenant) -> Job:
    """The conversation as one prompt, by the model's template."""
    tokenizer = engine.tokenizer
    parallel = asked.parallel_tool_calls is not False
    tools = ToolPlan(asked.tools, asked.tool_choice, parallel, tokenizer.tool_format)
    await tools.measure()
    grammar = await _grammar(asked, tools, engine.info, tenant)
    params = msgspec.structs.replace(asked.sampling_params(), grammar=grammar)
    text = await off_loop(size, chat_prompt, tokenizer, asked.messages, asked, tools.for_template)
    # The template has written the special tokens already.
    prompt = await encode_prompt(engine, text, add_special_tokens=bool(asked.add_special_tokens))
    place = _place(asked, tokenizer, text, grammar)
    reading = Reading(tools, parallel, place, asked.include_reasoning is not False)
    renderer = ChatRenderer(AnswerHead("chatcmpl", model, tokenizer, asked.usage_wish), reading)
    return Job([PromptTokens(prompt, place or Place.ANSWER)], params, asked.num_samples, renderer)


_PARSER = BodyParser(ChatRequest, CHAT_FIELDS)


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    return await generate(request, _PARSER, _prepare)


register(
    Route(
        "POST",
        "/v1/chat/completions",
        chat,
        "Answer a conversation, whole or as a stream of events",
        ChatCompletion,
        ChatRequest,
        chunk=ChatChunk,
        errors=ERRORS,
    )
)
