"""One step deep against two: throughput, time between tokens and device idle time, in one run.

    python -m benchmarks.micro.pipeline --repeats 3 --output benchmarks/results/pipeline.json

Two devices. "cpu" is the real model over HTTP under 32 and 200 streams, a fresh server for each repeat and depth, its
client in a process of its own: here planning and computing share the cores. "emulated" is the core alone, in real time,
with a device that only lets time pass (`--step-ms` for each of `--streams`; the defaults are roughly Llama-3-8B on an
H100): the gain of two steps where the device is not the CPU. Each repeat measures both depths, in alternating order;
ratios are formed within a repeat. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.local_server import Server, free_port, running
from tfserve.bench.report import environment
from tfserve.config import EngineConfig, SchedulerConfig, load_config
from tfserve.engine.core.clock import RealClock
from tfserve.engine.core.loop import EngineCore
from tfserve.engine.core.step_worker import StepWorker
from tfserve.engine.engine import Engine
from tfserve.engine.scheduling.assembly import KVMemory, make_scheduler
from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.http.server import serve
from tfserve.machine import usable_cpus
from tfserve.messages import AddRequest, StepOutputs, StreamStates
from tfserve.plan import StepPlan, StepResult
from tfserve.types import EngineStats, SamplingParams

DEPTHS = (1, 2)
NICE = ["nice", "-n", "10"]
QUANTITIES = {
    "tokens_per_s": ("output tokens/s", 1.0),
    "tbt_p50_s": ("time between tokens P50, ms", 1e3),
    "tbt_p99_s": ("time between tokens P99, ms", 1e3),
    "ttft_mean_s": ("time to first token, mean, ms", 1e3),
    "idle_share": ("device idle share, %", 100.0),
}


def run_server(settings: list[str]) -> int:
    """The server in this process; each SIGUSR1 writes its engine's statistics to the file that is named first."""
    path, *rest = settings
    engines: list[Engine] = []

    def load(config: EngineConfig) -> Engine:
        engines.append(Engine(config))
        return engines[0]

    def write(*_: object) -> None:
        unfinished = Path(path + ".part")
        unfinished.write_bytes(msgspec.json.encode(engines[0].stats()))
        unfinished.rename(path)

    signal.signal(signal.SIGUSR1, write)
    return serve(load_config(None, dict(setting.split("=", 1) for setting in rest)), load)


@contextlib.contextmanager
def serving(args: argparse.Namespace, depth: int, stats: Path) -> Iterator[tuple[str, Server]]:
    """A fresh server of this depth, ready, and its address."""
    port = free_port()
    settings = {
        "model": args.model,
        "server.port": port,
        "pipeline_depth": depth,
        "dtype": "float32",
        "threads": args.threads,
        "max_num_seqs": max(args.streams),
        "max_model_len": 1024,
    }
    if args.format == "int8":
        settings["quantization"] = "int8"
    command = [sys.executable, "-m", "benchmarks.micro.pipeline", "--serve", str(stats)]
    command += [f"{key}={value}" for key, value in settings.items()]
    url = f"http://127.0.0.1:{port}"
    with running(command, url, "/ready") as server:
        yield url, server


def stats_of(server: Server, path: Path) -> EngineStats:
    server.process.send_signal(signal.SIGUSR1)
    end_s = time.monotonic() + 10
    while not path.exists():
        if time.monotonic() > end_s:
            raise SystemExit("the server wrote no statistics")
        time.sleep(0.01)
    stats = msgspec.json.decode(path.read_bytes(), type=EngineStats)
    path.unlink()
    return stats


def idle_share(before: EngineStats, after: EngineStats) -> float:
    idle, busy = after.device_idle_s - before.device_idle_s, after.device_busy_s - before.device_busy_s
    return idle / (idle + busy)


