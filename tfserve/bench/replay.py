"""`tfserve bench fit` and `tfserve bench replay`: fit a simulated machine to one measured run, test it on another."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import msgspec
import numpy as np

from tfserve.arrays import Floats
from tfserve.bench.report import write_json
from tfserve.engine.core.step_trace import Trace, TraceHead, TraceRequest, read_trace
from tfserve.engine.scheduling.token_buffer import resolve_rate
from tfserve.engine.simulation.engine import SimEngine, SimRequest
from tfserve.engine.simulation.fitted import FittedProfile, MeasuredCost, fit, fit_error
from tfserve.errors import NOT_JSON, TfserveError
from tfserve.misfit import why_not_json


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a trace's requests, measured or simulated. Seconds, tokens/s."""

    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    output_tokens_per_s: float
    duration_s: float
    preemptions_per_request: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`ttft_distance` is the area between both distributions of TTFT, over the measured mean."""

    trace: str
    policy: str
    num_requests: int
    measured: Figures
    simulated: Figures
    ttft_distance: float


def add_replay_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench fit` and `bench replay`."""
    fitting = commands.add_parser(
        "fit",
        help="fit a simulated machine to a step trace",
        description="Fit step times, loop times and copy speeds to a step trace (setting step_trace of an engine), and "
        "print how far off the fit is on steps that it has not seen.",
    )
    fitting.set_defaults(func=_fit)
    fitting.add_argument("trace", type=Path)
    fitting.add_argument("--out", type=Path, required=True, help="JSON file for the profile")
    replaying = commands.add_parser(
        "replay",
        help="simulate the requests of step traces and compare",
        description="Run the requests of each trace again, in simulation on a fitted profile and under the trace's own "
        "scheduler settings, and print measured against simulated.",
    )
    replaying.set_defaults(func=_replay)
    replaying.add_argument("traces", type=Path, nargs="+")
    replaying.add_argument("--profile", type=Path, required=True, help="written by `tfserve bench fit`, of another run")
    replaying.add_argument("--out", type=Path, help="write the comparison to this JSON file")


def replay(profile: FittedProfile, trace: Trace, name: str) -> Comparison:
    """Simulate the trace's requests on the profile, with the memory and limits of the trace's engine."""
    if all(request.first_token_s is None for request in trace.requests):
        raise TfserveError(f"{name} has no answered requests to compare with; give a trace of a run that answered some")
    head = trace.head
    limits = _limits(profile, head)
    room = (head.num_blocks - 1) * head.block_size
    longest = max(request.prompt_tokens + max(request.output_tokens, 1) for request in trace.requests)
    if longest > room:
        raise TfserveError(f"{name} has a request of {longest} tokens and KV for {room}; give an unedited trace")
    begin_s = trace.requests[0].arrival_s
    requests = [_again(request, begin_s, head.scheduler.default_rate) for request in trace.requests]
    run = SimEngine(limits.machine(), head.scheduler, requests).run()
    # The simulation does not tell thoughts from answers: a first token is the one where the answer began.
    both = zip(run.served, [request.thought_tokens for request in trace.requests], strict=True)
    answered = [(served, first) for served, first in both if len(served.token_s) > first]
    if not answered:
        raise TfserveError(f"{name}: on the profile, every request would be refused; give a trace of fewer requests")
    simulated_ttft = np.array([served.token_s[first] - served.arrival_s for served, first in answered])
    simulated_end = max(float(served.token_s[-1]) for served in run.served if len(served.token_s))
    measured_ttft = np.array([r.first_token_s - r.arrival_s for r in trace.requests if r.first_token_s is not None])
    measured_end = max(request.finished_s for request in trace.requests) - begin_s
    tokens = sum(request.output_tokens for request in trace.requests)
    preemptions = sum(request.num_preemptions for request in trace.requests)
    return Comparison(
        trace=name,
        policy=head.scheduler.policy,
        num_requests=len(requests),
        measured=_figures(measured_ttft, tokens, measured_end, preemptions / len(requests)),
        simulated=_figures(simulated_ttft, tokens, simulated_end, run.num_preemptions / len(requests)),
        ttft_distance=_ratio(_distance(measured_ttft, simulated_ttft), float(measured_ttft.mean())),
    )


