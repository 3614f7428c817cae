"""The CUDA parts of an engine: a runner on a stream, with graphs, and the measurement of memory for KV."""

from __future__ import annotations

import gc
import logging
import time

import torch

from tfserve.config import EngineConfig
from tfserve.errors import ConfigError
from tfserve.memory.storage.device_pool import DevicePool
from tfserve.memory.storage.kv_layout import KVLayout
from tfserve.model.attention.base import AttentionBackend, PagedKV
from tfserve.model.attention.paged_backend import PagedBackend
from tfserve.model.decoder import Decoder
from tfserve.model.runner.cuda_graphs import CudaRecorder, DecodeGraphs
from tfserve.model.runner.cuda_stream_runner import CudaStreamRunner
from tfserve.model.runner.runner import ModelRunner
from tfserve.model.sampling.token_masks import TokenMasks
from tfserve.plan import BlockId, Runner, SeqStep, SlotId, SlotInit, StepId, StepPlan
from tfserve.types import SamplingParams

logger = logging.getLogger(__name__)

_GRAPH_BYTES = 512 * 2**20
"""Left free for the CUDA graphs, which are captured after the KV cache is allocated."""

_EVERYTHING = SamplingParams(temperature=1.0, top_p=0.9, top_k=100, repetition_penalty=1.1, logprobs=5)
"""Parameters with which the sampler needs most memory."""


def cuda_runner(
    model: Decoder,
    kv: PagedKV,
    backend: AttentionBackend,
    config: EngineConfig,
    *,
    max_model_len: int,
    stream: torch.cuda.Stream,
    masks: TokenMasks | None = None,
) -> CudaStreamRunner:
    """The runner of a live engine: on `stream`, with its decode graphs captured unless `enforce_eager`."""
    graphs = None
    if isinstance(backend, PagedBackend) and not config.enforce_eager:
        max_blocks = -(-max_model_len // kv.block_size)
        torch.cuda.synchronize(stream.device)  # the graphs' inputs were created on the default stream
        torch.cuda.empty_cache()  # as each capture does: it would pass for memory that the graphs gave
        began_s, free_before = time.monotonic(), torch.cuda.mem_get_info()[0]
        graphs = DecodeGraphs(
            model,
            kv,
            backend,
            CudaRecorder(stream),
            max_num_seqs=config.max_num_seqs,
            max_blocks=max_blocks,
            num_processors=torch.cuda.get_device_properties(stream.device).multi_processor_count,
        )
        seconds, taken = time.monotonic() - began_s, free_before - torch.cuda.mem_get_info()[0]
        logger.info("captured %d decode graphs in %.1f s, %.0f MiB", len(graphs), seconds, taken / 2**20)
    runner = ModelRunner(
        model, kv, backend, max_num_seqs=config.max_num_seqs, max_model_len=max_model_len, graphs=graphs, masks=masks
    )
    return CudaStreamRunner(runner, stream)


def kv_bytes(total: int, free_at_peak: int, utilization: float, reserved: int) -> int:
    """Bytes for KV: `utilization` times `total`, minus the peak of all other memory and `reserved`."""
    return int(utilization * total) - (total - free_at_peak) - reserved


def measure_kv_bytes(
    model: Decoder, layout: KVLayout, backend: AttentionBackend, config: EngineConfig, stream: torch.cuda.Stream
) -> int:
    """Bytes left for KV after the largest possible step has run; negative if none are left.

    The step's memory stays in torch's allocator and counts as used. Raises ConfigError if the step does not fit.
    """
    # Memory of an earlier engine may still be in the allocator, or in a reference cycle: free it, or it counts as used.
    gc.collect()
    torch.cuda.empty_cache()
    max_model_len = config.max_model_len or model.config.max_position_embeddings
    pool = DevicePool(layout, 2, "cuda")
    runner = ModelRunner(
        model, PagedKV(pool.layers()), backend, max_num_seqs=config.max_num_seqs, max_model_len=max_model_len
    )
    plan = largest_step(
        config.max_num_seqs, config.max_num_batched_tokens, max_model_len, layout.block_size, model.config.vocab_size
    )
    run_largest(CudaStreamRunner(runner, stream), plan)
    del runner, pool
    free, total = torch.cuda.mem_get_info()
    reserved = 0 if config.enforce_eager else _GRAPH_BYTES
    budget = kv_bytes(total, free, config.gpu_memory_utilization, reserved)
    logger.info(
        "device memory: %.1f of %.1f GiB taken by weights and the largest step, %.1f left for KV",
        (total - free) / 2**30,
        total / 2**30,
        budget / 2**30,
    )
    return budget


def run_largest(runner: Runner, plan: StepPlan) -> None:
    """Run a step to its end. Raises ConfigError if there is no memory for it."""
    try:
        runner.launch(plan).result()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "max_num_batched_tokens",
            f"a step of {plan.num_tokens} tokens for {len(plan.seqs)} requests does not fit into the device's memory"
            " beside the weights; set it or max_num_seqs to less",
        ) from error


def largest_step(
    max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int, vocab_size: int
) -> StepPlan:
    """The largest step: as many prompts of full length as fit, all sampled with every feature of the sampler.

    All prompts share one block and overwrite each other's KV. That KV is never read.
    """
    num_seqs = min(max_num_seqs, max_num_batched_tokens)
    share, left = divmod(max_num_batched_tokens, num_seqs)
    lengths = [min(share + (i < left), max_model_len) for i in range(num_seqs)]
    ids = [tuple((i * 31 + k) % vocab_size for k in range(n)) for i, n in enumerate(lengths)]
    entered = tuple(
        SlotInit(SlotId(i), f"profile-{i}", _EVERYTHING, i, tokens, len(tokens)) for i, tokens in enumerate(ids)
    )
    seqs = tuple(
        SeqStep(f"profile-{i}", SlotId(i), 0, n, True, ids[i], (BlockId(1),) * -(-n // block_size))
        for i, n in enumerate(lengths)
    )
    return StepPlan(StepId(-1), seqs, 0, entered)
