"""Ablation of TokenFlow: the burst of `benchmarks.burst.run` with one switch off at a time.

    python -m benchmarks.burst.ablation --repeats 3 --output benchmarks/results/ablation.json

On a CPU a copy between the tiers is a memcpy, so some switches have no effect. Every variant is therefore also measured
over an emulated link: a token's KV takes the same share of a decode step as on an RTX 4090 with Llama-3-8B
(`emulated_bandwidth` sets another one). All other options are those of `benchmarks.burst.run`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

from benchmarks.burst import run as burst
from benchmarks.burst.report import BASELINE, COLUMNS, SPECIAL, Cell
from benchmarks.cells import Store

SWITCHES = ("offload", "write_through", "load_evict_overlap", "priority_writes")
"""Settings of `scheduler.ablation`; one is switched off at a time."""

GPU_TOKEN_BYTES = 128 * 1024
GPU_LINK_BYTES_PER_S = 25e9
GPU_STEP_S = (16.1e9 + 5.2e9) / 1008e9
"""Llama-3-8B in 16 bits on an RTX 4090: a token's KV, what PCIe 4 x16 achieves of its 32 GB/s, and a decode step that
reads the weights and a full KV pool once at the memory's bandwidth."""

TOKEN_BYTES = 30 * 2 * 3 * 64 * 4
"""A token's KV of SmolLM2-135M in fp32: layers, keys and values, KV heads, head size, bytes."""

SHOWN = (
    "TTFT P99, s",
    "raw, tok/s",
    "effective, tok/s",
    "on time, tok/s",
    "stall share, %",
    "preemptions",
    "stored, MiB",
    "loaded, MiB",
)


def variants(bandwidth_gib_s: float | None) -> list[str]:
    """tokenflow whole and with each switch off, as `--policies` takes them; over an emulated link, if one is given."""
    link = "" if bandwidth_gib_s is None else f"+emulated_bandwidth={bandwidth_gib_s:.3g}"
    return ["tokenflow" + link, *(f"tokenflow+scheduler.ablation.{switch}=false{link}" for switch in SWITCHES)]


def equivalent_bandwidth(step_s: float) -> float:
    """GiB/s at which a token's KV takes the same share of a step of `step_s` as on the GPU above."""
    share = GPU_TOKEN_BYTES / GPU_LINK_BYTES_PER_S / GPU_STEP_S
    return TOKEN_BYTES / (share * step_s) / 2**30


def table(cells: Sequence[Cell]) -> str:
    """A row per variant: medians over its repeats."""
    picks = {"makespan, s": lambda cell: cell["summary"]["duration_s"], **dict(COLUMNS)}
    names = ("makespan, s", *SHOWN)
    lines = [f"{'':<80}" + "".join(f"{name:>18}" for name in names)]
    for policy in dict.fromkeys(cell["policy"] for cell in cells if cell["policy"] not in SPECIAL):
        own = [cell for cell in cells if cell["policy"] == policy]
        medians = (statistics.median(picks[name](cell) for cell in own) for name in names)
        lines.append(f"{policy:<80}" + "".join(f"{value:>18.2f}" for value in medians))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulated-bandwidth", type=float, help="GiB/s, instead of the 4090's share of a step")
    own, rest = parser.parse_known_args()
    args = burst.parse_args(rest)
    args.policies = [BASELINE, *variants(None)]
    store = burst.run(args)
    bandwidth = own.emulated_bandwidth or equivalent_bandwidth(step_of(store))
    print(f"emulated link: {bandwidth:.3g} GiB/s each way", file=sys.stderr)
    args.policies += variants(bandwidth)
    print(table(burst.run(args).cells()))


def step_of(store: Store) -> float:
    """Seconds of a typical decode step: the time between two tokens of a stream under fcfs."""
    return float(store.get(BASELINE, 0)["summary"]["tbt"]["p50"])


if __name__ == "__main__":
    main()
