"""Parameters and results of requests. Torch-free; everything that crosses a thread or a process is a msgspec Struct."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import Literal

import msgspec

from tfserve.checked import Checked
from tfserve.errors import RequestError
from tfserve.strict_json import is_text

RequestId = str

ConsumptionRate = float | str | None
"""How fast a request's reader reads: tokens/s, or "listen", "read", "fast" or "auto"; None without a reader."""

SLOWEST_RATE, FASTEST_RATE = 0.01, 1e6
"""Bounds of a request's rate in tokens/s, from a token in 100 seconds. Times and sums of rates stay finite."""

MAX_STOP_TOKENS = 128
"""Most stop tokens of one request: `min_tokens` forbids them, and other tokens must remain."""

MAX_LOGPROBS = 20
"""Most alternatives a request may ask for per token (OpenAI's limit for chat)."""


class FinishReason(enum.StrEnum):
    """Why a request ended; STOP and LENGTH are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Place(enum.Enum):
    """Where a text is: before its first word, in its thoughts, behind them, or in its answer."""

    BEFORE = enum.auto()
    THOUGHTS = enum.auto()
    BEHIND = enum.auto()
    ANSWER = enum.auto()


class PromptTokens(list[int]):
    """Token ids of a prompt after which the text begins in `begins_in`: the model may think before it answers.

    Thoughts have no reader: playback starts with the first token of the answer. After any other prompt all of the text
    is answer.
    """

    def __init__(self, token_ids: Iterable[int], begins_in: Place) -> None:
        super().__init__(token_ids)
        self.begins_in = begins_in

    def copy(self) -> PromptTokens:
        """The same prompt once more."""
        return PromptTokens(self, self.begins_in)


class SamplingParams(Checked, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters and stop conditions. Defaults are OpenAI's; `temperature=0` is greedy.

    `top_k=0` and `min_p=0` switch the filter off; `top_p=0` leaves the most likely token. `logprobs=k` returns the
    chosen token's log probability and the k most likely alternatives; they are taken from the model's distribution
    before temperature and filters. `seed` makes the request's random numbers a function of (seed, position) alone;
    without it the engine draws a seed at arrival.
    `prompt_logprobs=k` returns the same for the prompt's own tokens; with it, `max_tokens=0` generates nothing.
    `grammar` constrains the output; in llguidance's format (tfserve.model.grammars makes one from a JSON schema).
    `include_stop_str_in_output` keeps the stop string, or the stop token, at the end of the text.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def mistake(self, key: str, message: str) -> Exception:
        """See Checked."""
        return RequestError(key, f"{key} {message}")

    def verify(self, vocab_size: int) -> None:
        """Raise RequestError naming the first field whose value cannot be served with a vocabulary of `vocab_size`."""
        least = 1 if self.prompt_logprobs is None else 0
        enough = self.max_tokens is None or self.max_tokens >= least
        _require(enough, "max_tokens", self.max_tokens, f"an integer of at least {least}")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "an integer of at least 0")
        most = math.inf if self.max_tokens is None else self.max_tokens
        _require(self.min_tokens <= most, "min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        free = self.grammar is None or self.min_tokens == 0
        _require(free, "min_tokens", self.min_tokens, "0 where a grammar or JSON schema says when the text ends")
        ends = self.grammar is None or not self.ignore_eos
        _require(ends, "ignore_eos", self.ignore_eos, "false where a grammar or JSON schema says when the text ends")
        _require(0 <= self.temperature <= 2, "temperature", self.temperature, "between 0 and 2")
        _require(0 <= self.top_p <= 1, "top_p", self.top_p, "between 0 and 1")
        _require(-1 <= self.top_k < 2**31, "top_k", self.top_k, "a positive integer, or 0 or -1 for no limit")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        penalty = self.repetition_penalty
        # Larger values overflow the float32 logits.
        _require(0.01 <= penalty <= 100, "repetition_penalty", penalty, "between 0.01 and 100")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "between -2 and 2")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "between -2 and 2")
        for token, bias in (self.logit_bias or {}).items():
            _require(0 <= token < vocab_size, "logit_bias", token, f"keyed by token ids in [0, {vocab_size})")
            _require(-100 <= bias <= 100, "logit_bias", bias, "between -100 and 100 for every token")
        in_range = self.seed is None or -(2**63) <= self.seed < 2**63
        _require(in_range, "seed", self.seed, "a 64-bit integer")
        _require(all(self.stop), "stop", list(self.stop), "non-empty strings")
        _require(all(map(is_text, self.stop)), "stop", list(self.stop), "valid Unicode text")
        few = len(self.stop_token_ids) <= MAX_STOP_TOKENS
        _require(few, "stop_token_ids", len(self.stop_token_ids), f"at most {MAX_STOP_TOKENS} tokens")
        for token in self.stop_token_ids:
            _require(0 <= token < vocab_size, "stop_token_ids", token, f"token ids in [0, {vocab_size})")
        for name, top in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _require(top is None or 0 <= top <= MAX_LOGPROBS, name, top, f"between 0 and {MAX_LOGPROBS}")


def _require(ok: bool, param: str, value: object, meaning: str) -> None:
    if not ok:
        raise RequestError(param, f"{param} must be {meaning}, got {value!r}")


class Tenant(msgspec.Struct, frozen=True, array_like=True):
    """The tenant of a request. Tenants share the device by `weight`, which is above 0."""

    name: str = ""
    weight: float = 1.0


ONE_TENANT = Tenant()
"""The tenant of requests that name none."""


def nth_seed(seed: int, number: int) -> int:
    """The seed of choice `index`: the seed plus `index`, modulo 2**64."""
    return (seed + number + 2**63) % 2**64 - 2**63


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability (natural log) of one token and of the most likely alternatives in its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class RequestTimes(msgspec.Struct, frozen=True, array_like=True):
    """Times of a request, in seconds of the engine's clock, and its number of preemptions.

    `first_token_s` is that of the answer: None for one that ended in its thoughts. `stall_s` is the time its reader had
    nothing to read after the first token, by estimate or by the reader's reports. None without a reader, or if neither
    the request nor a report has given the rate.
    """

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0
    stall_s: float | None = None


class RequestOutput(msgspec.Struct, kw_only=True):
    """Text and tokens of one request: everything since the previous output when streamed, all of it from `generate`.

    `finish_reason` is None until the last output. `stop_reason` is the stop string or stop token id that ended the
    request, None for the model's own end-of-sequence token. `error` is set if `finish_reason` is ERROR. `retry_after_s`
    is set if the request was refused before it started, because the engine is overloaded. `recurs` is true if the same
    request would fail again. `prompt_logprobs`, if asked for, come with the first output: for all prompt tokens but the
    first, which has no prediction. The first `num_thought_tokens` of the `num_output_tokens` are the model's thoughts,
    tags included; 0 unless the prompt says that it may think.
    """

    request_id: RequestId
    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_output_tokens: int
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    times: RequestTimes | None = None
    retry_after_s: float | None = None
    recurs: bool = False
    num_thought_tokens: int = 0

    @property
    def finished(self) -> bool:
        """True on the last output of the request."""
        return self.finish_reason is not None


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's state of a live request. Rates in tokens/s; None without a reader, or before the first token.

    `phase` is waiting (no KV yet), running, paused (KV on the host) or loading (KV is copied back). `num_unread`
    tokens are generated and not read; they last for `time_to_empty_s`. `stall_s` is the time without anything to read;
    None without a reader, or if `rate` is the server's default and there was no report (`is_rate_assumed`).
    `reason` says why the request waits, is paused, or came back; None for one that has only been let in.
    The first `num_thought_tokens` of its output are thoughts, or may yet be; no reader has them to read.
    """

    id: RequestId
    phase: Literal["waiting", "running", "paused", "loading"]
    age_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    rate: float | None
    num_unread: float
    time_to_empty_s: float | None
    stall_s: float | None
    ttft_s: float | None
    num_preemptions: int
    is_rate_assumed: bool = False
    reason: str | None = None
    num_thought_tokens: int = 0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the engine after a step. Times in seconds of the engine's clock, KV in blocks.

    `num_paused` requests have their KV on the host; for `num_loading` it is being loaded. `bytes_stored` and
    `bytes_loaded` are totals of copies between the tiers; `num_dropped` preemptions dropped their KV. `device_busy_s`
    is the total time of steps. `device_idle_s` is the total time between steps, without the times when the loop slept
    because nothing could run.
    """

    now_s: float
    step: int
    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    num_preemptions: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_finished: int
    num_paused: int = 0
    num_loading: int = 0
    num_host_blocks: int = 0
    num_free_host_blocks: int = 0
    bytes_stored: int = 0
    bytes_loaded: int = 0
    num_dropped: int = 0
    device_busy_s: float = 0.0
    device_idle_s: float = 0.0

    @classmethod
    def at_start(cls, info: EngineInfo, now_s: float) -> EngineStats:
        """The state before the first step."""
        return cls(
            now_s=now_s,
            step=0,
            num_waiting=0,
            num_running=0,
            num_blocks=info.num_blocks,
            num_free_blocks=info.num_blocks - 1,
            block_size=info.block_size,
            num_preemptions=0,
            num_prompt_tokens=0,
            num_output_tokens=0,
            num_finished=0,
        )

    @property
    def device_idle_share(self) -> float:
        """Share of the working time in which the device waited for the loop; 0 before the first step."""
        return self.device_idle_s / max(self.device_busy_s + self.device_idle_s, 1e-12)


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The model, the machine and the limits, printed at start. `concurrency` requests of max_model_len fit in KV.

    `num_host_blocks` is the size of the host tier, for the KV of paused requests (0: no host tier); `host_tier_reason`
    explains the size. `grammars`: grammars are supported.
    """

    model: str
    architecture: str
    num_parameters: int
    dtype: str
    quantization: str | None
    device: str
    attention_backend: str
    policy: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    threads: int
    load_s: float
    num_host_blocks: int = 0
    host_tier_reason: str = ""
    grammars: bool = False

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that requests can use (one block is reserved)."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def concurrency(self) -> float:
        """Number of requests of full length that fit in the KV cache at once."""
        return self.kv_tokens / self.max_model_len