def measure_cpu(args: argparse.Namespace, depth: int) -> dict[str, Any]:
    """A fresh server under each load, after a short one that warms it up."""
    result = {}
    with tempfile.TemporaryDirectory() as work, serving(args, depth, Path(work) / "stats") as (url, server):

        def load(streams: int, max_tokens: int) -> Any:
            output = Path(work) / "client.json"
            command = [*NICE, sys.executable, "-m", "tfserve.cli", "bench", "serve", "--base-url", url]
            command += ["--endpoint", "completions", "--num-prompts", str(streams), "--ignore-eos"]
            command += ["--max-tokens", str(max_tokens), "--input-len", str(args.prompt), "--output", str(output)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
            return json.loads(output.read_text())["summary"]

        load(4, 8)
        for streams in args.streams:
            before = stats_of(server, Path(work) / "stats")
            summary = load(streams, args.tokens)
            after = stats_of(server, Path(work) / "stats")
            result[str(streams)] = {
                "tokens_per_s": summary["output_tokens_per_s"],
                "tbt_p50_s": summary["tbt"]["p50"],
                "tbt_p99_s": summary["tbt"]["p99"],
                "ttft_mean_s": summary["ttft"]["mean"],
                "idle_share": idle_share(before, after),
                "client_cpu_share": summary["client_cpu_share"],
            }
    return result


class TimePassing:
    """A plan.Runner whose device takes `step_s` for every step; the host's CPU is not used."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._ended_s: float | None = None

    def launch(self, plan: StepPlan) -> PassedStep:
        began_s = time.perf_counter()
        idle_s = 0.0 if self._ended_s is None else began_s - self._ended_s
        time.sleep(self._step_s)
        self._ended_s = time.perf_counter()
        tokens = tuple(1 + seq.start % 1000 for seq in plan.seqs if seq.sample)
        return PassedStep(StepResult(plan.step, tokens, (None,) * len(tokens), self._ended_s - began_s, idle_s))

    def close(self) -> None:
        """There is nothing to release."""


class PassedStep:
    """plan.InFlight of a step that is over."""

    def __init__(self, outcome: StepResult) -> None:
        self._outcome = outcome

    def result(self) -> StepResult:
        return self._outcome


def measure_emulated(args: argparse.Namespace, depth: int) -> dict[str, Any]:
    """The core over a device that only lets time pass, with every step's outputs encoded as for the front."""
    loads = zip(args.streams, args.step_ms, strict=True)
    return {str(streams): emulate(args, depth, streams, step_ms / 1e3) for streams, step_ms in loads}


def emulate(args: argparse.Namespace, depth: int, streams: int, step_s: float) -> dict[str, Any]:
    clock, worker = RealClock(), StepWorker()
    worker.serve(TimePassing(step_s))
    arrivals: dict[str, list[float]] = {}
    sent_bytes = 0

    def emit(outputs: StepOutputs | StreamStates) -> None:
        nonlocal sent_bytes
        if isinstance(outputs, StreamStates):  # never requested here
            return
        sent_bytes += len(msgspec.msgpack.encode(outputs))
        now_s = clock.now()
        for output in outputs.outputs:
            arrivals.setdefault(output.request_id, []).append(now_s)

    core = EngineCore(
        scheduler=make_scheduler(
            SchedulerConfig(policy=args.policy),
            KVMemory(16, 1 + streams * (2 + (args.prompt + args.tokens) // 16)),
            CostModel(kv_bytes_per_token=1, max_num_seqs=streams),
            max_num_seqs=streams,
            max_num_batched_tokens=max(512, streams),
        ),
        runner=worker,
        clock=clock,
        tokenizer=None,  # only stop strings need one
        eos_token_ids=(),
        seed=0,
        emit=emit,
        pipeline_depth=depth,
    )
    begin_s = clock.now()
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    for number in range(streams):
        core.inbox.put(AddRequest(str(number), list(range(1, args.prompt + 1)), params, begin_s, 20.0))
    while core.stats().num_finished < streams:
        core.step()
    worker.close()
    gaps = np.concatenate([np.diff(times) for times in arrivals.values()])
    stats = core.stats()
    return {
        "tokens_per_s": stats.num_output_tokens / (clock.now() - begin_s),
        "tbt_p50_s": float(np.percentile(gaps, 50)),
        "tbt_p99_s": float(np.percentile(gaps, 99)),
        "ttft_mean_s": float(np.mean([times[0] for times in arrivals.values()])) - begin_s,
        "idle_share": stats.device_idle_share,
        "bytes_per_token": sent_bytes / stats.num_output_tokens,
    }


MEASURE = {"cpu": measure_cpu, "emulated": measure_emulated}


def table(repeats: list[dict[str, Any]]) -> str:
    """Medians over the repeats of each quantity at each depth, and of the ratio (for shares: the difference)."""
    lines = []
    for device in repeats[0]:
        for streams in repeats[0][device]["1"]:
            lines.append(f"{device}, {streams} streams{'depth 1':>32}{'depth 2':>12}   2 / 1")
            for key, (name, scale) in QUANTITIES.items():
                one, two = ([scale * repeat[device][str(d)][streams][key] for repeat in repeats] for d in DEPTHS)
                ratios = [b / a for a, b in zip(one, two, strict=True) if a > 0]
                spread = f"{statistics.median(ratios):.3f}  [{min(ratios):.3f} .. {max(ratios):.3f}]" if ratios else "-"
                lines.append(f"  {name:<34}{statistics.median(one):>12.2f}{statistics.median(two):>12.2f}   {spread}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", choices=MEASURE, default=list(MEASURE))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--format", choices=("fp32", "int8"), default="int8")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--streams", type=int, nargs="+", default=(32, 200), help="default: 32 200")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens (default: %(default)s)")
    parser.add_argument("--policy", default="fcfs-chunked", help="of the emulated device (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, nargs="+", default=(6.5, 10.0), help="one for each of --streams")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, help="be the server (run by this script)")
    args = parser.parse_args()
    if len(args.step_ms) != len(args.streams):
        parser.error("--step-ms needs one number for each of --streams")
    if args.serve:
        sys.exit(run_server(args.serve))
    repeats: list[dict[str, Any]] = []
    for number in range(args.repeats):
        repeat: dict[str, Any] = {device: {} for device in args.devices}
        for device in args.devices:
            for depth in DEPTHS if number % 2 == 0 else DEPTHS[::-1]:
                print(f"repeat {number + 1}/{args.repeats}: {device}, depth {depth} ...", file=sys.stderr, flush=True)
                repeat[device][str(depth)] = MEASURE[device](args, depth)
        repeats.append(repeat)
    print(table(repeats))
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "serve")}
        result = {"environment": environment(), "settings": settings, "repeats": repeats}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
