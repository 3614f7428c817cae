"""The step trace: one JSON line per step and per finished request, to fit and to replay. Torch-free.

`read_trace` reads it; engine/simulation/fitted.py fits a machine to it; `tfserve bench replay` runs its requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from tfserve.config import RENAMED, SchedulerConfig, nested
from tfserve.engine.scheduling.batch import sample_of
from tfserve.engine.scheduling.cost_model import StepSample
from tfserve.engine.scheduling.request import Request
from tfserve.errors import NOT_JSON, TfserveError
from tfserve.misfit import why_not_json
from tfserve.plan import StepPlan
from tfserve.types import ConsumptionRate

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 1 << 16

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class TraceHead(msgspec.Struct, frozen=True, kw_only=True, tag="engine"):
    """The first line: the engine and its limits. Numbers of blocks include the reserved block."""

    model: str
    device: str
    scheduler: SchedulerConfig
    max_num_seqs: _Positive
    max_num_batched_tokens: _Positive
    block_size: _Positive
    num_blocks: Annotated[int, msgspec.Meta(ge=2)]
    num_host_blocks: _Count
    kv_bytes_per_token: _Positive


class CopyTotals(msgspec.Struct, frozen=True):
    """Bytes copied one way since the engine started, and the seconds that the link was busy with them."""

    nbytes: int = 0
    busy_s: float = 0.0


class TraceStep(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """A step that has ended. `end_s` is by the engine's clock, `seconds` by the device's.

    `n_decode` to `prefill_ctx` are StepSample's. `stored` and `loaded` are totals up to now.
    `moves` counts the requests that left the device or came back since the step before, by cause.
    """

    step: int
    end_s: float
    seconds: _Seconds
    n_decode: _Count
    decode_ctx: float
    n_prefill: _Count
    prefill_ctx: float
    num_waiting: _Count
    num_running: _Count
    num_paused: _Count
    stored: CopyTotals = CopyTotals()
    loaded: CopyTotals = CopyTotals()
    moves: dict[str, _Count] = {}

    def sample(self) -> StepSample:
        """The step as the CostModel sees it."""
        return StepSample(self.n_decode, self.decode_ctx, self.n_prefill, self.prefill_ctx, self.seconds)


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """A finished request: its parameters and its result. Times by the engine's clock.

    The first `thought_tokens` of the output are thoughts; `first_token_s` is of the answer behind them.
    """

    arrival_s: float
    prompt_tokens: _Positive
    output_tokens: _Count
    max_tokens: _Positive
    rate: ConsumptionRate
    first_token_s: float | None
    finished_s: float
    num_preemptions: _Count
    priority: int = 0
    thought_tokens: _Count = 0


TraceLine = TraceHead | TraceStep | TraceRequest


class Trace(msgspec.Struct, frozen=True):
    """A whole trace; requests in order of arrival."""

    head: TraceHead
    steps: list[TraceStep]
    requests: list[TraceRequest]

    @property
    def timed_steps(self) -> list[TraceStep]:
        """The steps that computed something and took time: the ones that a step time model can be fitted to."""
        return [step for step in self.steps if step.seconds > 0 and step.n_decode + step.n_prefill > 0]


class StepTrace:
    """Writes a trace file. After a write error the trace ends with one warning, and the engine continues.

    Raises TfserveError if the file cannot be opened.
    """

    def __init__(self, path: Path, head: TraceHead) -> None:
        try:
            self._file: BinaryIO | None = path.open("wb", buffering=_BUFFER_BYTES)
        except OSError as error:
            raise TfserveError(f"step_trace: cannot write {path}: {error.strerror}") from None
        self._path = path
        self._encoder = msgspec.json.Encoder()
        self._write(head)

    def on_step(
        self,
        plan: StepPlan,
        seconds: float,
        end_s: float,
        counts: tuple[int, int, int],
        copied: Sequence[CopyTotals],
        *,
        moves: dict[str, int],
    ) -> None:
        """A step has ended; `counts` are waiting, running and paused requests, `copied` stores and loads so far."""
        work = sample_of(plan.seqs, plan.n_decode, seconds)
        self._write(
            TraceStep(
                step=plan.step,
                end_s=end_s,
                seconds=seconds,
                n_decode=work.n_decode,
                decode_ctx=work.decode_ctx,
                n_prefill=work.n_prefill,
                prefill_ctx=work.prefill_ctx,
                num_waiting=counts[0],
                num_running=counts[1],
                num_paused=counts[2],
                stored=copied[0],
                loaded=copied[1],
                moves=moves,
            )
        )

    def on_finished(self, request: Request, finished_s: float, num_preemptions: int) -> None:
        """A request has ended, for any reason."""
        self._write(
            TraceRequest(
                arrival_s=request.arrival_s,
                prompt_tokens=request.num_prompt_tokens,
                output_tokens=request.num_output_tokens,
                max_tokens=request.max_tokens,
                rate=request.rate,
                first_token_s=request.first_token_s,
                finished_s=finished_s,
                num_preemptions=num_preemptions,
                priority=request.priority,
                thought_tokens=request.num_thoughts,
            )
        )

    def close(self) -> None:
        """Write the buffered lines."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._give_up(error)

    def _write(self, line: TraceLine) -> None:
        if self._file is None:
            return
        try:
            self._file.write(self._encoder.encode(line) + b"\n")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """End the trace; the buffered lines are lost."""
        logger.warning("step_trace: %s cannot be written (%s); this trace ends here", self._path, error.strerror)
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


def read_trace(path: Path) -> Trace:
    """Read a trace; a last line cut short by a killed engine is dropped. Raises TfserveError for anything else."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise TfserveError(f"cannot read the trace {path}: {error.strerror}") from None
    decoder = msgspec.json.Decoder(TraceLine)
    lines[:1] = map(_by_todays_names, lines[:1])
    read: list[TraceLine] = []
    for number, line in enumerate(lines, 1):
        try:
            read.append(decoder.decode(line))
        except NOT_JSON:
            if number < len(lines) or line.endswith(b"\n"):
                reason = why_not_json(line, TraceLine)
                raise TfserveError(f"{path}:{number} is no line of a step trace: {reason}") from None
    if not read or not isinstance(read[0], TraceHead):
        raise TfserveError(f"{path} does not start with the line that says which engine ran")
    requests = [line for line in read if isinstance(line, TraceRequest)]
    return Trace(
        read[0],
        [line for line in read if isinstance(line, TraceStep)],
        sorted(requests, key=lambda request: request.arrival_s),
    )


def _by_todays_names(line: bytes) -> bytes:
    """A trace's first line with today's names of the settings, for traces of the last release."""
    try:
        head = msgspec.json.decode(line)
    except NOT_JSON:
        return line
    settings = head.get("scheduler") if isinstance(head, dict) else None
    if not isinstance(settings, dict):
        return line
    names = {key: RENAMED.get(f"scheduler.{key}", f"scheduler.{key}") for key in settings}
    return msgspec.json.encode({**head, **nested({names[key]: value for key, value in settings.items()})}) + b"\n"
