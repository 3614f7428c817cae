"""`tfserve bench engine`: how fast the engine is without a network, step by step beside the roofline.

An embedded engine answers batches of random prompts; its step trace has the work and the time of each step. Works on
any device, with the settings of `tfserve serve`.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from tfserve.bench.report import environment
from tfserve.bench.roofline import Work, bytes_per_s, floor_s, linear_flops_per_s, step_operations
from tfserve.config import EngineConfig
from tfserve.engine.core.step_trace import Trace, TraceStep, read_trace
from tfserve.engine.engine import Engine
from tfserve.model.layers.linear import WeightFormat
from tfserve.model.loading.config import ModelConfig, load_model_config
from tfserve.types import EngineInfo, SamplingParams

_BYTES = {"cpu": 2**28, "cuda": 2**32}
_SIDE = {"cpu": 1024, "cuda": 8192}
_ROWS = 512
"""Rows of the matrix product that measures the peak rate; as many as in a typical step with prompts."""

_STRIDE = 7919


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's ceilings: memory bandwidth, and the rate of a linear layer in the model's weight format."""

    bytes_per_s: float
    linear_flops_per_s: float


class StepCell(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of one kind in a batch, "prefill" (with prompts) or "decode" (all decodes): medians, ms, tokens/s.

    `least_ms` and `most_ms` are the range of `step_ms`; `context` is that of a decode, or the step's prompt tokens.
    """

    kind: str
    num_steps: int
    tokens: float
    context: float
    step_ms: float
    least_ms: float
    most_ms: float
    tokens_per_s: float
    roofline_ms: float
    over_roofline: float


class BatchRun(msgspec.Struct, frozen=True, kw_only=True):
    """A batch from its first prompt to its last token. `roofline_tokens_per_s` is the bound by all its steps."""

    batch: int
    skipped: str | None = None
    seconds: float | None = None
    output_tokens_per_s: float | None = None
    roofline_tokens_per_s: float | None = None
    steps: list[StepCell] = []


class EngineBench(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    environment: dict[str, object]
    settings: dict[str, object]
    info: EngineInfo
    input_len: int
    output_len: int
    ceilings: Ceilings
    batches: list[BatchRun]


def bench_engine(config: EngineConfig, batches: Sequence[int], input_len: int, output_len: int) -> EngineBench:
    """Run every batch that fits. Raises ConfigError and ModelError as `Engine` does."""
    runs: list[BatchRun] = []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "steps.jsonl"
        config = msgspec.structs.replace(config, step_trace=str(trace))
        with Engine(config) as engine:
            info, model = engine.info, load_model_config(Path(engine.config.model))
            reasons = [_misfit(info, batch, input_len + output_len) for batch in batches]
            # The first request is not measured: it includes loading and compiling at first use.
            fitting = [batch for batch, reason in zip(batches, reasons, strict=True) if reason is None]
            sizes = [1, *fitting] if fitting else []
            for size in sizes:
                prompts = [_prompt(model, index, input_len) for index in range(size)]
                engine.generate(prompts, SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True))
        spans = _spans(read_trace(trace), sizes)[1:]
    ceilings = measure_ceilings(info)
    for batch, reason in zip(batches, reasons, strict=True):
        if reason is None:
            runs.append(_measured(batch, spans.pop(0), batch * output_len, _Floor(model, info, ceilings)))
        else:
            runs.append(BatchRun(batch=batch, skipped=reason))
    return EngineBench(
        environment={**environment(), "torch": str(torch.__version__), "device": _device_name(info.device)},
        settings=_settings(config),
        info=info,
        input_len=input_len,
        output_len=output_len,
        ceilings=ceilings,
        batches=runs,
    )


def measure_ceilings(info: EngineInfo) -> Ceilings:
    """Measure them with the engine's threads, dtype and weight format."""
    if info.device == "cpu":
        torch.set_num_threads(info.threads)
    fmt = WeightFormat.choose(getattr(torch, info.dtype), torch.device(info.device), info.quantization)
    return Ceilings(
        bytes_per_s=bytes_per_s(info.device, _BYTES[info.device]),
        linear_flops_per_s=linear_flops_per_s(fmt, _SIDE[info.device], _ROWS),
    )


def table(result: EngineBench) -> str:
    """The result for people."""
    info, ceilings = result.info, result.ceilings
    weights = info.quantization or info.dtype
    lines = [
        f"{info.model} on {result.environment['device']}, {weights} weights, {info.threads} threads, attention "
        f"{info.attention_backend}; prompts of {result.input_len}, answers of {result.output_len} tokens",
        f"measured ceilings: memory {ceilings.bytes_per_s / 1e9:.1f} GB/s, {weights} linear "
        f"layers {ceilings.linear_flops_per_s / 1e9:.0f} GFLOP/s",
        "",
        f"{'batch':>5} {'steps':<8}{'number':>7}{'tokens':>8}{'context':>9}{'step, ms':>10}{'range':>20}"
        f"{'tokens/s':>10}{'roofline, ms':>14}{'step / roofline':>17}",
    ]
    for run in result.batches:
        if run.skipped:
            lines.append(f"{run.batch:>5} skipped: {run.skipped}")
        for cell in run.steps:
            spread = f"{cell.least_ms:.1f} .. {cell.most_ms:.1f}"
            lines.append(
                f"{run.batch:>5} {cell.kind:<8}{cell.num_steps:>7}{cell.tokens:>8.0f}{cell.context:>9.0f}"
                f"{cell.step_ms:>10.1f}{spread:>20}{cell.tokens_per_s:>10.0f}{cell.roofline_ms:>14.1f}"
                f"{cell.over_roofline:>17.2f}"
            )
    lines += ["", f"{'batch':>5}{'seconds':>10}{'output tokens/s':>17}{'as fast as the roofline':>25}{'share':>8}"]
    for run in result.batches:
        if run.output_tokens_per_s is not None and run.roofline_tokens_per_s is not None:
            share = run.output_tokens_per_s / run.roofline_tokens_per_s
            lines.append(
                f"{run.batch:>5}{run.seconds:>10.2f}{run.output_tokens_per_s:>17.1f}{run.roofline_tokens_per_s:>25.1f}"
                f"{share:>8.2f}"
            )
    return "\n".join(lines)


class _Floor:
    """The roofline of one model on one machine."""

    def __init__(self, model: ModelConfig, info: EngineInfo, ceilings: Ceilings) -> None:
        self._model, self._ceilings = model, ceilings
        self._itemsize = getattr(torch, info.dtype).itemsize
        self._weight_bytes = 1 if info.quantization == "int8" else self._itemsize

    def __call__(self, step: TraceStep) -> float:
        """Lower bound of the step's time in seconds; leaves out reads of context by prompt chunks."""
        work = Work(
            tokens=step.n_decode + step.n_prefill,
            sampled=step.n_decode + (step.n_prefill > 0),
            pairs=step.decode_ctx + step.prefill_ctx,
            kv_tokens=step.decode_ctx + step.n_prefill,
        )
        ops = step_operations(self._model, work, weight_bytes=self._weight_bytes, itemsize=self._itemsize)
        return floor_s(ops, self._ceilings.bytes_per_s, self._ceilings.linear_flops_per_s)


class _Span(msgspec.Struct, frozen=True):
    seconds: float
    steps: list[TraceStep]


def _spans(trace: Trace, sizes: Sequence[int]) -> list[_Span]:
    """The trace cut into batches of these sizes; each began when the previous one had ended."""
    spans, requests = [], iter(trace.requests)
    for size in sizes:
        own = [next(requests) for _ in range(size)]
        begin_s, end_s = min(r.arrival_s for r in own), max(r.finished_s for r in own)
        spans.append(_Span(end_s - begin_s, [step for step in trace.steps if begin_s < step.end_s <= end_s]))
    return spans


def _measured(batch: int, span: _Span, output_tokens: int, floor: _Floor) -> BatchRun:
    prompts = [step for step in span.steps if step.n_prefill]
    decodes = [step for step in span.steps if not step.n_prefill and step.n_decode == batch]
    return BatchRun(
        batch=batch,
        seconds=span.seconds,
        output_tokens_per_s=output_tokens / span.seconds,
        roofline_tokens_per_s=output_tokens / sum(map(floor, span.steps)),
        steps=[_cell(kind, steps, floor) for kind, steps in (("prefill", prompts), ("decode", decodes)) if steps],
    )


def _cell(kind: str, steps: Sequence[TraceStep], floor: _Floor) -> StepCell:
    seconds = [step.seconds for step in steps]
    tokens = [step.n_decode + step.n_prefill for step in steps]
    return StepCell(
        kind=kind,
        num_steps=len(steps),
        tokens=statistics.median(tokens),
        context=statistics.median((step.decode_ctx + step.n_prefill) / max(step.n_decode, 1) for step in steps),
        step_ms=1e3 * statistics.median(seconds),
        least_ms=1e3 * min(seconds),
        most_ms=1e3 * max(seconds),
        tokens_per_s=sum(tokens) / sum(seconds),
        roofline_ms=1e3 * statistics.median(map(floor, steps)),
        over_roofline=statistics.median(step.seconds / floor(step) for step in steps),
    )


def _prompt(model: ModelConfig, index: int, num_tokens: int) -> list[int]:
    """Token ids of a prompt with a unique beginning."""
    return [(_STRIDE * (index + 1) + token) % model.vocab_size for token in range(num_tokens)]


def _misfit(info: EngineInfo, batch: int, num_tokens: int) -> str | None:
    """Why a batch of requests of so many tokens cannot be run at once; None if it can."""
    if num_tokens > info.max_model_len:
        return f"a request of {num_tokens} tokens is longer than max_model_len, {info.max_model_len}"
    if batch > info.max_num_seqs:
        return f"max_num_seqs is {info.max_num_seqs}"
    held = (info.num_blocks - 1) // -(-num_tokens // info.block_size)
    if batch > held:
        return f"the device's KV holds {held} requests of {num_tokens} tokens"
    return None


def _settings(config: EngineConfig) -> dict[str, object]:
    """The engine's settings, without the server's, which were not used and may be secret."""
    left_out = {"server", "step_trace"}
    return {key: value for key, value in msgspec.to_builtins(config).items() if key not in left_out}


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"
