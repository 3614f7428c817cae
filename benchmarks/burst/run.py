"""A real burst over HTTP, every policy in interleaved repeats.

    python -m benchmarks.burst.run --policies fcfs,tokenflow,round-robin --repeats 5

A cell is one policy in one repeat: a fresh server whose KV pool holds a quarter of the burst, a warm-up, then all
prompts at once from a client in its own process. Every repeat has its own order of prompts. It begins with the prefill
of the burst alone, which bounds any TTFT, and with fcfs: readers share `--rate-factor` of its throughput (measured
in every repeat, because a machine's speed drifts; `--calibrate run`: in the first one). Each finished cell is saved,
and the same command continues with the missing ones.

A policy may carry settings of its own: `tokenflow+scheduler.ablation.offload=false`. `--generate-ahead-s` caps all.
Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.burst.kept_timelines import TimelineFile
from benchmarks.burst.report import BASELINE, SPECIAL, report
from benchmarks.cells import Cell, Store
from benchmarks.local_server import CLIENT_NICE, free_port, get_json, run_json, running
from tfserve.bench.client import RequestRecord
from tfserve.bench.plots import timelines
from tfserve.bench.report import environment, summarize
from tfserve.bench.workload import (
    BUNDLED_PROMPTS,
    Lengths,
    PromptRow,
    mixed_rates,
    parse_rate_mix,
    read_rows,
    write_rows,
)
from tfserve.model.loading.demo import demo_model_dir
from tfserve.model.text.tokenizer import Tokenizer

LENGTHS = Lengths(default=160, clamp=(96, 256))
MAX_PROMPT_TOKENS = 300
BLOCK_SIZE = 32
CALIBRATION, PREFILL = SPECIAL
MIX_SEED = 0
SETTINGS = (
    "num_prompts",
    "kv_share",
    "rate_factor",
    "rate",
    "calibrate",
    "mix",
    "loose",
    "generate_ahead_s",
    "quantization",
    "endpoint",
    "threads",
    "seed",
    "server_option",
)
"""Options that make results comparable, or not."""


def burst_rows(count: int) -> list[PromptRow]:
    """The first `count` short prompts, each asking for as many tokens as its reference answer has."""
    short = [row for row in read_rows(BUNDLED_PROMPTS) if (row.prompt_tokens or 0) <= MAX_PROMPT_TOKENS][:count]
    return [PromptRow(row.prompt, max_tokens=LENGTHS.of(row)) for row in short]


def burst_tokens(model: Path, rows: Sequence[PromptRow]) -> int:
    """KV tokens of the whole burst at its end, chat template included."""
    tokenizer = Tokenizer.from_dir(model)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": row.prompt}]) for row in rows]
    prompt_tokens = sum(len(tokenizer.encode(prompt, add_special_tokens=False)) for prompt in prompts)
    return prompt_tokens + sum(row.max_tokens or 0 for row in rows)


def parse_policy(text: str) -> tuple[str, dict[str, str]]:
    """ "tokenflow+scheduler.ablation.offload=false" as a policy and its settings."""
    policy, *settings = text.split("+")
    return policy, dict(parse_option(setting) for setting in settings)


def parse_option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"must be key=value, got {text!r}")
    return key, value


def scaled_mix(mix: dict[float | str, float], mean: float) -> str:
    """A mix of rates with the same proportions and this mean, as `bench serve` takes it."""
    factor = mean / sum(float(rate) * share for rate, share in mix.items())
    return ",".join(f"{float(rate) * factor:.4f}:{share}" for rate, share in mix.items())


def scored_at(result: Cell, rates: Sequence[float], mean: float) -> Cell:
    """A measured cell as if its requests had been sent with these rates."""
    records = msgspec.convert(result["requests"], list[RequestRecord])
    for record, rate in zip(records, rates, strict=True):
        record.rate = rate
    cpu_s = result["summary"]["client_cpu_s"]
    summary = summarize(records, cpu_s / result["summary"]["client_cpu_share"], cpu_s)
    return {**result, "rate": mean, "summary": as_json(summary), "requests": as_json(records)}


def as_json(value: object) -> Any:
    """The value as read back from JSON: no structs, null for NaN."""
    return msgspec.json.decode(msgspec.json.encode(value))


class Burst:
    """Runs cells with the workload, the server's settings and the reading rate. Servers get `kv_tokens` of KV."""

    def __init__(self, args: argparse.Namespace, store: Store, work: Path, kv_tokens: int) -> None:
        self._args = args
        self._store = store
        self._work = work
        self._rows = burst_rows(args.num_prompts)
        self._kv_tokens = kv_tokens
        self._timelines = TimelineFile(args.timelines) if args.timelines else None

    def settings(self) -> dict[str, Any]:
        """The settings that must be equal to compare cells: one set per result file."""
        return {**{name: getattr(self._args, name) for name in SETTINGS}, "kv_tokens": self._kv_tokens}

    def run(self) -> None:
        """All cells that the store lacks, at most --max-cells of them."""
        args = self._args
        plan: list[tuple[str, int]] = []
        for repeat in range(args.repeats):
            plan.append((PREFILL, repeat))
            if not args.rate and self._calibrated_by(repeat) == repeat:
                plan.append((CALIBRATION, repeat))
            # Rotated, so that no policy always runs first, or always after the same policy.
            turn = repeat % len(args.policies)
            plan += [(policy, repeat) for policy in args.policies[turn:] + args.policies[:turn]]
        missing = [cell for cell in plan if not self._store.has(*cell)]
        for done, (policy, repeat) in enumerate(missing[: args.max_cells]):
            if not self._store.has(policy, repeat):
                print(f"cell {done + 1} of {len(missing)}: {policy}, repeat {repeat} ...", file=sys.stderr, flush=True)
                self._run_cell(policy, repeat)

    def rate(self, repeat: int) -> float:
        """Tokens/s of one reader, on average. Raises KeyError before the calibration."""
        if self._args.rate:
            return float(self._args.rate)
        raw = self._store.get(CALIBRATION, self._calibrated_by(repeat))["summary"]["output_tokens_per_s"]
        # Rounded to four decimals, as on the client's command line.
        return round(float(self._args.rate_factor * raw / self._args.num_prompts), 4)

    def _calibrated_by(self, repeat: int) -> int:
        return repeat if self._args.calibrate == "repeat" else 0

    def _run_cell(self, policy: str, repeat: int) -> None:
        result = self._cell(policy, repeat)
        self._keep(policy, repeat, result)
        # fcfs knows no rates, so its calibration is also its own cell, scored once the rate is known.
        if policy == CALIBRATION and BASELINE in self._args.policies and self._args.generate_ahead_s is None:
            rate = self.rate(repeat)
            self._keep(BASELINE, repeat, scored_at(result, self._rates(rate), rate))

    def _keep(self, policy: str, repeat: int, result: Cell) -> None:
        self._store.add(policy, repeat, result)
        if policy in SPECIAL:
            return
        records = msgspec.convert(result["requests"], list[RequestRecord])
        if self._timelines and repeat == self._args.timelines_repeat:
            self._timelines.add(policy, repeat, records)
        if self._args.plots:
            timelines(records, self._args.plots / f"{policy}-{repeat}.png", title=f"{policy}, repeat {repeat}")

    def _rates(self, mean: float) -> list[float]:
        """The reading rate of each request, as the client hands them out."""
        if not self._args.mix:
            return [mean] * self._args.num_prompts
        mix = parse_rate_mix(scaled_mix(self._args.mix, mean))
        return [float(rate) for rate in mixed_rates(mix, self._args.num_prompts, MIX_SEED)]

    def _cell(self, policy: str, repeat: int) -> dict[str, Any]:
        rows = list(self._rows)
        random.Random(self._args.seed + repeat).shuffle(rows)
        if policy == PREFILL:
            return self.measure("fcfs", {}, [PromptRow(row.prompt, max_tokens=1) for row in rows], [])
        if policy == CALIBRATION:
            return self.measure("fcfs", {}, self._loosened(rows), [])
        name, settings = parse_policy(policy)
        if self._args.generate_ahead_s is not None:
            settings = {"scheduler.generate_ahead_s": str(self._args.generate_ahead_s), **settings}
        if self._args.mix:
            readers = ["--rate-mix", scaled_mix(self._args.mix, self.rate(repeat)), "--seed", str(MIX_SEED)]
        else:
            readers = ["--rate", f"{self.rate(repeat):.4f}"]
        return {"rate": self.rate(repeat), **self.measure(name, settings, self._loosened(rows), readers)}

    def _loosened(self, rows: Sequence[PromptRow]) -> list[PromptRow]:
        return [PromptRow(row.prompt, max_tokens=(row.max_tokens or 0) * self._args.loose) for row in rows]

    def measure(
        self, policy: str, settings: dict[str, str], rows: Sequence[PromptRow], readers: Sequence[str]
    ) -> dict[str, Any]:
        """One server from start to stop: a warm-up, the burst, and the engine's counters of it."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        write_rows(self._work / "burst.jsonl", rows)
        write_rows(self._work / "warm.jsonl", [PromptRow(row.prompt, max_tokens=16) for row in rows[:4]])
        exact = ["--ignore-eos"] if self._args.loose == 1 else []
        with running([*self._server(policy, settings), "--server.port", str(port)], url, "/ready") as server:
            self._client(url, "warm.jsonl", 4, [])
            before = get_json(f"{url}/health")["engine"]
            result = self._client(url, "burst.jsonl", len(rows), [*exact, *readers])
            after = get_json(f"{url}/health")["engine"]
        if not result["summary"]["num_completed"]:
            raise SystemExit(f"{policy} {settings}: no request completed: {result['summary']['failures']}")
        counted = ("step", "num_preemptions", "bytes_stored", "bytes_loaded")
        engine = {name: after[name] - before[name] for name in counted}
        return {
            "ready_s": server.ready_s,
            "engine": engine,
            "summary": result["summary"],
            "requests": result["requests"],
        }

    def _client(self, url: str, prompts: str, count: int, more: Sequence[str]) -> Any:
        command = [*CLIENT_NICE, sys.executable, "-m", "tfserve.cli", "bench", "serve", "--base-url", url]
        command += ["--endpoint", self._args.endpoint, "--prompts", str(self._work / prompts)]
        # A file is shuffled by the client too; the same seed everywhere keeps it the same permutation.
        command += ["--num-prompts", str(count), "--request-rate", "burst", *more]
        return run_json(command, self._work / "result.json")

    def _server(self, policy: str, settings: dict[str, str]) -> list[str]:
        args = self._args
        options = {
            "dtype": "float32",
            "threads": str(args.threads),
            "max_num_seqs": str(args.num_prompts),
            "block_size": str(BLOCK_SIZE),
            # One block is the engine's own.
            "num_gpu_blocks_override": str(self._kv_tokens // BLOCK_SIZE + 1),
            "host_kv_gib": "1",
            "scheduler.policy": policy,
            **({"quantization": args.quantization} if args.quantization else {}),
            **dict(args.server_option),
            **settings,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        return [sys.executable, "-m", "tfserve.cli", "serve", str(args.model), *words]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policies", type=lambda text: text.split(","), default=["fcfs", "tokenflow"])
    add("--repeats", type=int, default=5)
    add("--num-prompts", type=int, default=48)
    add(
        "--kv-share", type=float, default=0.25, help="device KV as a share of the burst's tokens (default: %(default)s)"
    )
    add("--rate-factor", type=float, default=0.8, help="sum of rates over fcfs raw throughput (default: %(default)s)")
    add("--rate", type=float, help="tokens/s of each reader, instead of measuring fcfs first")
    add("--calibrate", choices=("repeat", "run"), default="repeat", help="how often fcfs sets the rate")
    add("--mix", type=parse_rate_mix, help='kinds of readers, as "15:0.4,20:0.6"; scaled to the mean rate')
    add("--loose", type=int, default=1, help="max_tokens times this, with natural stops (default: exact lengths)")
    add("--generate-ahead-s", type=float, help="under every policy")
    add("--quantization", choices=("int8",))
    add("--endpoint", choices=("chat", "completions"), default="chat")
    add("--server-option", type=parse_option, action="append", default=[], metavar="KEY=VALUE", help="of every server")
    add("--model", type=Path, default=demo_model_dir())
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0, help="of the order of prompts; repeat n uses seed + n")
    add("--max-cells", type=int, help="stop after this many; run again to go on")
    add("--output", type=Path, default=Path(__file__).parents[1] / "results" / "burst.json")
    add("--records", type=Path, help="keep every cell's request records in this directory")
    add("--timelines", type=Path, help="keep when each token of one repeat came in this JSON file, for plots.py")
    add("--timelines-repeat", type=int, default=0, help="which repeat (default: %(default)s)")
    add("--plots", type=Path, help="draw every cell's token timelines into this directory (needs the extra bench)")
    add("--report-only", action="store_true", help="print the table of what the result file holds")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Store:
    """Measure the cells missing in the result file. Returns all its cells."""
    store = Store(args.output, args.records)
    with tempfile.TemporaryDirectory() as folder:
        kv_tokens = round(args.kv_share * burst_tokens(args.model, burst_rows(args.num_prompts)))
        burst = Burst(args, store, Path(folder), kv_tokens)
        store.open(burst.settings(), environment())
        if not args.report_only:
            burst.run()
    return store


def main() -> None:
    print(report(run(parse_args()).cells()))


if __name__ == "__main__":
    main()
