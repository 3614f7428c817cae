"""Do preempted requests get exactly the tokens of an undisturbed run? `python benchmarks/exactness.py [--rounds N]`.

A real model in float32 (default: the SmolLM2 demo model), 24 requests, half of them greedy and half sampled with seeds.
A first run has KV for all; then they share a quarter of it, exchanged every few steps, by loading KV and by
recomputing it. Prints the preemptions and, per mismatch, where it begins and how near to a tie: the gap between the two
best tokens' log probabilities in the undisturbed run (for sampled requests that is no measure, and none is printed).
"""

from __future__ import annotations

import argparse
import random

from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.engine import Engine
from tfserve.types import RequestOutput, SamplingParams

NUM_REQUESTS = 24
BLOCK = 32
WAYS = {"load": True, "recompute": False}


def requests(num_tokens: int, round_number: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(round_number)
    prompts = [[rng.randrange(10, 20_000) for _ in range(rng.randrange(20, 120))] for _ in range(NUM_REQUESTS)]
    common = {"max_tokens": num_tokens, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, logprobs=2, **common) if i % 2 == 0 else SamplingParams(seed=i, **common)
        for i in range(NUM_REQUESTS)
    ]
    return prompts, params


def engine_for(args: argparse.Namespace, scheduler: SchedulerConfig, num_blocks: int) -> Engine:
    return Engine(
        EngineConfig(
            model=args.model,
            dtype="float32",
            engine_process="off",
            threads=args.threads,
            max_model_len=120 + args.tokens,
            max_num_seqs=NUM_REQUESTS,
            block_size=BLOCK,
            num_gpu_blocks_override=num_blocks,
            scheduler=scheduler,
        )
    )


def mismatch(name: str, index: int, expected: RequestOutput, got: RequestOutput) -> str | None:
    """What to print about a request whose tokens differ; None if they do not."""
    if expected.token_ids == got.token_ids:
        return None
    pairs = zip(expected.token_ids, got.token_ids, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected.token_ids), len(got.token_ids)))
    gap = ""
    if expected.logprobs and first < len(expected.logprobs):
        best, second = expected.logprobs[first].top
        gap = f", top-two gap {best[1] - second[1]:.2e}"
    return f"  {name}: request {index} differs from token {first} on{gap}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between exchanges")
    args = parser.parse_args()
    every = -(-(120 + args.tokens) // BLOCK) * NUM_REQUESTS
    batches = [requests(args.tokens, number) for number in range(args.rounds)]
    with engine_for(args, SchedulerConfig(), every + 1) as engine:
        expected = [engine.generate(*batch) for batch in batches]
    total, wrong = 0, 0
    for way, offload in WAYS.items():
        scheduler = SchedulerConfig(
            policy="round-robin", offload=offload, schedule_interval_s=args.interval, min_residency_s=args.interval
        )
        with engine_for(args, scheduler, every // 4 + 1) as engine:
            for number, batch in enumerate(batches):
                outputs = engine.generate(*batch)
                preemptions = sum(output.times.num_preemptions for output in outputs if output.times is not None)
                total += preemptions
                pairs = zip(expected[number], outputs, strict=True)
                found = [mismatch(way, i, one, two) for i, (one, two) in enumerate(pairs)]
                lines = [line for line in found if line is not None]
                wrong += len(lines)
                head = f"{way}, round {number}: {preemptions} preemptions, {len(lines)} mismatches"
                print(head, *lines, sep="\n", flush=True)
            stats = engine.stats()
            print(f"{way}: {stats.bytes_stored / 2**20:.0f} MiB stored, {stats.bytes_loaded / 2**20:.0f} MiB loaded")
    print(f"{total} preemptions, {wrong} mismatches in {len(WAYS) * args.rounds * NUM_REQUESTS} runs of a request")


if __name__ == "__main__":
    main()
