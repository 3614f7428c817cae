"""Compares the simulation with this machine: `python -m benchmarks.burst.sim_reality --output RESULT.json`

Fits a profile to one real run of the demo model (Poisson arrivals of prompts of all lengths under tokenflow, short of
memory, so that KV moves between the tiers), then runs bursts of other prompts under several policies with KV for a
quarter of them, and simulates each burst on the fitted profile. Prints measured against simulated, and whether the
policies keep their order. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import msgspec

from tfserve.bench.replay import Comparison, comparison_table, replay
from tfserve.bench.report import environment
from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.core.step_trace import read_trace
from tfserve.engine.engine import Engine
from tfserve.engine.simulation.fitted import fit
from tfserve.types import SamplingParams

BLOCK_SIZE = 32
VOCABULARY = range(10, 20_000)
PROMPT_TOKENS = (20, 200)
TEACHING_TOKENS = (20, 500)
"""Range of prompt tokens in the fitted run."""
TEACHING_RATE = 0.9
"""Arrivals per second in the fitted run: close to this machine's limit, so that there are steps of every size."""
TEACHING_KV = 0.4
"""Share of its requests' tokens that fit in KV: less than they hold at once, so that copies measure the link."""
TIE = 0.05
"""Policies whose figures differ by less than this share cannot be told apart in one run on this machine."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--policies", default="fcfs,round-robin,tokenflow")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=6.0, help="tokens/s of every reader")
    parser.add_argument("--traces", type=Path, help="folder for the step traces (default: a temporary one)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.traces or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run(args, folder)


def run(args: argparse.Namespace, folder: Path) -> None:
    teacher = folder / "poisson.jsonl"
    rng = random.Random(1)
    gaps = [rng.expovariate(TEACHING_RATE) for _ in range(args.requests)]
    serve(args, "tokenflow", teacher, seed=1, gaps=gaps, kv_share=TEACHING_KV, prompt_tokens=TEACHING_TOKENS)
    profile = fit(read_trace(teacher))
    error, stores, loads = profile.error, profile.store_bytes_per_s / 1e9, profile.load_bytes_per_s / 1e9
    print(f"{profile.source}: median error {error.median:.1%}, sum {error.total:+.1%} on other steps")
    print(f"stores {stores:.2f} GB/s, loads {loads:.2f} GB/s\n")
    found: list[Comparison] = []
    for policy in args.policies.split(","):
        path = folder / f"burst-{policy}.jsonl"
        serve(args, policy, path, seed=2, gaps=[0.0] * args.requests, kv_share=0.25)
        found.append(replay(profile, read_trace(path), path.name))
        print(comparison_table(found[-1]) + "\n")
    kept = {metric: same_order(found, metric) for metric in ("ttft_mean_s", "ttft_p99_s", "output_tokens_per_s")}
    print(f"order of the policies kept: {kept}")
    result = {"environment": environment(), "profile": profile, "bursts": found, "order_kept": kept}
    args.output.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def serve(
    args: argparse.Namespace,
    policy: str,
    trace: Path,
    *,
    seed: int,
    gaps: Sequence[float],
    kv_share: float,
    prompt_tokens: tuple[int, int] = PROMPT_TOKENS,
) -> None:
    """One real run with a step trace; each request arrives `gaps` seconds after the one before."""
    rng = random.Random(seed)
    prompts = [[rng.choice(VOCABULARY) for _ in range(rng.randrange(*prompt_tokens))] for _ in gaps]
    outputs = [round(args.output_tokens * rng.uniform(0.6, 1.4)) for _ in gaps]
    longest = max(len(prompt) + output for prompt, output in zip(prompts, outputs, strict=True))
    tokens = sum(map(len, prompts)) + sum(outputs)
    config = EngineConfig(
        model=args.model,
        threads=args.threads,
        max_model_len=longest + 1,
        max_num_seqs=len(gaps),
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=max(int(tokens * kv_share), longest) // BLOCK_SIZE + 2 + len(gaps),
        scheduler=SchedulerConfig(policy=policy, overload="share"),  # type: ignore[arg-type]
        step_trace=str(trace),
    )
    with Engine(config) as engine:
        asyncio.run(send_all(engine, prompts, outputs, gaps, args.rate))


async def send_all(
    engine: Engine, prompts: Sequence[list[int]], outputs: Sequence[int], gaps: Sequence[float], rate: float
) -> None:
    async def read(prompt: list[int], num_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        async for _ in engine.stream(prompt, params, rate=rate):
            pass

    async with asyncio.TaskGroup() as group:
        for prompt, num_tokens, gap_s in zip(prompts, outputs, gaps, strict=True):
            await asyncio.sleep(gap_s)
            group.create_task(read(prompt, num_tokens))


def same_order(found: Sequence[Comparison], metric: str) -> bool:
    """True if the simulation ranks every two policies as measured; those within TIE of each other have no order."""
    for one, other in combinations(found, 2):
        measured = [getattr(comparison.measured, metric) for comparison in (one, other)]
        simulated = [getattr(comparison.simulated, metric) for comparison in (one, other)]
        is_tie = max(measured) <= (1 + TIE) * min(measured)
        if not is_tie and (measured[0] < measured[1]) != (simulated[0] < simulated[1]):
            return False
    return True


if __name__ == "__main__":
    main()
