"""tfserve against Hugging Face `generate` on this machine's CPU, in one run (benchmarks/compare/README.md).

    python -m benchmarks.compare.speed_cpu --repeats 3 --output benchmarks/results/speed_cpu.json

Each repeat measures, one after another and alone: HF generate at batch 1 and 16; for fp32 and for int8 a freshly
started server under 1 and under 32 streams over HTTP, from a client in its own process; the same 32 requests through an
embedded Engine. Ratios are formed within a repeat, so that a machine whose speed drifts drifts for both sides.
All sides get the same prompts of 64 tokens and make 64 new tokens per prompt, prefill included in every rate.
Run it on a quiet machine: one other busy process costs a 2-thread step most of its speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.local_server import CLIENT_NICE, free_port, run_json, running
from tfserve.bench.report import environment
from tfserve.bench.workload import random_prompt
from tfserve.model.loading.demo import demo_model_dir

PROMPT_TOKENS, NEW_TOKENS, STREAMS, HF_BATCH = 64, 64, 32, 16
FORMATS = ("fp32", "int8")


def write_prompts(model_dir: Path, path: Path) -> None:
    """Prompts of exactly PROMPT_TOKENS tokens each, as text."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    rng = random.Random(0)
    prompts: list[str] = []
    while len(prompts) < STREAMS:
        text = random_prompt(PROMPT_TOKENS, rng)
        if len(tokenizer.encode(text).ids) == PROMPT_TOKENS:
            prompts.append(text)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


