"""POST /v1/chat/completions."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from tfserve.engine.frontend.validation import require_grammars
from tfserve.errors import RequestError
from tfserve.http.answer import Job, Result, encode_prompt
from tfserve.http.chat_prompt import chat_prompt
from tfserve.http.endpoint import GenerationEndpoint
from tfserve.http.known_fields import CHAT_FIELDS
from tfserve.http.off_loop import off_loop
from tfserve.http.parsing import BodyParser
from tfserve.http.ports import EnginePort
from tfserve.http.protocol import ChatRequest, UsageWish
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
    Delta,
    FunctionCallReply,
    ToolCallReply,
    TopLogprob,
    Usage,
)
from tfserve.http.service import Service
from tfserve.http.sse import event
from tfserve.http.structured import response_grammar
from tfserve.http.tool_parsing import ToolCallParser, tool_call_parser
from tfserve.http.tools import ToolPlan
from tfserve.types import EngineInfo, FinishReason, RequestOutput, TokenLogprob


class ChatRenderer:
    """One chat answer in OpenAI's words. `parser` makes a parser of tool calls for a choice; None: it may call none."""

    def __init__(self, head: AnswerHead, parser: Callable[[], ToolCallParser] | None, parallel_calls: bool) -> None:
        self.id = head.id
        self._head = head
        self._parser = parser
        self._parallel_calls = parallel_calls
        self._choices: dict[int, _Choice] = {}

    def chunk(self, index: int, output: RequestOutput, usage: Usage) -> bytes:
        """Events for what is new in choice `index`: the role comes first, the finish reason with the last text."""
        if tells_nothing(output):
            return b""
        start = b""
        if index not in self._choices:
            self._choices[index] = self._begin()
            start = self._event(ChatChunkChoice(index, Delta(role="assistant", content="")), usage)
        choice = self._choices[index]
        content, calls = choice.read(output.text, output.finished)
        logprobs = self._logprobs(output.logprobs)
        if not (content or calls or logprobs or output.finished):
            return start
        delta = Delta()
        if content:
            delta.content = content
        if calls:
            delta.tool_calls = calls
        return start + self._event(ChatChunkChoice(index, delta, logprobs, choice.reason(output.finish_reason)), usage)

    def template(self, index: int) -> tuple[bytes, bytes] | None:
        """What surrounds the text in every further event of choice `index` that has nothing else.

        None where the text may hold tool calls, or each event tells the token counts.
        """
        head = self._head
        if self._parser is not None or head.wish is UsageWish.ALWAYS:
            return None
        choice = ChatChunkChoice(index, Delta(content=self.id))
        data = event(
            head.encode(ChatChunk(head.id, head.created, head.model, [choice], head.chunk_usage(Usage(0, 0, 0))))
        )
        before, after = data.rsplit(head.encode(self.id), 1)
        return before, after

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event with token counts; empty when the client did not ask for it."""
        head = self._head
        if head.wish is UsageWish.NEVER:
            return b""
        return event(head.encode(ChatChunk(head.id, head.created, head.model, [], usage)))

    def whole(self, results: Sequence[Result], usage: Usage) -> bytes:
        """The JSON body of an answer that is not streamed."""
        head = self._head
        choices = [head.part(self._whole_choice(index, result)) for index, result in enumerate(results)]
        return head.encode(ChatCompletion(head.id, head.created, head.model, choices, usage))

    def _whole_choice(self, index: int, result: Result) -> ChatChoice:
        choice = self._begin()
        content, calls = choice.read("".join(result.text), finished=True)
        message = AssistantMessage(content)
        if calls:
            message.content = content or None
            for call in calls:
                call.index = UNSET
            message.tool_calls = calls
        reason = choice.reason(result.finish_reason) or ""
        return ChatChoice(index, message, self._logprobs(list(result.logprobs)), reason)

    def _begin(self) -> _Choice:
        return _Choice(self._parser() if self._parser else None, self._parallel_calls)

    def _event(self, choice: ChatChunkChoice, usage: Usage) -> bytes:
        head = self._head
        return event(
            head.encode(ChatChunk(head.id, head.created, head.model, [choice], head.chunk_usage(usage))),
        )

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


class _Choice:
    """One choice as far as it has come: which tool calls there were in it."""

    def __init__(self, parser: ToolCallParser | None, parallel_calls: bool) -> None:
        self._parser = parser
        self._most_calls = math.inf if parallel_calls else 1
        self._num_calls = 0

    def read(self, text: str, finished: bool) -> tuple[str, list[ToolCallReply]]:
        """New text for the reader and new calls in `text`, which is the last if `finished`."""
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
                id = f"call_{uuid.uuid4().hex}"
                calls.append(ToolCallReply(index=self._num_calls, id=id, type="function", function=function))
                self._num_calls += 1
        return content, calls

    def reason(self, finish_reason: str | None) -> str | None:
        """The finish reason in OpenAI's words."""
        return "tool_calls" if self._num_calls and finish_reason == FinishReason.STOP else finish_reason


async def _grammar(asked: ChatRequest, tools: ToolPlan, info: EngineInfo) -> str | None:
    """What the answer must follow, checked: a forced call or the response format. Raises TfserveError."""
    wanted = await response_grammar(asked.response_format, info)
    if wanted is not None and tools.format is not None:
        message = "response_format: JSON cannot be had together with tools; send tool_choice 'none' or leave one out"
        raise RequestError("response_format", message)
    forced = await tools.grammar()
    if forced is None:
        return wanted
    require_grammars(info, "tool_choice")
    return forced


class ChatEndpoint(GenerationEndpoint[ChatRequest]):
    """Answers chat requests."""

    def __init__(self, service: Service) -> None:
        super().__init__(service, BodyParser(ChatRequest, CHAT_FIELDS))

    async def prepare(self, asked: ChatRequest, size: int, model: str, engine: EnginePort) -> Job:
        """The conversation as one prompt, by the model's template."""
        tokenizer = engine.tokenizer
        parallel = asked.parallel_tool_calls is not False
        tools = ToolPlan(asked.tools, asked.tool_choice, parallel, tokenizer.tool_format)
        await tools.measure()
        grammar = await _grammar(asked, tools, engine.info)
        params = msgspec.structs.replace(asked.sampling_params(), grammar=grammar)
        parser = None if tools.format is None else partial(tool_call_parser, tools.format, tools.names)
        renderer = ChatRenderer(AnswerHead("chatcmpl", model, tokenizer, asked.usage_wish), parser, parallel)
        text = await off_loop(size, chat_prompt, tokenizer, asked.messages, asked, tools.for_template)
        # The template has written the special tokens already.
        prompt = await encode_prompt(engine, text, add_special_tokens=bool(asked.add_special_tokens))
        return Job([prompt], params, asked.num_samples, renderer)
