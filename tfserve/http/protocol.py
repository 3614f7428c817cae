"""What clients may send: OpenAI's request bodies as Structs, with our own fields beside theirs."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated, Any, cast

import msgspec

from tfserve.engine.frontend.validation import check_length
from tfserve.errors import RequestError
from tfserve.http.chat_prompt import TemplateVariables
from tfserve.http.documented import between, documented
from tfserve.http.messages import Messages
from tfserve.http.structured import ResponseFormat
from tfserve.http.tools import ToolChoice, Tools
from tfserve.types import (
    FASTEST_RATE,
    MAX_LOGPROBS,
    SLOWEST_RATE,
    ConsumptionRate,
    EngineInfo,
    SamplingParams,
)

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer that fits the engine's messages."""

Count = Annotated[Int, documented(minimum=0)]
PositiveInt = Annotated[Int, documented(minimum=1)]
TokenId = Annotated[Int, documented(minimum=0)]

MAX_STOP = 64
"""Most stop strings or stop token ids of a request: each costs time at every token."""

MAX_STOP_CHARS = 256
"""Most characters of a stop string."""

StopText = Annotated[str, msgspec.Meta(max_length=MAX_STOP_CHARS), documented(minLength=1)]

MAX_BIASED = 300
"""Most tokens of a `logit_bias` (OpenAI's limit)."""

MAX_PROMPTS = 256
"""Most prompts of one completion request: all are tokenised before the queue can refuse any. Also its most choices."""

MAX_N = 128
"""Most choices for one prompt (OpenAI's limit)."""

RANDOM_SEED = -1
"""A seed that asks for none, as in vLLM and llama.cpp."""

