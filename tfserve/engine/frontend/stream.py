"""The stream of one request: turns the core's tokens into text when the reader takes it. Torch-free."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import Callable, Sequence

from tfserve.errors import EngineDeadError, RequestError
from tfserve.messages import TokenOutput
from tfserve.model.text.detokenizer import Detokenizer
from tfserve.model.text.thoughts import ThoughtCounter
from tfserve.packed_logprobs import PackedLogprobs
from tfserve.types import FinishReason, RequestId, RequestOutput


class OutputBuffer:
    """Collects a request's TokenOutputs; `take` returns everything new as one RequestOutput.

    Waiting tokens take twelve bytes each: text is made when it is taken. Waiting log probabilities are packed.
    `token_s` is the arrival time of each token by time.monotonic. Of what was taken so far, `num_thought_tokens` are
    `thoughts`, which count if there are any to come, and `num_chars` is about the length of the answer without them.
    """

    def __init__(
        self,
        request_id: RequestId,
        num_prompt_tokens: int,
        detokenizer: Detokenizer,
        thoughts: ThoughtCounter | None = None,
    ) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
        self.num_output_tokens = 0
        self.num_thought_tokens = 0
        self.num_chars = 0
        self.token_s = array("d")
        self._detokenizer = detokenizer
        self._thoughts = thoughts
        self._tokens = array("i")
        self._logprobs = PackedLogprobs()
        self._prompt_logprobs: PackedLogprobs | None = None
        self._last: TokenOutput | None = None

    def add(self, output: TokenOutput, now_s: float) -> None:
        """Take one step's tokens."""
        self._tokens.extend(output.token_ids)
        for _ in output.token_ids:
            self.token_s.append(now_s)
        if output.logprobs is not None:
            self._logprobs.extend(output.logprobs)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = PackedLogprobs()
            self._prompt_logprobs.extend(output.prompt_logprobs)
        if output.finish_reason is not None:
            self._last = output

    @property
    def num_waiting(self) -> int:
        """Tokens that have arrived and were not taken."""
        return len(self._tokens)

    @property
    def may_think(self) -> bool:
        """True until a token of the answer, or the end of the thoughts before it, has been taken."""
        return self._thoughts is not None and not self._thoughts.is_over

    @property
    def is_refused(self) -> bool:
        """True if the policy has refused the request and that output was not taken yet."""
        return self._last is not None and self._last.retry_after_s is not None

    def take(self, most: int | None = None) -> RequestOutput | None:
        """Everything since the last call, or its first `most` tokens; None if there is nothing."""
        last = self._last
        if most is not None and most < len(self._tokens):
            last = None
        elif not self._tokens and last is None:
            return None
        tokens = self._tokens[:most].tolist()
        del self._tokens[:most]
        if last is not None:
            self._last = None
        self.num_output_tokens += len(tokens)
        of_prompt, self._prompt_logprobs = self._prompt_logprobs, None
        text = self._text(tokens, last)
        self.num_chars += len(text) if self._thoughts is None else self._part(self._thoughts, tokens, len(text))
        output = RequestOutput(
            request_id=self.request_id,
            text=text,
            token_ids=tokens,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_thought_tokens=self.num_thought_tokens,
            logprobs=self._logprobs.take(len(tokens)) if self._logprobs else None,
            prompt_logprobs=None if of_prompt is None else list(of_prompt),
        )
        if last is not None:
            output.finish_reason = last.finish_reason
            output.stop_reason = last.stop_reason
            output.error = last.error
            output.times = last.times
            output.retry_after_s = last.retry_after_s
            output.recurs = last.recurs
        return output

    def _part(self, thoughts: ThoughtCounter, tokens: Sequence[int], num_chars: int) -> int:
        """Count the thoughts among new tokens; how many of their characters are the answer's, by its share of them."""
        thoughts.push(tokens)
        num_new, self.num_thought_tokens = thoughts.num_tokens - self.num_thought_tokens, thoughts.num_tokens
        return num_chars * max(len(tokens) - num_new, 0) // max(len(tokens), 1)

    def _text(self, tokens: Sequence[int], last: TokenOutput | None) -> str:
        if last is None:
            return self._detokenizer.push(tokens)
        ended_by_token = last.finish_reason is FinishReason.STOP and not isinstance(last.stop_reason, str)
        # The token that ended the request (end of sequence, stop token) is not part of the text unless it is asked for.
        is_text = self._detokenizer.include_stop or not ended_by_token
        text = self._detokenizer.push(tokens if is_text else tokens[:-1])
        return text + self._detokenizer.finish()


