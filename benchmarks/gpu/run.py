"""Llama-3-8B's shape on one GPU, in sections; `make gpu-check` runs it after tests/gpu.

    python -m benchmarks.gpu.run --output results/gpu/gpu.json
    python -m benchmarks.gpu.run --only copies                     # one section alone
    python -m benchmarks.gpu.run --device cpu --shape tiny         # the script itself, on any machine

Weights are random and made on the device. The ceilings that every cell stands beside (copy bandwidth, matrix rate, link
speed) are measured first, on the same machine. Sections: `steps` (prefill and decode), `copies` (KV between the tiers,
alone and under decoding), `preemption`, `burst` (the paper's H200 (a), fcfs and tokenflow; shrunk on a smaller GPU);
and, only by name, `kernels` (which kernels a step's time goes to). Each has a budget of seconds and stops between two
cells when it is spent, or when the whole run has to end (--ends-in). Results are written after every cell; a section
that fails is noted with its error, the others still run, and the exit code is 1. If graphs fail, all runs without them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import logging
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.gpu.burst import run_burst
from benchmarks.gpu.rig import SHAPES, Rig, Shape, model_config, random_decoder
from benchmarks.gpu.roofline import measure_ceilings
from benchmarks.gpu.sections import ROOM, Ceilings, copies, kernels, preemption, step_times
from tfserve.model.decoder import Decoder

BUDGETS_S = {"steps": 120.0, "copies": 60.0, "preemption": 45.0, "burst": 220.0, "kernels": 60.0}
USUAL = [name for name in BUDGETS_S if name != "kernels"]
"""The default sections. `kernels` runs only by name: the profiler may slow later measurements."""

POLICIES = ("fcfs", "tokenflow")
WHOLE_BURST_BYTES = 120 * 2**30
"""A GPU with as much memory gets the paper's burst unshrunk."""

SMALL_SCALE = 0.35
LEFT_FREE = 0.12
"""Share of the GPU's memory left for activations and graphs in the steps section."""


class Results:
    """The JSON file, rewritten after every cell."""

    def __init__(self, path: Path, header: dict[str, Any], end_s: float) -> None:
        self._path = path
        self._end_s = end_s
        self.data: dict[str, Any] = {**header, "sections": {}}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        # Null for a missing measurement: JSON has no NaN.
        self._path.write_bytes(msgspec.json.format(msgspec.json.encode(self.data, enc_hook=float), indent=1) + b"\n")

    def run(self, name: str, cells: Callable[[], Iterator[dict[str, Any]]], budget_s: float) -> bool:
        """Run a section; False if it failed."""
        section: dict[str, Any] = {"budget_s": budget_s, "cells": []}
        self.data["sections"][name] = section
        began_s = time.monotonic()
        stop_s = min(began_s + budget_s, self._end_s)
        try:
            with contextlib.closing(cells()) as source:  # type: ignore[type-var]
                for cell in source:
                    section["cells"].append(cell)
                    print(f"{name:10} {line(cell)}", flush=True)
                    section["seconds"] = time.monotonic() - began_s
                    self.write()
                    if time.monotonic() > stop_s:
                        section["stopped"] = "the budget was spent; what is missing was not measured"
                        print(f"{name:10} stopped after {section['seconds']:.0f} s: no time left", flush=True)
                        break
        except Exception as error:
            section["error"] = f"{type(error).__name__}: {error}"
            section["traceback"] = traceback.format_exc()
            print(f"{name:10} FAILED: {section['error']}", flush=True)
        self.write()
        return "error" not in section and not any("error" in cell for cell in section["cells"])


