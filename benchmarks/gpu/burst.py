"""The paper's burst on a real device: all requests at once, KV limited, one policy after another, same weights."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from benchmarks.gpu.rig import Shape, as_checkpoint
from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.core.build import build_core
from tfserve.engine.scheduling.qos import Served, score
from tfserve.messages import AddRequest, Shutdown, StepOutputs, StreamStates
from tfserve.model.decoder import Decoder
from tfserve.types import SamplingParams

RATE = 20.0
SPREAD = 0.2
"""Standard deviation of lengths, as a share of their mean."""


class Recorder:
    """Takes the core's messages; ends the core when all requests have finished, or at the deadline."""

    def __init__(self, num_requests: int, budget_s: float) -> None:
        self.token_s: dict[str, list[float]] = {}
        self.num_finished = 0
        self.complete = False
        self.failed: list[str] = []
        self.stats: dict[str, Any] = {}
        self.core: Any = None
        self._num_requests = num_requests
        self._budget_s = budget_s
        self._deadline = math.inf
        self._asked = False

    def start(self) -> None:
        """All requests have arrived: the time limit starts now, without the time to build the engine."""
        self._deadline = time.monotonic() + self._budget_s

    def __call__(self, message: StepOutputs | StreamStates) -> None:
        # No StreamStates are requested, and a request that is aborted at the end has not finished.
        if isinstance(message, StreamStates) or self._asked:
            return
        now_s = time.monotonic()
        for output in message.outputs:
            self.token_s.setdefault(output.request_id, []).extend([now_s] * len(output.token_ids))
            if output.error:
                self.failed.append(output.error)
            self.num_finished += output.finish_reason is not None
        self.stats = msgspec.to_builtins(message.stats)
        if self.num_finished == self._num_requests or now_s > self._deadline:
            self._asked = True
            self.complete = self.num_finished == self._num_requests
            self.core.inbox.put(Shutdown())


def lengths(mean: int, count: int, rng: np.random.Generator) -> list[int]:
    """Normal around the mean, clamped as the paper's workloads are."""
    drawn = rng.normal(mean, SPREAD * mean, count).round()
    return [int(n) for n in drawn.clip(min(16, mean), 2 * mean)]


def run_burst(
    decoder: Decoder,
    shape: Shape,
    device: str,
    policy: str,
    *,
    scale: float,
    budget_s: float,
    eager: bool,
    depth: Literal[1, 2],
) -> dict[str, Any]:
    """One policy. `scale` shrinks the number of requests and the KV together, so that the pressure stays."""
    count = max(2, round(shape.burst_requests * scale))
    rng = np.random.default_rng(0)
    prompts, outputs = (lengths(mean, count, rng) for mean in (shape.burst_prompt, shape.burst_output))
    recorder = Recorder(count, budget_s)
    with as_checkpoint(decoder) as path:
        block_size = 256 if device == "cuda" else 32
        config = EngineConfig(
            model=str(path),
            device=device,  # type: ignore[arg-type]
            dtype=decoder.config.dtype,
            max_model_len=decoder.config.max_position_embeddings,
            max_num_seqs=min(256, count),
            max_num_batched_tokens=min(4096, shape.prefill_tokens),
            num_gpu_blocks_override=1 + round(shape.burst_kv_tokens * scale) // block_size,
            enforce_eager=eager,
            pipeline_depth=depth,
            threads=torch.get_num_threads(),
            scheduler=SchedulerConfig(policy=policy),  # type: ignore[arg-type]
        )
        began_s = time.monotonic()
        core, info = build_core(config, recorder)
        build_s = time.monotonic() - began_s
        recorder.core = core
        arrival_s = time.monotonic()
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            ids = rng.integers(1, shape.vocab, prompt).tolist()
            params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
            core.inbox.put(AddRequest(f"b{i}", ids, params, arrival_s, RATE))
        recorder.start()
        try:
            core.run()
        finally:
            core.close()
    times = [np.array(recorder.token_s.get(f"b{i}", [])) for i in range(count)]
    report = score([Served(arrival_s, RATE, each) for each in times])
    return {
        "kind": "burst",
        "policy": policy,
        "requests": count,
        "kv_tokens": (info.num_blocks - 1) * info.block_size,
        "host_blocks": info.num_host_blocks,
        "attention": info.attention_backend,
        "build_s": build_s,
        "complete": recorder.complete,
        "finished": recorder.num_finished,
        "errors": recorder.failed[:3],
        **msgspec.to_builtins(report),
        "stats": recorder.stats,
    }
