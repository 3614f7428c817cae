"""make_scheduler: a Scheduler and the managers it works with, put together in one place. Torch-free."""

from __future__ import annotations

import msgspec

from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.engine.scheduling.grammar_gate import GrammarGate
from tfserve.engine.scheduling.offload_manager import OffloadManager
from tfserve.engine.scheduling.policies import make_policy
from tfserve.engine.scheduling.policy import Policy
from tfserve.engine.scheduling.scheduler import Scheduler
from tfserve.engine.scheduling.tracker import Tracker
from tfserve.memory.block_pool import BlockPool
from tfserve.memory.kv_manager import KVCacheManager, OffloadOptions, store_chunk_of
from tfserve.plan import TransferEngine


class KVMemory(msgspec.Struct, frozen=True):
    """The KV memory of both tiers, in blocks of `block_size` tokens.

    `num_blocks` and `num_host_blocks` include the reserved block of each; `num_host_blocks` 0: there is no host tier.
    """

    block_size: int
    num_blocks: int
    num_host_blocks: int = 0


def make_scheduler(
    config: SchedulerConfig,
    memory: KVMemory,
    cost: CostModel,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    transfers: TransferEngine | None = None,
    policy: Policy | None = None,
    gate: GrammarGate | None = None,
) -> Scheduler:
    """A scheduler over `memory`, all of it free, with the policy that `config` names unless one is given.

    `transfers` moves KV to the host tier and back; ValueError if there is one without the other. `gate` as Scheduler's.
    """
    # A request's stretch of blocks is never more than its share of the pool.
    share = memory.num_blocks * memory.block_size // max_num_seqs
    tracker = Tracker(config.default_rate, config.max_rate)
    kv = KVCacheManager(
        tracker.table,
        BlockPool(memory.num_blocks),
        memory.block_size,
        share,
        BlockPool(memory.num_host_blocks) if memory.num_host_blocks else None,
        options=OffloadOptions(
            config.ablation.write_through, config.ablation.load_evict_overlap, store_chunk_of(memory.block_size)
        ),
    )
    return Scheduler(
        policy or make_policy(config),
        kv,
        OffloadManager(kv, cost, transfers),
        cost,
        tracker=tracker,
        config=config,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gate=gate,
    )