def line(cell: dict[str, Any]) -> str:
    """A cell on one line."""
    shown = {key: value for key, value in cell.items() if not isinstance(value, dict | list)}
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def header(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, command, date."""
    packages = {}
    for name in ("torch", "flash-attn", "transformers", "numpy", "msgspec"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    gpu: dict[str, Any] = {}
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "packages": packages,
        "device": gpu or platform.processor() or platform.machine(),
        "shape": args.shape,
    }


def make_rig(args: argparse.Namespace, decoder: Decoder, shape: Shape) -> Rig:
    """As much KV as the GPU holds; on a CPU as the largest cell but one needs."""
    max_len = shape.contexts[-1] + ROOM
    if args.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        block_bytes = shape.layers * 2 * 256 * shape.kv_heads * shape.head_dim * decoder.dtype.itemsize
        num_blocks = int((free - LEFT_FREE * total) // block_bytes)
    else:
        num_blocks = 14
    return Rig.make(decoder, args.device, num_blocks, max_num_seqs=shape.batches[-1], max_len=max_len, eager=args.eager)


def rig_or_error(args: argparse.Namespace, decoder: Decoder, shape: Shape) -> tuple[Rig | None, str]:
    """A rig; or None and the traceback as text, which holds no memory. Raises without graphs: there is nothing less."""
    try:
        return make_rig(args, decoder, shape), ""
    except Exception:
        if args.eager:
            raise
        return None, traceback.format_exc()


def burst_cells(args: argparse.Namespace, decoder: Decoder, shape: Shape) -> Iterator[dict[str, Any]]:
    scale = args.burst_scale
    if scale is None:
        is_small = args.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < WHOLE_BURST_BYTES
        scale = SMALL_SCALE if is_small else 1.0
    for index, policy in enumerate(POLICIES):
        left_s = (args.end_s - time.monotonic()) / (len(POLICIES) - index)
        share_s = min(args.budgets["burst"] / len(POLICIES), left_s)
        cell = run_burst(
            decoder, shape, args.device, policy, scale=scale, budget_s=share_s, eager=args.eager, depth=args.depth
        )
        yield {**cell, "scale": scale, "pipeline_depth": args.depth}
        release_memory()


def release_memory() -> None:
    """Free the memory of the last section for the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/gpu/gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--only", choices=sorted(BUDGETS_S), action="append", help="a section alone; repeatable")
    parser.add_argument("--budget", action="append", default=[], metavar="SECTION=SECONDS")
    parser.add_argument("--ends-in", type=float, default=math.inf, metavar="SECONDS", help="for the whole run")
    parser.add_argument("--burst-scale", type=float, help="share of the paper's requests and KV (default: by memory)")
    parser.add_argument("--depth", type=int, choices=(1, 2), default=1, help="pipeline_depth of the burst")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    args = parser.parse_args()
    args.end_s = time.monotonic() + args.ends_in
    args.budgets = dict(BUDGETS_S)
    for text in args.budget:
        name, _, seconds = text.partition("=")
        if name not in BUDGETS_S:
            parser.error(f"--budget names a section, one of {', '.join(BUDGETS_S)}: got {text!r}")
        args.budgets[name] = float(seconds)
    return args


def main() -> int:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU; --device cpu --shape tiny exercises the script", file=sys.stderr)
        return 2
    shape = SHAPES[args.shape]
    wanted = args.only or USUAL
    results = Results(args.output, header(args), args.end_s)
    ceilings = Ceilings(measure_ceilings(args.device, small=args.device == "cpu"))
    results.data["ceilings"] = ceilings
    print("measured   " + line(ceilings), flush=True)
    release_memory()
    burst_len = 2 * (shape.burst_prompt + shape.burst_output)
    decoder = random_decoder(model_config(shape, max(burst_len, shape.contexts[-1] + ROOM)), args.device)
    good = True
    if set(wanted) - {"burst"}:
        rig, error = rig_or_error(args, decoder, shape)
        if rig is None:
            # Graphs are the part most likely to fail where they never ran; steps can do without.
            print(f"graphs FAILED, eager from here on:\n{error}", flush=True)
            results.data["graphs_failed"] = error
            good, args.eager = False, True
            release_memory()
            rig = make_rig(args, decoder, shape)
        results.data["attention_backend"] = rig.backend
        sections: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "steps": lambda: step_times(rig, shape, ceilings),
            "copies": lambda: copies(rig, shape, ceilings),
            "preemption": lambda: preemption(rig, shape),
            "kernels": lambda: kernels(rig, shape),
        }
        for name, cells in sections.items():
            if name in wanted:
                good = results.run(name, cells, args.budgets[name]) and good
        del rig, sections, cells
        release_memory()
    if "burst" in wanted:
        good = results.run("burst", lambda: burst_cells(args, decoder, shape), args.budgets["burst"]) and good
    print(f"written to {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
