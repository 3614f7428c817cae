"""Compares default settings over HTTP: gains and losses of a change of defaults under five loads.

    python -m benchmarks.burst.defaults --variant before=../before --variant after=. --repeats 3

A variant is a checkout with settings of its own, as `NAME=DIR` or `NAME=DIR+scheduler.default_rate=8`; its server is
that checkout's `tfserve serve configs/smollm2-cpu.yaml`. A cell is one variant under one load in one repeat, with a
fresh server each, variants interleaved and rotated. The client is this checkout's, in its own process. Loads:

    burst    48 at once at `--burst-rate` tokens/s, with KV for a quarter of them
    held     40 at once at 6 tokens/s, with the KV there is
    unnamed  32 at once that name no rate (scored at 6 tokens/s)
    single   64 one after the other at `--single-rate` requests/s that name no rate (scored at 6)
    batch    4 completions of n=8 that are not streamed, beside 16 readers at 6 tokens/s

Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.burst.run import BLOCK_SIZE, burst_rows, burst_tokens, parse_option
from benchmarks.local_server import CLIENT_NICE, free_port, get_json, run_json, running
from tfserve.bench.report import environment
from tfserve.bench.workload import PromptRow, write_rows
from tfserve.model.loading.demo import demo_model_dir

LOADS = ("burst", "held", "unnamed", "single", "batch")
READ = 6
"""Tokens/s of the readers, and of the score where none are named."""

SINGLE_TOKENS = 48
BATCH, CHOICES, BATCH_TOKENS = 4, 8, 96

Cell = dict[str, Any]


class Variant(NamedTuple):
    """A checkout and its server's settings beyond its configuration file."""

    name: str
    checkout: Path
    settings: Mapping[str, str]


def parse_variant(text: str) -> Variant:
    name, _, rest = text.partition("=")
    checkout, *settings = rest.split("+")
    if not name or not (Path(checkout) / "tfserve").is_dir():
        raise argparse.ArgumentTypeError(f"must be NAME=CHECKOUT, with settings as +key=value, got {text!r}")
    return Variant(name, Path(checkout).resolve(), dict(map(parse_option, settings)))


