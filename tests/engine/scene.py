"""A moment in the life of an engine, written down request by request, as a policy would see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.scheduler_settings import scheduler_config
from tfserve.engine.scheduling.policies.tokenflow.policy import TokenFlow
from tfserve.engine.scheduling.policy import Decision, MemoryView, Snapshot
from tfserve.engine.scheduling.state import RequestState
from tfserve.engine.scheduling.tracker import Tracker


class FlatCost:
    """Costs that a test can do in its head."""

    def __init__(
        self, step=0.02, prefill=1e-4, out_s=0.01, back_s=0.01, capacity=1000.0, queue=0.0, prompts=0.0
    ) -> None:
        self.step, self.prefill_s_per_token, self.out_s, self.back_s = step, prefill, out_s, back_s
        self.capacity, self.queue, self.prompts_s = capacity, queue, prompts

    def step_s(self, n_decode, decode_ctx, n_prefill=0, prefill_ctx=0):
        return self.step + self.prefill_s_per_token * n_prefill + self.prompts_s * (n_prefill > 0)

    def recompute_s(self, num_tokens):
        return np.asarray(num_tokens, np.float64) * self.prefill_s_per_token

    def switch_s(self, evict_tokens, load_tokens, num_tokens):
        evict, load, n = np.broadcast_arrays(evict_tokens, load_tokens, num_tokens)
        return self.out_s * (evict > 0) + self.back_s * (load > 0), self.recompute_s(n)

    def queue_s(self, direction):
        return self.queue

    def capacity_tokens_per_s(self, mean_ctx, kv_tokens, prefill_per_output=0.0):
        return self.capacity


def set_kv(tracker: Tracker, reqs: Sequence[str], **counters) -> None:
    """Write `num_computed`, `device_blocks` or `host_tokens` of these requests, as the memory manager would."""
    for name, values in counters.items():
        tracker.table[name][tracker.table.rows(reqs)] = values


@dataclass
class Scene:
    """Blocks of 16; a running request holds the blocks of what it has computed, a paused one is on the host."""

    now_s: float = 100.0
    num_blocks: int = 100
    num_host_blocks: int = 1000
    num_free_host_blocks: int | None = None
    max_num_seqs: int = 64
    cost: FlatCost = field(default_factory=FlatCost)
    block_size: int = 16

    def __post_init__(self) -> None:
        self.tracker = Tracker(default_rate=20.0)
        self.held = 0

    def waiting(self, req, prompt=32, max_tokens=100, rate=20.0, for_s=0.5, **more) -> Scene:
        arrival = self.now_s - for_s
        self.tracker.add(req, arrival_s=arrival, num_prompt=prompt, max_tokens=max_tokens, rate=rate, **more)
        return self

    def running(
        self, req, unread_s=5.0, prompt=32, output=200, max_tokens=1000, rate=20.0, for_s=50.0, clean=True, **more
    ):
        computed = prompt + output - 1
        self._started(req, unread_s, prompt, output, max_tokens, rate, **more)
        self.tracker.set_state(req, RequestState.RUNNING, self.now_s - for_s)
        blocks = math.ceil(computed / self.block_size)
        self.held += blocks
        set_kv(self.tracker, [req], num_computed=computed, device_blocks=blocks, host_tokens=computed if clean else 0)
        return self

    def prefilling(self, req, prompt=320, computed=0, rate=20.0, for_s=0.2, **more) -> Scene:
        self.tracker.add(req, arrival_s=self.now_s - for_s, num_prompt=prompt, max_tokens=100, rate=rate, **more)
        self.tracker.set_state(req, RequestState.RUNNING, self.now_s - for_s)
        blocks = math.ceil(computed / self.block_size)
        self.held += blocks
        set_kv(self.tracker, [req], num_computed=computed, device_blocks=blocks)
        return self

    def paused(self, req, unread_s=5.0, prompt=32, output=200, max_tokens=1000, rate=20.0, for_s=3.0, **more):
        self._started(req, unread_s, prompt, output, max_tokens, rate, **more)
        self.tracker.set_state(req, RequestState.PAUSED, self.now_s - for_s)
        computed = prompt + output - 1
        set_kv(self.tracker, [req], num_computed=computed, host_tokens=computed)
        return self

    def loading(self, req, **kw) -> Scene:
        self.paused(req, **kw)
        c = self.tracker.columns(self.now_s)
        blocks = math.ceil(int(c.num_computed[c.ids.index(req)]) / self.block_size)
        self.tracker.set_state(req, RequestState.LOADING, self.now_s)
        set_kv(self.tracker, [req], device_blocks=blocks)
        self.held += blocks
        return self

    def _started(self, req, unread_s, prompt, output, max_tokens, rate, **more) -> None:
        """With `may_think` among the rest, all of its output are thoughts."""
        first = self.now_s - 60.0
        self.tracker.add(req, arrival_s=first, num_prompt=prompt, max_tokens=max_tokens, rate=rate, **more)
        self.tracker.on_tokens([req], output, first)
        if rate is not None:
            # Negative: dry for that long.
            when = self.now_s + min(unread_s, 0.0)
            self.tracker.on_played(req, output - round(max(unread_s, 0.0) * rate), when)

    def snapshot(self) -> Snapshot:
        free_host = self.num_host_blocks if self.num_free_host_blocks is None else self.num_free_host_blocks
        memory = MemoryView(
            self.block_size, self.num_blocks, self.num_blocks - self.held, self.num_host_blocks, free_host
        )
        assert memory.num_free_blocks >= 0, "the scene holds more blocks than there are"
        return Snapshot(self.now_s, self.tracker.columns(self.now_s), memory, self.cost, self.max_num_seqs, 512)


def decide(scene: Scene, **settings) -> Decision:
    """What a tokenflow policy of its own, without a watermark, says of the scene."""
    return TokenFlow(scheduler_config(policy="tokenflow", watermark=0.0, **settings)).decide(scene.snapshot())