class RequestStream:
    """The stream of one request for asyncio. It belongs to the event loop it was created on.

    Read it by `next`. Or set `on_output`, which is called on the loop once for everything new, and then call `take`.
    `rate` is the reader's speed in tokens/s as known at the start; NaN without a reader. `started` is true once the
    request has been admitted, or has ended.
    """

    def __init__(
        self,
        buffer: OutputBuffer,
        rate: float,
        abort: Callable[[RequestId], None],
        report_played: Callable[[RequestId, int], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.on_output: Callable[[], None] | None = None
        self.started = False
        self.rate = rate
        self._buffer = buffer
        self._abort = abort
        self._report_played = report_played
        self._news = asyncio.Event()
        self._is_over = False
        self._death: str | None = None

    @property
    def request_id(self) -> RequestId:
        """The request's id."""
        return self._buffer.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return self._buffer.num_prompt_tokens

    @property
    def is_refused(self) -> bool:
        """True once the policy has refused the request, until that output is taken."""
        return self._buffer.is_refused

    @property
    def num_output_tokens(self) -> int:
        """Tokens taken so far."""
        return self._buffer.num_output_tokens

    @property
    def num_thought_tokens(self) -> int:
        """Those of them that are thoughts."""
        return self._buffer.num_thought_tokens

    @property
    def may_think(self) -> bool:
        """True until a token of the answer, or the end of the thoughts before it, has been taken."""
        return self._buffer.may_think

    @property
    def num_chars(self) -> int:
        """About how many characters of the answer were taken so far."""
        return self._buffer.num_chars

    @property
    def num_waiting(self) -> int:
        """Tokens that have arrived and were not taken."""
        return self._buffer.num_waiting

    @property
    def token_s(self) -> Sequence[float]:
        """Arrival time of each token, taken or not, by time.monotonic."""
        return self._buffer.token_s

    async def next(self, timeout_s: float | None = None) -> RequestOutput | None:
        """Everything new since the last call; None if nothing arrived within the timeout.

        Raises EngineDeadError, and RequestError after the last output (the one that is `finished`).
        """
        if self._is_over:
            raise RequestError(None, f"request {self.request_id} has finished: there is no output after the last one")
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._news.wait()
                    self._news.clear()
                    output = self.take()
                    if output is not None:
                        return output
        except TimeoutError:
            return None

    def take(self, most: int | None = None) -> RequestOutput | None:
        """Everything new since the last call, or its first `most` tokens, without waiting; None if there is nothing.

        Raises EngineDeadError if the engine has ended.
        """
        output = self._buffer.take(most)
        if self._death is not None:
            if output is None:
                raise EngineDeadError(self._death)
            # The reader has all text; notify it again, so that it takes the end.
            self.loop.call_soon(self.notify)
        if output is not None and output.finished:
            self._is_over = True
        return output

    def abort(self) -> None:
        """Stop the request and free what it holds; no effect on a finished one."""
        self._abort(self.request_id)

    def report_played(self, num_tokens: int) -> None:
        """Report that the reader has read `num_tokens` of the answer; this replaces the scheduler's estimate."""
        self._report_played(self.request_id, num_tokens)

    def put(self, output: TokenOutput, now_s: float) -> None:
        """Take one step's tokens (on the loop); `notify` tells the reader."""
        self.started = True
        self._buffer.add(output, now_s)

    def start(self) -> None:
        """The request has been admitted (on the loop); `notify` tells the reader."""
        self.started = True

    def notify(self) -> None:
        """Notify the reader of something new (on the loop)."""
        self._news.set()
        if self.on_output is not None:
            self.on_output()

    def die(self, reason: str) -> None:
        """The engine has ended: the reader gets what has arrived, then an error (on the loop)."""
        self._death = reason
        self.started = True
        self.notify()


class Collector:
    """The output of one request for a blocking caller: all of it at once, from any thread."""

    loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, buffer: OutputBuffer) -> None:
        self._buffer = buffer
        self._done = threading.Event()
        self._death: str | None = None

    def result(self) -> RequestOutput:
        """The finished request; waits for it. Raises EngineDeadError."""
        self._done.wait()
        output = self._buffer.take()
        if self._death is not None or output is None:
            raise EngineDeadError(self._death or "the request ended without output")
        return output

    def put(self, output: TokenOutput, now_s: float) -> None:
        """Take one step's tokens."""
        self._buffer.add(output, now_s)
        if output.finish_reason is not None:
            self._done.set()

    def die(self, reason: str) -> None:
        """Raise an error in the waiting caller."""
        self._death = reason
        self._done.set()