class Bench:
    """Runs cells; `work` is a directory for files between the processes."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self._args = args
        self._work = work
        self._kv_tokens = burst_tokens(demo_model_dir(), burst_rows(48)) // 4

    def cell(self, variant: Variant, load: str) -> Cell:
        """One server from start to stop under one load."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        settings = {**self._extra(load), **variant.settings, "server.port": str(port)}
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        command = [sys.executable, "-m", "tfserve.cli", "serve"]
        command += [str(variant.checkout / "configs/smollm2-cpu.yaml"), *words]
        # Without it, the engine's process would import the package in the current directory.
        env = {**os.environ, "PYTHONPATH": str(variant.checkout), "PYTHONSAFEPATH": "1"}
        with running(command, url, "/ready", env=env) as server:
            policy = get_json(f"{url}/v1/streams")["policy"]
            _check_origin(server.process.pid, variant.checkout)
            self._client(url, [PromptRow(row.prompt, max_tokens=16) for row in burst_rows(4)], [])
            before = get_json(f"{url}/health")["engine"]
            result = getattr(self, f"_{load}")(url)
            after = get_json(f"{url}/health")["engine"]
        counted = {name: after[name] - before[name] for name in ("num_preemptions", "num_output_tokens")}
        return {"variant": variant.name, "load": load, "policy": policy, "engine": counted, **result}

    def _extra(self, load: str) -> dict[str, str]:
        if load != "burst":
            return {}
        blocks = str(self._kv_tokens // BLOCK_SIZE + 1)
        return {"max_num_seqs": "48", "block_size": str(BLOCK_SIZE), "num_gpu_blocks_override": blocks}

    def _burst(self, url: str) -> Cell:
        return self._client(url, burst_rows(48), ["--rate", str(self._args.burst_rate), "--ignore-eos"])

    def _held(self, url: str) -> Cell:
        return self._client(url, burst_rows(40), ["--rate", str(READ), "--ignore-eos"])

    def _unnamed(self, url: str) -> Cell:
        return self._client(url, burst_rows(32), ["--score-rate", str(READ), "--ignore-eos"])

    def _single(self, url: str) -> Cell:
        rows = [PromptRow(row.prompt, max_tokens=SINGLE_TOKENS) for row in burst_rows(64)]
        pace = ["--request-rate", str(self._args.single_rate)]
        return self._client(url, rows, ["--score-rate", str(READ), "--ignore-eos", *pace])

    def _batch(self, url: str) -> Cell:
        """The readers are measured as in the other loads; of each completion, the time to the whole answer."""
        seconds: list[float] = []
        rows = burst_rows(16 + BATCH)
        asking = [threading.Thread(target=_complete, args=(url, row.prompt, seconds)) for row in rows[16:]]
        for thread in asking:
            thread.start()
        result = self._client(url, rows[:16], ["--rate", str(READ), "--ignore-eos"])
        for thread in asking:
            thread.join()
        if len(seconds) < BATCH:
            raise SystemExit("a completion failed")
        return {**result, "batch_s": seconds}

    def _client(self, url: str, rows: Sequence[PromptRow], more: Sequence[str]) -> Cell:
        prompts = self._work / "prompts.jsonl"
        write_rows(prompts, rows)
        command = [*CLIENT_NICE, sys.executable, "-m", "tfserve.cli", "bench", "serve", "--base-url", url]
        command += ["--prompts", str(prompts), "--num-prompts", str(len(rows)), "--request-rate", "burst", *more]
        return {"summary": run_json(command, self._work / "result.json")["summary"]}


def _check_origin(pid: int, checkout: Path) -> None:
    """Raise SystemExit unless a server's process imports tfserve from the checkout it is to measure."""
    code = "import tfserve, pathlib; print(pathlib.Path(tfserve.__file__).parents[1])"
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    env = dict(variable.split("=", 1) for variable in variables if "=" in variable)
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    if Path(found.strip()) != checkout:
        raise SystemExit(f"the server of {checkout} runs the package of {found.strip()}")


def _complete(url: str, prompt: str, seconds: list[float]) -> None:
    body = {"prompt": prompt, "n": CHOICES, "max_tokens": BATCH_TOKENS, "temperature": 0.8, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    begin = time.perf_counter()
    asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=300) as response:
        if len(json.load(response)["choices"]) == CHOICES:
            seconds.append(time.perf_counter() - begin)


def _of(*path: str) -> Callable[[Cell], float]:
    def pick(cell: Cell) -> float:
        value: Any = cell["summary"]
        for name in path:
            value = value[name]
        return float(value)

    return pick


COLUMNS: dict[str, Callable[[Cell], float]] = {
    "TTFT mean, s": _of("ttft", "mean"),
    "TTFT P99, s": _of("ttft", "p99"),
    "end to end P50, s": _of("e2e", "p50"),
    "raw, tok/s": _of("output_tokens_per_s"),
    "effective, tok/s": _of("quality", "report", "effective_throughput"),
    "stalls, %": lambda cell: 100 * _of("quality", "report", "stall_share")(cell),
    "preemptions": lambda cell: float(cell["engine"]["num_preemptions"]),
    "batch, mean s": lambda cell: statistics.mean(cell["batch_s"]) if "batch_s" in cell else float("nan"),
    "all tokens, tok/s": lambda cell: cell["engine"]["num_output_tokens"] / max(_of("duration_s")(cell), 1e-9),
}


def report(cells: Sequence[Cell]) -> str:
    """Per load, a line a figure: median and range of each variant, and the last over the first within a repeat."""
    lines = []
    for load in dict.fromkeys(cell["load"] for cell in cells):
        own = [cell for cell in cells if cell["load"] == load]
        variants = list(dict.fromkeys(cell["variant"] for cell in own))
        lines += ["", f"{load:<20}" + "".join(f"{name:>30}" for name in (*variants, f"over {variants[0]}"))]
        for name, pick in COLUMNS.items():
            table = {variant: [pick(cell) for cell in own if cell["variant"] == variant] for variant in variants}
            if all(math.isnan(value) for values in table.values() for value in values):
                continue
            pairs = list(zip(table[variants[-1]], table[variants[0]], strict=False))
            ratios = [new / old for new, old in pairs if old]
            lines.append(f"{name:<20}" + "".join(_spread(values) for values in (*table.values(), ratios)))
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    text = f"{statistics.median(values):.3g} [{min(values):.3g} .. {max(values):.3g}]" if values else "-"
    return f"{text:>30}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variant", dest="variants", type=parse_variant, action="append", required=True, metavar="NAME=CHECKOUT")
    add("--loads", type=lambda text: text.split(","), default=list(LOADS))
    add("--repeats", type=int, default=3)
    add("--burst-rate", type=float, default=3.0, help="tokens/s of the burst's readers (default: %(default)s)")
    add("--single-rate", type=float, default=1.0, help="requests/s of `single` (default: %(default)s)")
    add("--output", type=Path, default=Path(__file__).parents[1] / "results" / "defaults.json")
    args = parser.parse_args()
    unknown = sorted(set(args.loads) - set(LOADS))
    if unknown:
        parser.error(f"--loads: {', '.join(unknown)}: choose from {', '.join(LOADS)}")
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for repeat, load in itertools.product(range(args.repeats), args.loads):
            turn = repeat % len(args.variants)
            for variant in args.variants[turn:] + args.variants[:turn]:
                print(f"repeat {repeat}: {load}, {variant.name} ...", file=sys.stderr, flush=True)
                cells.append({"repeat": repeat, **bench.cell(variant, load)})
                settings = {
                    "variants": {each.name: each.settings for each in args.variants},
                    "burst_rate": args.burst_rate,
                    "single_rate": args.single_rate,
                }
                whole = {"settings": settings, "environment": environment(), "cells": cells}
                args.output.write_text(json.dumps(whole, indent=1) + "\n")
    order = {variant.name: place for place, variant in enumerate(args.variants)}
    print(report(sorted(cells, key=lambda cell: (order[cell["variant"]], cell["repeat"]))))


if __name__ == "__main__":
    main()
