"""What the HTTP room needs of an engine, and no more: the real Engine fits, and so does the fake of the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from msgspec import UNSET, UnsetType

from tfserve.config import EngineConfig
from tfserve.messages import StepOutputs
from tfserve.model.chat_template import ToolFormat
from tfserve.types import (
    ONE_TENANT,
    ConsumptionRate,
    EngineInfo,
    EngineStats,
    RequestOutput,
    SamplingParams,
    StreamState,
    Tenant,
)


class TokenizerPort(Protocol):
    """Text to token ids and back, on the HTTP side."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text."""
        ...

    @property
    def leading_spaces(self) -> int:
        """How many spaces the first token of a text loses."""
        ...

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes tool calls; None if its chat template shows no tools."""
        ...

    @property
    def thinks(self) -> bool:
        """True if the chat template parts the thoughts in an answer from the rest."""
        ...

    @property
    def template_variables(self) -> frozenset[str]:
        """Names that the model's chat template reads; none if it has no template."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...

    def exceeds(self, text: str, most: int) -> bool:
        """True for a text of more than `most` tokens that is much longer than such texts are."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt text of a conversation, ready for the assistant's answer if so asked; raises RequestError.

        `kwargs` are the template's.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; may be part of a UTF-8 character."""
        ...


class StreamPort(Protocol):
    """One request inside the engine.

    `on_news` is called on the event loop when something has come, once for all that came meanwhile. `started` is true
    once the request has been let in, or has ended.
    """

    on_news: Callable[[], None] | None
    started: bool

    @property
    def request_id(self) -> str:
        """The engine's name for the request."""
        ...

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, special tokens included."""
        ...

    @property
    def is_refused(self) -> bool:
        """True once the engine has refused the request; its one output says when to try again."""
        ...

    @property
    def rate(self) -> float:
        """How fast the request is read, tokens/s; NaN without a reader."""
        ...

    @property
    def num_output_tokens(self) -> int:
        """Tokens taken so far."""
        ...

    @property
    def num_chars(self) -> int:
        """Characters of text taken so far."""
        ...

    @property
    def num_waiting(self) -> int:
        """Tokens that have come and were not taken."""
        ...

    @property
    def token_s(self) -> Sequence[float]:
        """When each token came, by time.monotonic."""
        ...

    def take(self, most: int | None = None) -> RequestOutput | None:
        """What is new since the last call, or its first `most` tokens; None if nothing. Raises EngineDeadError."""
        ...

    def report_played(self, num_tokens: int) -> None:
        """The reader has read `num_tokens` of the output so far."""
        ...

    def abort(self) -> None:
        """Stop the request and free its KV; `take` then ends with FinishReason.ABORT. Idempotent."""
        ...


class EnginePort(Protocol):
    """A loaded engine; `submit_choices` belongs to the running event loop."""

    @property
    def info(self) -> EngineInfo:
        """What was loaded and on what."""
        ...

    @property
    def tokenizer(self) -> TokenizerPort:
        """The model's tokenizer."""
        ...

    def submit_choices(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        request_ids: Sequence[str],
        *,
        rate: ConsumptionRate | UnsetType = UNSET,
        priority: int = 0,
        tenant: Tenant = ONE_TENANT,
    ) -> Sequence[StreamPort]:
        """Queue a prompt once for each id; a seed counts up. Raises RequestError, QueueFullError, EngineDeadError."""
        ...

    def stats(self) -> EngineStats:
        """The engine's state after its last step."""
        ...

    async def streams(self) -> list[StreamState]:
        """Every live request, in order of arrival. Raises EngineDeadError."""
        ...

    def check_health(self) -> None:
        """Raise EngineDeadError when the engine is dead or makes no progress."""
        ...

    def on_step(self, callback: Callable[[StepOutputs], None]) -> None:
        """Call `callback` with every step's message, from any thread."""
        ...

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` once, from any thread, if the engine dies unexpectedly."""
        ...

    def shutdown(self, timeout_s: float) -> None:
        """Abort what is left and stop; blocks up to `timeout_s`."""
        ...


EngineFactory = Callable[[EngineConfig], EnginePort]
"""Loads a model; blocks for seconds and raises TfserveError."""
