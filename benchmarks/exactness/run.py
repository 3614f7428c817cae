"""Checks that preempted requests get exactly the tokens of an undisturbed run.

    python -m benchmarks.exactness.run [--mode load|recompute] [--sampling greedy|seeded] [--pipeline-depth 2]

A real model in float32 (default: the SmolLM2 demo model), 24 requests. First they run with KV for all; then they share
a quarter of it, and every second step of decoding all residents are preempted for others, which come back by loading
their KV or by computing it again; that run is as many steps deep as `--pipeline-depth` says, the first one is one deep.
The four parts (mode x sampling) are independent: run them together or one by one.

Loaded KV is compared with what was first computed, bit by bit. Where tokens differ, the first one must be a near-tie in
the undisturbed run: another batch rounds differently. How near: for greedy requests the gap between the logits of the
two tokens; for sampled ones how far the random number was from the probabilities that the other token is drawn at.
Exits 1 for other bits, for a mismatch that is no near-tie, and for too few preemptions (--least of all parts run).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.burst.forced_swaps import Carousel, KVWitness
from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.core.clock import RealClock
from tfserve.engine.core.host_memory import open_host_tier
from tfserve.engine.core.loop import EngineCore
from tfserve.engine.core.step_worker import StepWorker
from tfserve.engine.scheduling.assembly import KVMemory, make_scheduler
from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.machine import usable_cpus
from tfserve.memory.storage.device_pool import DevicePool
from tfserve.memory.storage.kv_layout import KVLayout
from tfserve.memory.transfers.worker_transfers import TierArrays
from tfserve.messages import AddRequest, StepOutputs, StreamStates
from tfserve.model.attention import select_backend
from tfserve.model.attention.base import PagedKV
from tfserve.model.loading.config import load_model_config
from tfserve.model.loading.hub import resolve_model
from tfserve.model.loading.loader import load_model
from tfserve.model.runner.forward_batch import BlockTables, build_batch
from tfserve.model.runner.runner import ModelRunner
from tfserve.model.sampling.token_draw import uniform
from tfserve.model.text.tokenizer import Tokenizer
from tfserve.plan import BlockId, SeqStep, SlotId, StepId, StepPlan
from tfserve.types import SamplingParams

NEAR = 1e-4
MODES, SAMPLINGS = ("load", "recompute"), ("greedy", "seeded")


@dataclass
class Run:
    """The results of one run of all requests."""

    tokens: dict[str, list[int]]
    preemptions: list[int]
    mib_loaded: float = 0.0
    returns_checked: int = 0
    tokens_checked: int = 0
    wrong: int = 0


class Bench:
    """The model, loaded once, and runs of the same requests on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        path = resolve_model(args.model)
        # All computation runs on this thread, at any depth.
        self.worker = StepWorker()
        self.worker.call(torch.set_num_threads, args.threads)
        self.config = load_model_config(path)
        self.model = self.worker.call(
            load_model, path, self.config, dtype="float32", device="cpu", quantization=None, progress=False
        )
        self.backend = select_backend("auto", device="cpu", dtype="float32", head_dim=self.config.head_dim)
        self.block_size = self.backend.block_size(None)
        self.tokenizer = Tokenizer.from_dir(path)
        rng = random.Random(0)
        vocabulary = range(10, min(20_000, self.config.vocab_size))
        self.prompts = [rng.choices(vocabulary, k=rng.randrange(16, args.longest)) for _ in range(args.requests)]
        self.longest = args.longest + args.tokens
        self.all_blocks = -(-self.longest // self.block_size) * args.requests

    def params(self, sampling: str, index: int) -> SamplingParams:
        common: dict[str, Any] = {"max_tokens": self.args.tokens, "ignore_eos": True}
        return SamplingParams(temperature=0, **common) if sampling == "greedy" else SamplingParams(seed=index, **common)

    def pool(self, num_blocks: int) -> DevicePool:
        config = self.config
        layout = KVLayout.for_device(
            "cpu",
            "float32",
            num_layers=config.num_hidden_layers,
            block_size=self.block_size,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        return DevicePool(layout, num_blocks, "cpu")

    def run(self, what: str, sampling: str, mode: str | None) -> Run:
        """All requests to their end; `mode` None: undisturbed."""
        args = self.args
        # A quarter of the KV; the longest request must fit alone.
        num_blocks = 1 + (
            self.all_blocks if mode is None else max(self.all_blocks // 4, self.all_blocks // args.requests)
        )
        pool, clock = self.worker.call(self.pool, num_blocks), RealClock()
        sched = SchedulerConfig(policy="round-robin" if mode == "load" else "fcfs")
        settings = EngineConfig(
            model=args.model, max_num_seqs=args.requests, scheduler=sched, host_kv_gib=args.host_gib
        )
        tier = open_host_tier(settings, pool, clock, None)
        budget, layout = settings.max_num_batched_tokens, pool.layout
        scheduler = make_scheduler(
            sched,
            KVMemory(self.block_size, num_blocks, tier.num_blocks if tier else 0),
            CostModel(kv_bytes_per_token=layout.token_bytes, max_num_seqs=args.requests),
            max_num_seqs=args.requests,
            max_num_batched_tokens=budget,
            transfers=tier.transfers if tier else None,
            policy=None if mode is None else Carousel(args.every, load=mode == "load"),
        )
        inner = self.worker.call(
            ModelRunner,
            self.model,
            PagedKV(pool.layers()),
            self.backend,
            max_num_seqs=args.requests,
            max_model_len=self.longest,
        )
        pages = pool.storage.numpy().transpose(2, 0, 1, 3)
        witness = KVWitness(inner, TierArrays.from_pages(pages, layout.num_kv_heads, layout.head_dim), self.longest)
        self.worker.serve(witness)
        tokens: dict[str, list[int]] = defaultdict(list)
        ended: dict[str, int] = {}

        def emit(step: StepOutputs | StreamStates) -> None:
            if isinstance(step, StreamStates):  # never requested here
                return
            for output in step.outputs:
                tokens[output.request_id] += output.token_ids
                if output.error:
                    raise RuntimeError(f"{output.request_id}: {output.error}")
                if output.times is not None:
                    ended[output.request_id] = output.times.num_preemptions

        core = EngineCore(
            scheduler=scheduler,
            runner=self.worker,
            clock=clock,
            tokenizer=self.tokenizer,
            eos_token_ids=self.config.eos_token_ids,
            seed=0,
            emit=emit,
            pipeline_depth=1 if mode is None else args.pipeline_depth,
        )
        for index, prompt in enumerate(self.prompts):
            core.inbox.put(AddRequest(str(index), list(prompt), self.params(sampling, index), clock.now()))
        begun = shown = time.monotonic()
        try:
            while len(ended) < args.requests:
                if not core.step():
                    core.sleep()
                now = time.monotonic()
                if now - shown > args.progress or len(ended) == args.requests:
                    shown = now
                    done = sum(map(len, tokens.values()))
                    print(
                        f"  {what}: {now - begun:5.0f} s, {done} of {args.requests * args.tokens} tokens, "
                        f"{scheduler.num_preemptions} preemptions",
                        flush=True,
                    )
        finally:
            scheduler.close()
        loaded = core.stats().bytes_loaded / 2**20
        counts = [ended[str(i)] for i in range(args.requests)]
        return Run(dict(tokens), counts, loaded, witness.checked, witness.tokens, len(witness.wrong))

    @torch.inference_mode()
    def nearness(self, index: int, sampling: str, before: list[int], one: int, other: int) -> float:
        """How close request `index` was to the token `other` where it got token `one` after the output `before`."""
        tokens = (*self.prompts[index], *before)
        num_blocks = -(-len(tokens) // self.block_size)
        kv, tables = PagedKV(self.pool(num_blocks + 1).layers()), BlockTables(1, num_blocks)
        blocks = tuple(BlockId(1 + i) for i in range(num_blocks))
        tables.extend(SlotId(0), blocks)
        seq = SeqStep(str(index), SlotId(0), 0, len(tokens), True, tokens, blocks)
        plan = StepPlan(StepId(0), (seq,), 0)
        batch = build_batch(plan, tables, torch.zeros(1, dtype=torch.int64), self.block_size)
        hidden = self.model(batch.input_ids, batch.positions, self.backend.build(batch, kv))
        logits = self.model.logits(hidden[batch.logits_indices])[0].double()
        if sampling == "greedy":
            return float(abs(logits[one] - logits[other]))
        ends = torch.softmax(logits, -1).cumsum(-1).numpy()
        number = float(uniform(np.array([index], np.uint64), np.array([len(tokens)]))[0])
        begin = ends[other - 1] if other else 0.0
        return float(max(begin - number, number - ends[other], 0.0))

    def part(self, mode: str, sampling: str) -> dict[str, Any]:
        """One part: compare an undisturbed run with one with preemptions; print and return the result."""
        begun = time.monotonic()
        expected = self.run(f"{sampling}, undisturbed", sampling, None)
        got = self.run(f"{sampling}, {mode}", sampling, mode)
        distances = []
        for index in range(self.args.requests):
            one, other = expected.tokens[str(index)], got.tokens[str(index)]
            if one != other:
                first = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
                distance = self.worker.call(self.nearness, index, sampling, one[:first], one[first], other[first])
                distances.append(distance)
                print(f"  request {index} differs from output token {first} on, {distance:.1e} from a tie")
        found = {
            "mode": mode,
            "sampling": sampling,
            "pipeline_depth": self.args.pipeline_depth,
            "requests": self.args.requests,
            "tokens_each": self.args.tokens,
            "preemptions": sum(got.preemptions),
            "preemptions_per_request": [min(got.preemptions), max(got.preemptions)],
            "mismatches": len(distances),
            "mismatches_no_near_tie": sum(distance >= NEAR for distance in distances),
            "mib_loaded": round(got.mib_loaded),
            "returns_compared": got.returns_checked,
            "tokens_compared": got.tokens_checked,
            "returns_with_other_bits": got.wrong + expected.wrong,
            "seconds": round(time.monotonic() - begun),
        }
        print(
            f"{sampling}, {mode}: {found['preemptions']} preemptions ({min(got.preemptions)} to "
            f"{max(got.preemptions)} each), {len(distances)} mismatches, {found['mismatches_no_near_tie']} of them no "
            f"near-tie; {got.returns_checked} returns with {got.tokens_checked} tokens of KV ({got.mib_loaded:.0f} MiB "
            f"loaded) compared, {found['returns_with_other_bits']} with other bits; {found['seconds']} s",
            flush=True,
        )
        return found


def save(path: Path, parts: list[dict[str, Any]]) -> None:
    """Put these parts into a results file, in place of earlier ones of the same name."""
    saved = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        deep = ", two deep" if part["pipeline_depth"] == 2 else ""
        saved[f"{part['sampling']}, {part['mode']}{deep}"] = part
    path.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, help="default: both")
    parser.add_argument("--sampling", choices=SAMPLINGS, help="default: both")
    parser.add_argument("--pipeline-depth", type=int, choices=(1, 2), default=1, help="default: %(default)s")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each")
    parser.add_argument("--longest", type=int, default=60, help="prompt tokens, at most")
    parser.add_argument("--every", type=int, default=2, help="steps of decoding between two preemptions")
    parser.add_argument("--least", type=int, help="preemptions to expect; default: 250 for each part")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--host-gib", type=float, default=1.0)
    parser.add_argument("--progress", type=float, default=5.0, help="seconds between two lines of progress")
    parser.add_argument("--output", type=Path, help="JSON file to add the parts to")
    args = parser.parse_args()
    bench = Bench(args)
    parts = []
    for mode, sampling in product(MODES, SAMPLINGS):
        if args.mode in (None, mode) and args.sampling in (None, sampling):
            parts.append(bench.part(mode, sampling))
            if args.output:
                save(args.output, parts)
    preemptions = sum(part["preemptions"] for part in parts)
    bad = sum(part["mismatches_no_near_tie"] + part["returns_with_other_bits"] for part in parts)
    mismatches = sum(part["mismatches"] for part in parts)
    print(f"{preemptions} preemptions in {len(parts)} parts, {mismatches} mismatches, all near-ties: {not bad}")
    least = 250 * len(parts) if args.least is None else args.least
    sys.exit(1 if bad or preemptions < least else 0)


if __name__ == "__main__":
    main()
