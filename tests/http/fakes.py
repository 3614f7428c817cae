"""An engine that speaks when it is told to: scripted replies, no model, no threads."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from tfserve.config import EngineConfig
from tfserve.engine.scheduling.token_buffer import resolve_rate
from tfserve.errors import ConfigError, EngineDeadError, EngineStalledError, ModelError, QueueFullError, RequestError
from tfserve.messages import StepOutputs
from tfserve.model.text.chat_template import ToolFormat
from tfserve.model.text.thoughts import thought_counter
from tfserve.types import (
    ONE_TENANT,
    EngineInfo,
    EngineStats,
    FinishReason,
    PromptTokens,
    RequestOutput,
    RequestTimes,
    SamplingParams,
    StreamState,
    Tenant,
    TokenLogprob,
    nth_seed,
)

VOCAB = 300
MAX_LEN = 1000
BOS = 256


class FakeTokenizer:
    """One token per UTF-8 byte; 256 begins a text."""

    special_ids = frozenset({BOS})
    leading_spaces = 0
    tool_format: ToolFormat | None = ToolFormat.HERMES
    thinks = False
    template_variables = frozenset({"messages", "add_generation_prompt", "tools"})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def exceeds(self, text: str, most: int) -> bool:
        return len(text.encode()) > 8 * most

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = [
            self.token_bytes(token) for token in token_ids if not (skip_special_tokens and token in self.special_ids)
        ]
        return b"".join(shown).decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
        for shown in (kwargs.get("tools"), calls):
            if shown:
                text = json.dumps(shown) + text
        return text + "<assistant>" * add_generation_prompt

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<s>"


class FakeStream:
    """One request, with `say`, `finish` and `fail` for the test to play the engine."""

    def __init__(self, engine: FakeEngine, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.num_prompt_tokens = len(prompt)
        self.aborted = asyncio.Event()
        self.reads = 0
        self.on_output: Callable[[], None] | None = None
        self.started = False
        self.is_refused = False
        self.num_output_tokens = 0
        self.num_chars = 0
        self.num_thought_tokens = 0
        self.thoughts = thought_counter(getattr(prompt, "begins_in", None), engine.tokenizer)
        self.token_s: list[float] = []
        self.played: list[int] = []
        self._engine = engine
        self._pending: list[RequestOutput] = []
        self._ended = False
        self._is_called = False
        self._spoken = False

    @property
    def may_think(self) -> bool:
        return self.thoughts is not None and not self.thoughts.is_over

    @property
    def num_waiting(self) -> int:
        return sum(len(output.token_ids) for output in self._pending)

    def take(self, most: int | None = None) -> RequestOutput | None:
        self.reads += 1
        if not self._pending:
            if self._engine.death:
                raise EngineDeadError(self._engine.death)
            return None
        pending, self._pending = self._pending[:most], self._pending[most:] if most else []
        output = pending[-1]
        output.text = "".join(each.text for each in pending)
        output.token_ids = [token for each in pending for token in each.token_ids]
        output.logprobs = [entry for each in pending for entry in each.logprobs or ()] or None
        output.prompt_logprobs = next(
            (each.prompt_logprobs for each in pending if each.prompt_logprobs is not None), None
        )
        self.num_output_tokens += len(output.token_ids)
        if self.thoughts is not None:
            self.thoughts.push(output.token_ids)
            self.num_thought_tokens = output.num_thought_tokens = self.thoughts.num_tokens
        self.num_chars += len(output.text)
        if self._engine.death:
            self._notify()
        return output

    def report_played(self, num_tokens: int) -> None:
        self.played.append(num_tokens)

    def abort(self) -> None:
        if not self._ended:
            self.aborted.set()
            if not self._engine.stuck:
                self._put([], "", FinishReason.ABORT)

    def begin(self) -> None:
        """Let the request in; it has no token yet."""
        self.started = True
        self._notify()

    def refuse(self, retry_after_s: float) -> None:
        """What the policy does to a newcomer when it sheds."""
        self.is_refused = True
        self._put([], "", FinishReason.ERROR, "overloaded", retry_after_s=retry_after_s)

    def say(
        self, text: str, finish: FinishReason | None = None, tokens: int | None = None, preemptions: int = 3
    ) -> None:
        """Generate `text`, a token per byte (or `tokens` tokens)."""
        ids = list(text.encode()) if tokens is None else [97] * tokens
        self._put(ids, text, finish, preemptions=preemptions)

    def fail(self, message: str, recurs: bool = False) -> None:
        self._put([], "", FinishReason.ERROR, message, recurs=recurs)

    def die(self) -> None:
        self._ended = self.started = True
        self._notify()

    @property
    def _stall_s(self) -> float | None:
        """As the real one: a stall is known where the request named a rate, or a report came from its reader."""
        is_known = self.asked_rate not in (None, msgspec.UNSET, "auto") or (self.played and self.asked_rate is not None)
        return 0.5 if is_known else None

    def _notify(self) -> None:
        """As the real one does: once for all that has come by the time the loop comes round."""
        if not self._is_called:
            self._is_called = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._is_called = False
        if self.on_output is not None:
            self.on_output()

    def _put(
        self,
        ids: list[int],
        text: str,
        finish: FinishReason | None,
        error: str | None = None,
        preemptions: int = 3,
        **more: Any,
    ) -> None:
        if self._ended:
            return
        self._ended = finish is not None
        self.started = True
        if self.params.max_tokens == 0:
            ids, text = [], ""
        self.token_s += [time.monotonic()] * len(ids)
        prompt_logprobs = None
        if not self._spoken:
            prompt_logprobs = _fake_logprobs(self.prompt[1:], self.params.prompt_logprobs)
        self._spoken = True
        logprobs = _fake_logprobs(ids, self.params.logprobs)
        output = RequestOutput(
            request_id=self.request_id,
            text=text,
            token_ids=ids,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=len(ids),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            error=error,
            times=RequestTimes(1.0, 1.0, 1.25, 2.0, preemptions, self._stall_s) if finish else None,
            **more,
        )
        self._pending.append(output)
        self._notify()


def _fake_logprobs(ids: Sequence[int], top: int | None) -> list[TokenLogprob] | None:
    if top is None:
        return None
    best = tuple((98 + rank, -1.0 - rank) for rank in range(top))
    return [TokenLogprob(token, -0.5, best) for token in ids]


class FakeEngine:
    """Answers each request with `reply`, word by word, every `step_s`; with `reply=None` the test speaks instead."""

    def __init__(self, config: EngineConfig, reply: str | None = "Hello, wide world", step_s: float = 0.0) -> None:
        self.config = config
        self.tokenizer = FakeTokenizer()
        self.reply = reply
        self.step_s = step_s
        self.live: list[FakeStream] = []
        self.submitted = asyncio.Event()
        self.queue_full = False
        self.stuck = False
        self.death = ""
        self.info = fake_info(config)
        self.step_callbacks: list[Callable[[StepOutputs], None]] = []
        self._callbacks: list[Callable[[str], None]] = []
        self._speakers: set[asyncio.Task[None]] = set()

    def submit_choices(
        self, prompt: Sequence[int], params: SamplingParams, request_ids: Sequence[str], **more: Any
    ) -> list[FakeStream]:
        seeds = [None if params.seed is None else nth_seed(params.seed, number) for number in range(len(request_ids))]
        each = [msgspec.structs.replace(params, seed=seed) for seed in seeds]
        return [self.submit(prompt, one, request_id=name, **more) for one, name in zip(each, request_ids, strict=True)]

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        rate=msgspec.UNSET,
        priority: int = 0,
        tenant: Tenant = ONE_TENANT,
    ) -> FakeStream:
        assert request_id not in {stream.request_id for stream in self.live}
        if self.death:
            raise EngineDeadError(self.death)
        ids = prompt.copy() if isinstance(prompt, PromptTokens) else list(prompt)
        for token in ids:
            if not 0 <= token < VOCAB:
                raise RequestError("prompt", f"token id {token} is not in the vocabulary [0, {VOCAB})")
        params.verify(VOCAB)
        resolve_rate(20.0 if rate is msgspec.UNSET else rate, 20.0)
        if len(ids) >= MAX_LEN:
            raise RequestError("prompt", f"the prompt has {len(ids)} tokens", "context_length_exceeded")
        if self.queue_full:
            raise QueueFullError("too many requests wait", retry_after_s=2.4)
        msgspec.msgpack.encode((list(ids), params))  # the real one sends them to another process
        stream = FakeStream(self, request_id, ids, params)
        stream.rate = resolve_rate(20.0 if rate is msgspec.UNSET else rate, 20.0)
        stream.asked_rate = rate
        stream.asked_priority = priority
        stream.tenant = tenant
        self.live.append(stream)
        self.submitted.set()
        if self.reply is not None:
            speaker = asyncio.ensure_future(self._speak(stream, self.reply))
            self._speakers.add(speaker)
            speaker.add_done_callback(self._speakers.discard)
        return stream

    async def _speak(self, stream: FakeStream, reply: str) -> None:
        words = reply.split(" ")
        for number, word in enumerate(words):
            await asyncio.sleep(self.step_s)
            last = number == len(words) - 1
            stream.say(word if last else f"{word} ", FinishReason.STOP if last else None)

    def die(self, reason: str) -> None:
        self.death = reason
        for stream in self.live:
            stream.die()
        for callback in self._callbacks:
            callback(reason)

    def stats(self) -> EngineStats:
        return EngineStats(
            now_s=10.0,
            step=7,
            num_waiting=0,
            num_running=len(self.live),
            num_blocks=101,
            num_free_blocks=76,
            block_size=32,
            num_preemptions=3,
            num_prompt_tokens=40,
            num_output_tokens=50,
            num_finished=2,
            num_dropped=1,
        )

    async def streams(self) -> list[StreamState]:
        return [
            StreamState(
                id=stream.request_id,
                phase="running" if stream.started else "waiting",
                age_s=2.0,
                num_prompt_tokens=stream.num_prompt_tokens,
                num_output_tokens=stream.num_output_tokens,
                max_tokens=100,
                rate=20.0,
                num_unread=5.0,
                time_to_empty_s=0.25,
                stall_s=0.0,
                ttft_s=0.5,
                num_preemptions=0,
            )
            for stream in self.live
        ]

    def check_health(self) -> None:
        if self.stuck:
            raise EngineStalledError("no progress for 120 s")

    def on_step(self, callback: Callable[[StepOutputs], None]) -> None:
        self.step_callbacks.append(callback)

    def on_death(self, callback: Callable[[str], None]) -> None:
        self._callbacks.append(callback)

    def shutdown(self, timeout_s: float) -> None:
        print("fake engine: shutdown", flush=True)


def fake_info(config: EngineConfig) -> EngineInfo:
    return EngineInfo(
        model=config.model,
        architecture="FakeForCausalLM",
        num_parameters=134_500_000,
        dtype="float32",
        quantization=None,
        device="cpu",
        attention_backend="torch",
        policy="fcfs",
        max_model_len=MAX_LEN,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        vocab_size=VOCAB,
        block_size=32,
        num_blocks=101,
        kv_bytes_per_token=1024,
        threads=2,
        load_s=0.1,
        grammars=True,
    )


def load_slowly(config: EngineConfig) -> FakeEngine:
    """Takes a second, as models do."""
    time.sleep(1.0)
    return FakeEngine(config)


def load_badly(config: EngineConfig) -> FakeEngine:
    raise ModelError("model.safetensors is truncated")


def load_impossible(config: EngineConfig) -> FakeEngine:
    raise ConfigError("device", "cuda: no CUDA device here")


def load_mortal(config: EngineConfig) -> FakeEngine:
    """Dies of the token 'kill' in any prompt, from another thread as the real one does."""

    class Mortal(FakeEngine):
        def submit(self, prompt, params, **options):
            stream = super().submit(prompt, params, **options)
            if b"kill" in bytes(token for token in stream.prompt if token < 256):
                asyncio.get_running_loop().call_later(0.3, self.die, "killed by signal 9")
            return stream

    return Mortal(config, reply="word " * 1000, step_s=0.02)


def load_chatty(config: EngineConfig) -> FakeEngine:
    """Speaks for a second per request."""
    return FakeEngine(config, reply=" ".join(["word"] * 50), step_s=0.02)