NumLogprobs = Annotated[Int, between(0, MAX_LOGPROBS)]

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; chat has none but the context length."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """Extras of a streamed answer: `include_usage` adds a last chunk with token counts.

    With `continuous_usage_stats` (vLLM's) as well, every chunk has the counts so far.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class UsageWish(enum.Enum):
    """Which chunks of a stream carry token counts."""

    NEVER = enum.auto()
    LAST = enum.auto()
    ALWAYS = enum.auto()


LogitBias = Annotated[
    dict[int, Annotated[float, between(-100, 100)]],
    msgspec.Meta(max_length=MAX_BIASED),
    documented(propertyNames={"pattern": "^(0|[1-9][0-9]{0,17})$"}),
]

ReadingRate = Annotated[
    ConsumptionRate,
    documented(
        description="How fast the reader reads: tokens/s, or by name; null: there is no reader. What is above the"
        " server's highest rate is lowered to it, and the answer's header X-Consumption-Rate says what counts.",
        anyOf=[
            {"type": "number", "minimum": SLOWEST_RATE, "maximum": FASTEST_RATE},
            {"enum": ["listen", "read", "fast", "auto"]},
            {"type": "null"},
        ],
    ),
]


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields that chat and plain completions share. None means the default, as does leaving the field out.

    The lines after `stop` are not OpenAI's (`response_format` is, for chats); their names are vLLM's, but for
    `consumption_rate`: how fast the reader reads, in tokens/s or by name; there, null means that there is no reader.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    n: Annotated[Int, between(1, MAX_N)] | None = None
    temperature: Annotated[float, between(0, 2)] | None = None
    top_p: Annotated[float, between(0, 1)] | None = None
    frequency_penalty: Annotated[float, between(-2, 2)] | None = None
    presence_penalty: Annotated[float, between(-2, 2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[Int, documented(description="-1 is random.")] | None = None
    stop: StopText | Annotated[list[StopText], msgspec.Meta(max_length=MAX_STOP)] | None = None
    top_k: Annotated[Int, between(-1, 2**31 - 1)] | None = None
    min_p: Annotated[float, between(0, 1)] | None = None
    repetition_penalty: Annotated[float, between(0.01, 100)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_STOP)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    priority: Int | None = None
    consumption_rate: ReadingRate | msgspec.UnsetType = msgspec.UNSET

    @property
    def usage_wish(self) -> UsageWish:
        """Which chunks carry token counts. Raises RequestError when the answer is not streamed at all."""
        options = self.stream_options
        if options is None:
            return UsageWish.NEVER
        if not options.include_usage:
            if options.continuous_usage_stats:
                message = "stream_options.continuous_usage_stats needs stream_options.include_usage to be true"
                raise RequestError("stream_options", message)
            return UsageWish.NEVER
        if not self.stream:
            raise RequestError("stream_options", "stream_options.include_usage needs stream to be true")
        return UsageWish.ALWAYS if options.continuous_usage_stats else UsageWish.LAST

    @property
    def reading_rate(self) -> ConsumptionRate | msgspec.UnsetType:
        """The rate for the engine (UNSET: its default). What comes whole has no reader, unless it names a rate."""
        is_whole = not self.stream and self.consumption_rate is msgspec.UNSET
        return None if is_whole else self.consumption_rate

    @property
    def num_samples(self) -> int:
        """How many choices each prompt gets. Raises RequestError."""
        n = 1 if self.n is None else self.n
        if not 1 <= n <= MAX_N:
            raise RequestError("n", f"n must be between 1 and {MAX_N}, got {n}")
        return n

    def output_limit(self, least: int) -> int | None:
        """The most tokens to generate, by either of its names; the newer one counts. Raises RequestError."""
        newer = self.max_completion_tokens
        name, limit = ("max_tokens", self.max_tokens) if newer is None else ("max_completion_tokens", newer)
        if limit is not None and limit < least:
            raise RequestError(name, f"{name} must be an integer of at least {least}, got {limit}")
        return limit

    @property
    def names(self) -> dict[str, str]:
        """How the client called what the engine's errors name otherwise: by the engine's name."""
        limit = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return {**limit, "prompt_logprobs": "logprobs", "grammar": "response_format"}

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's parameters. The engine checks the values; here only what it could not name is checked."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        given: dict[str, Any] = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if stop:
            given["stop"] = tuple(stop)
        if self.stop_token_ids:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.seed == RANDOM_SEED:
            del given["seed"]
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)


_SAMPLING_FIELDS = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if name in GenerationRequest.__struct_fields__ and name not in {"max_tokens", "stop", "stop_token_ids"}
)


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None

    @property
    def names(self) -> dict[str, str]:
        """As for all requests; the prompt is made of messages, and a grammar may be that of the tools."""
        names = {**super().names, "prompt": "messages"}
        asked = self.response_format
        return names if asked is not None and asked.type != "text" else {**names, "grammar": "tools"}

    def sampling_params(self) -> SamplingParams:
        """Parameters for the engine. Raises RequestError in this endpoint's own field names."""
        top = self.top_logprobs
        if top and not self.logprobs:
            raise RequestError("top_logprobs", "top_logprobs needs logprobs to be true")
        if top is not None and not 0 <= top <= MAX_LOGPROBS:
            raise RequestError("top_logprobs", f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {top}")
        return self.sampling(self.output_limit(1), (top or 0) if self.logprobs else None)


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}

_PROMPTS = [
    {"type": "string"},
    {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
    _IDS,
    {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
]

_CompletionLimit = Annotated[Int, documented(minimum=0, description="0 only with echo.")]


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/completions. `prompt` is a string, token ids, or a list of either."""

    prompt: Annotated[str | list[str | Int | list[Int]], documented(anyOf=_PROMPTS)]
    max_tokens: _CompletionLimit | None = None
    max_completion_tokens: _CompletionLimit | None = None
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    best_of: Annotated[Int, between(1, MAX_N)] | None = None

    def prompts(self, info: EngineInfo) -> Sequence[str | list[int]]:
        """The prompts, one per answer. Raises RequestError for an empty or mixed list, and for ids that cannot fit."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        is_ids = isinstance(self.prompt[0], int) if self.prompt else False
        if is_ids:
            check_length(len(self.prompt), info)
        elif len(self.prompt) > MAX_PROMPTS:
            raise RequestError("prompt", f"{len(self.prompt)} prompts in one request; send at most {MAX_PROMPTS}")
        if len(set(map(type, self.prompt))) != 1:
            meaning = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
            raise RequestError("prompt", f"prompt must be {meaning}; it must not be empty and not mix them")
        prompts = cast(Sequence[str | list[int]], [self.prompt] if is_ids else self.prompt)
        for prompt in prompts:
            if isinstance(prompt, list):
                check_length(len(prompt), info)
        if len(prompts) * self.num_samples > MAX_PROMPTS:
            wish = f"{len(prompts)} prompts with n={self.num_samples} are too many"
            raise RequestError("n", f"{wish}; one request may have at most {MAX_PROMPTS} choices")
        return prompts

    def sampling_params(self) -> SamplingParams:
        """Parameters for the engine. Raises RequestError."""
        if self.best_of is not None and self.best_of != self.num_samples:
            message = f"best_of must equal n ({self.num_samples}), got {self.best_of}: no choices are thrown away here"
            raise RequestError("best_of", message)
        limit = self.output_limit(0 if self.echo else 1)
        params = self.sampling(COMPLETION_MAX_TOKENS if limit is None else limit, self.logprobs)
        if self.echo and (self.logprobs is not None or params.max_tokens == 0):
            params = msgspec.structs.replace(params, prompt_logprobs=self.logprobs or 0)
        return params