def _limits(profile: FittedProfile, head: TraceHead) -> FittedProfile:
    """The profile with the memory and the limits of the trace's engine."""
    return msgspec.structs.replace(
        profile,
        num_blocks=head.num_blocks,
        num_host_blocks=head.num_host_blocks,
        max_num_seqs=head.max_num_seqs,
        max_num_batched_tokens=head.max_num_batched_tokens,
        block_size=head.block_size,
        kv_bytes_per_token=head.kv_bytes_per_token,
    )


def _again(request: TraceRequest, begin_s: float, default_rate: float) -> SimRequest:
    return SimRequest(
        arrival_s=request.arrival_s - begin_s,
        prompt_tokens=request.prompt_tokens,
        output_tokens=max(request.output_tokens, 1),
        max_tokens=request.max_tokens,
        rate=resolve_rate(request.rate, default_rate),
        told_rate=request.rate,
        priority=request.priority,
    )


def comparison_table(comparison: Comparison) -> str:
    """Measured against simulated, for people."""
    rows = [f"{comparison.trace}: {comparison.policy}, {comparison.num_requests} requests"]
    rows.append(f"{'':<26}{'measured':>12}{'simulated':>12}{'ratio':>8}")
    for field in Figures.__struct_fields__:
        measured, simulated = getattr(comparison.measured, field), getattr(comparison.simulated, field)
        ratio = f"{simulated / measured:.2f}" if measured else "n/a"
        rows.append(f"{field:<26}{measured:>12.3f}{simulated:>12.3f}{ratio:>8}")
    rows.append(f"{'ttft distance / mean':<26}{comparison.ttft_distance:>12.3f}")
    return "\n".join(rows)


def _figures(ttft: Floats, tokens: int, duration_s: float, preemptions: float) -> Figures:
    return Figures(
        ttft_mean_s=float(ttft.mean()),
        ttft_p50_s=float(np.percentile(ttft, 50)),
        ttft_p99_s=float(np.percentile(ttft, 99)),
        output_tokens_per_s=_ratio(tokens, duration_s),
        duration_s=duration_s,
        preemptions_per_request=preemptions,
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _distance(a: Floats, b: Floats) -> float:
    """The area between two distributions: the mean distance of their quantiles."""
    shares = np.linspace(0, 1, 101)
    return float(np.abs(np.quantile(a, shares) - np.quantile(b, shares)).mean())


def _fit(args: argparse.Namespace) -> int:
    trace = read_trace(args.trace)
    profile = fit(trace)
    write_json(args.out, profile, "--out")
    error = profile.error
    print(
        f"{profile.source}; on {error.num_steps} other steps: median error {error.median:.1%}, P90 {error.p90:.1%}, "
        f"sum {error.total:+.1%}"
    )
    print(
        f"between steps {profile.host_s * 1e3:.2f} ms + {profile.host_row_s * 1e6:.0f} us a request; copies "
        f"{profile.store_bytes_per_s / 1e9:.2f} GB/s out, {profile.load_bytes_per_s / 1e9:.2f} GB/s in"
    )
    return 0


def _replay(args: argparse.Namespace) -> int:
    try:
        data = args.profile.read_bytes()
        profile = msgspec.json.decode(data, type=FittedProfile)
    except OSError as error:
        raise TfserveError(f"--profile: cannot read {args.profile}: {error.strerror}") from None
    except NOT_JSON:
        reason = why_not_json(data, FittedProfile)
        raise TfserveError(f"--profile: {args.profile} is no profile of `tfserve bench fit`: {reason}") from None
    found: list[Comparison] = []
    for path in args.traces:
        trace = read_trace(path)
        comparison = replay(profile, trace, path.name)
        print(comparison_table(comparison))
        if trace.timed_steps:
            cost = MeasuredCost(profile.step, profile.sizes)
            other = fit_error(cost, [step.sample() for step in trace.timed_steps])
            print(f"its steps by the profile: median error {other.median:.1%}, sum {other.total:+.1%}\n")
        found.append(comparison)
    if args.out is not None:
        write_json(args.out, found, "--out")
    return 0
