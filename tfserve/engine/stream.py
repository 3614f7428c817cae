"""The front's end of one request: turns the core's tokens into text at the pace of whoever reads. Torch-free."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from tfserve.engine.messages import TokenOutput
from tfserve.errors import EngineDeadError
from tfserve.model.detokenizer import Detokenizer
from tfserve.types import FinishReason, RequestId, RequestOutput, TokenLogprob


class OutputBuffer:
    """Collects a request's TokenOutputs and gives everything new as one RequestOutput.

    A slow reader costs no more memory than the tokens themselves: text is made when it is taken.
    """

    def __init__(self, request_id: RequestId, num_prompt_tokens: int, detokenizer: Detokenizer) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
        self.num_output_tokens = 0
        self._detokenizer = detokenizer
        self._pending: list[TokenOutput] = []

    def add(self, output: TokenOutput) -> None:
        """Take one step's tokens."""
        self._pending.append(output)

    def take(self) -> RequestOutput | None:
        """Everything since the last call, or None if there is nothing."""
        if not self._pending:
            return None
        pending, self._pending = self._pending, []
        last = pending[-1]
        tokens = [token for output in pending for token in output.token_ids]
        logprobs: list[TokenLogprob] = [entry for output in pending for entry in output.logprobs or ()]
        self.num_output_tokens += len(tokens)
        # The token that ended the request (end of sequence, stop token) is no text.
        ended_by_token = last.finish_reason is FinishReason.STOP and not isinstance(last.stop_reason, str)
        text = self._detokenizer.push(tokens[:-1] if ended_by_token else tokens)
        if last.finish_reason is not None:
            text += self._detokenizer.finish()
        return RequestOutput(
            request_id=self.request_id,
            text=text,
            token_ids=tokens,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            logprobs=logprobs or None,
            prompt_logprobs=next((o.prompt_logprobs for o in pending if o.prompt_logprobs is not None), None),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            error=last.error,
            times=last.times,
        )


class RequestStream:
    """One request as an asyncio reader sees it. Belongs to the event loop it was made on."""

    def __init__(self, buffer: OutputBuffer, abort: Callable[[RequestId], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._buffer = buffer
        self._abort = abort
        self._news = asyncio.Event()
        self._death: str | None = None

    @property
    def request_id(self) -> RequestId:
        """The request's id."""
        return self._buffer.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return self._buffer.num_prompt_tokens

    async def next(self, timeout_s: float | None = None) -> RequestOutput | None:
        """Everything new since the last call; None if nothing came within the timeout. Raises EngineDeadError."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return None
        self._news.clear()
        output = self._buffer.take()
        if output is None and self._death is not None:
            self._news.set()
            raise EngineDeadError(self._death)
        if self._death is not None:
            self._news.set()
        return output

    def abort(self) -> None:
        """Stop the request and free what it holds; a finished one is left as it is."""
        self._abort(self.request_id)

    def put(self, output: TokenOutput) -> None:
        """Take one step's tokens (on the loop)."""
        self._buffer.add(output)
        self._news.set()

    def die(self, reason: str) -> None:
        """Let the reader have what has come, then the news of the engine's end (on the loop)."""
        self._death = reason
        self._news.set()


class Collector:
    """One request as a blocking caller sees it: all of its output at once, from any thread."""

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

    def put(self, output: TokenOutput) -> None:
        """Take one step's tokens."""
        self._buffer.add(output)
        if output.finish_reason is not None:
            self._done.set()

    def die(self, reason: str) -> None:
        """Release the waiting caller with an error."""
        self._death = reason
        self._done.set()