@contextlib.contextmanager
def serving(args: argparse.Namespace, fmt: str) -> Iterator[tuple[str, float]]:
    """A fresh server: its address and the seconds it took to be ready."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tfserve.cli", "serve", str(args.model), "--server.port", str(port)]
    with running([*command, *engine_options(args, fmt)], url, "/ready") as server:
        yield url, server.ready_s


def engine_options(args: argparse.Namespace, fmt: str) -> list[str]:
    options = ["--dtype", "float32", "--threads", str(args.threads), "--max_num_seqs", str(STREAMS)]
    return options + (["--quantization", "int8"] if fmt == "int8" else [])


def measure_http(args: argparse.Namespace, fmt: str, prompts: Path, work: Path) -> dict[str, Any]:
    """Start a server, warm it, load it with one stream and with STREAMS at once."""
    with serving(args, fmt) as (url, ready_s):

        def load(streams: int, max_tokens: int) -> Any:
            command = [*CLIENT_NICE, sys.executable, "-m", "tfserve.cli", "bench", "serve", "--base-url", url]
            command += ["--endpoint", "completions", "--dataset", str(prompts), "--num-prompts", str(streams)]
            command += ["--max-tokens", str(max_tokens), "--ignore-eos", "--request-rate", "burst"]
            summary = run_json(command, work / "http.json")["summary"]
            if summary["output_tokens"] != streams * max_tokens:
                raise SystemExit(
                    f"{fmt}: {summary['output_tokens']} tokens came, not {streams * max_tokens}: {summary}"
                )
            return summary

        load(1, 8)
        return {"ready_s": ready_s, "one": load(1, NEW_TOKENS), "many": load(STREAMS, NEW_TOKENS)}


def embedded_rate(args: argparse.Namespace, fmt: str, prompts: Path) -> float:
    """Output tokens per second of the same requests through an Engine in this process."""
    from tfserve.config import EngineConfig
    from tfserve.engine.engine import Engine
    from tfserve.types import SamplingParams

    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    config = EngineConfig(
        model=str(args.model),
        dtype="float32",
        quantization="int8" if fmt == "int8" else None,
        threads=args.threads,
        max_num_seqs=STREAMS,
    )
    with Engine(config) as engine:
        engine.generate(texts[:1], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
        begin = time.perf_counter()
        outputs = engine.generate(texts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True))
        elapsed = time.perf_counter() - begin
    return sum(output.num_output_tokens for output in outputs) / elapsed


def measure_repeat(args: argparse.Namespace, prompts: Path, work: Path, with_bounds: bool) -> dict[str, Any]:
    hf = [sys.executable, str(Path(__file__).with_name("transformers_loop.py")), "--model", str(args.model)]
    hf += ["--prompts", str(prompts), "--threads", str(args.threads), "--batches", "1", str(HF_BATCH)]
    hf += ["--input-len", str(PROMPT_TOKENS), "--output-len", str(NEW_TOKENS)]
    result: dict[str, Any] = {"hf": run_json([*hf, *(["--bounds"] if with_bounds else [])], work / "hf.json")}
    for fmt in FORMATS:
        result[fmt] = measure_http(args, fmt, prompts, work)
        own = [
            sys.executable,
            "-m",
            "benchmarks.compare.speed_cpu",
            "--embedded",
            fmt,
            "--prompts",
            str(prompts),
            "--model",
            str(args.model),
        ]
        own += ["--threads", str(args.threads)]
        result[fmt]["embedded_tokens_per_s"] = run_json(own, work / "embedded.json")
    return result


def hf_rate(repeat: dict[str, Any], batch: int) -> float:
    return float(repeat["hf"]["generate_tokens_per_s"][str(batch)][0])


def http_rate(repeat: dict[str, Any], fmt: str, load: str) -> float:
    return float(repeat[fmt][load]["output_tokens_per_s"])


def line(name: str, values: list[float], unit: str, at_least: float | None = None, at_most: float | None = None) -> str:
    """One measured quantity: median and range over the repeats, its target and whether the median meets it."""
    middle = statistics.median(values)
    verdict = ""
    if at_least is not None:
        verdict = f"   target >= {at_least}: {'met' if middle >= at_least else 'MISSED'}"
    if at_most is not None:
        verdict = f"   target <= {at_most}: {'met' if middle <= at_most else 'MISSED'}"
    return f"{name:<48}{middle:>9.2f}  [{min(values):.2f} .. {max(values):.2f}] {unit}{verdict}"


def report(repeats: list[dict[str, Any]]) -> str:
    lines = [
        line("HF generate, batch 1", [hf_rate(r, 1) for r in repeats], "tokens/s"),
        line(f"HF generate, batch {HF_BATCH}", [hf_rate(r, HF_BATCH) for r in repeats], "tokens/s"),
    ]
    targets = {"fp32": (1.8, 2.3, 1.4), "int8": (2.8, 1.3, 2.3)}
    for fmt, (many, ttft, one) in targets.items():
        single = [http_rate(r, fmt, "one") for r in repeats]
        batch = [http_rate(r, fmt, "many") for r in repeats]
        inside = [float(r[fmt]["embedded_tokens_per_s"]) for r in repeats]
        single_ratio = [rate / hf_rate(r, 1) for rate, r in zip(single, repeats, strict=True)]
        batch_ratio = [rate / hf_rate(r, HF_BATCH) for rate, r in zip(batch, repeats, strict=True)]
        lost = [100 * (1 - over / rate) for over, rate in zip(batch, inside, strict=True)]
        first = [r[fmt]["many"]["ttft"]["mean"] for r in repeats]
        client = [100 * r[fmt]["many"]["client_cpu_share"] for r in repeats]
        lines += [
            "",
            line(f"{fmt}, 1 stream", single, "tokens/s"),
            line(f"{fmt}, 1 stream / HF batch 1", single_ratio, "x", at_least=one),
            line(f"{fmt}, {STREAMS} streams", batch, "tokens/s"),
            line(f"{fmt}, {STREAMS} streams / HF batch {HF_BATCH}", batch_ratio, "x", at_least=many),
            line(f"{fmt}, {STREAMS} streams, TTFT mean", first, "s", at_most=ttft),
            line(f"{fmt}, {STREAMS} requests, embedded Engine", inside, "tokens/s"),
            line(f"{fmt}, lost over HTTP", lost, "%", at_most=10),
            line(f"{fmt}, client CPU share of one core", client, "%"),
        ]
    # The very first start may have to read the weights from disk.
    starts = [r[fmt]["ready_s"] for r in repeats for fmt in FORMATS][1:]
    lines += ["", line("second and later starts, to ready", starts, "s", at_most=6), ""]
    for name, by_streams in repeats[0]["hf"]["bounds"].items():
        shown = ", ".join(f"{bound['tokens_per_s']:.0f} at {count}" for count, bound in by_streams.items())
        lines.append(f"matrix-product bound, {name}: tokens/s {shown} streams")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model_dir())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "speed_cpu.json")
    parser.add_argument("--embedded", choices=FORMATS, help="only measure the embedded Engine (run by this script)")
    parser.add_argument("--prompts", type=Path, help="prompts of --embedded")
    args = parser.parse_args()
    if args.embedded:
        args.output.write_text(json.dumps(embedded_rate(args, args.embedded, args.prompts)))
        return
    repeats: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_prompts(args.model, work / "prompts.jsonl")
        for number in range(args.repeats):
            print(f"repeat {number + 1} of {args.repeats} ...", file=sys.stderr, flush=True)
            repeats.append(measure_repeat(args, work / "prompts.jsonl", work, with_bounds=number == 0))
    text = report(repeats)
    print(text)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(), "table": text.splitlines(), "repeats": repeats}
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
