"""Puts an engine together: model, KV pool, runner, scheduler, core. The one place where the rooms meet. Uses torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tfserve.config import EngineConfig
from tfserve.engine.core.calibration import calibrate
from tfserve.engine.core.clock import RealClock
from tfserve.engine.core.cuda_device import cuda_runner, measure_kv_bytes
from tfserve.engine.core.host_memory import HostTierMemory, open_host_tier
from tfserve.engine.core.loop import EngineCore
from tfserve.engine.core.step_trace import StepTrace, TraceHead
from tfserve.engine.core.step_worker import StepWorker
from tfserve.engine.scheduling.assembly import KVMemory, make_scheduler
from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.engine.scheduling.grammar_gate import GrammarGate
from tfserve.errors import ConfigError, ModelError
from tfserve.machine import available_bytes, usable_cpus
from tfserve.memory.kv_manager import KVCacheManager
from tfserve.memory.storage.device_pool import DevicePool
from tfserve.memory.storage.kv_layout import KVLayout
from tfserve.messages import StepOutputs, StreamStates
from tfserve.model.attention import select_backend
from tfserve.model.attention.base import AttentionBackend, PagedKV
from tfserve.model.decoder import Decoder
from tfserve.model.loading.cache_dir import cache_dir
from tfserve.model.loading.config import ModelConfig, load_model_config
from tfserve.model.loading.fields import loading
from tfserve.model.loading.loader import load_model
from tfserve.model.runner.cuda_stream_runner import CudaStreamRunner
from tfserve.model.runner.runner import ModelRunner
from tfserve.model.sampling.token_masks import TokenMasks, open_masks
from tfserve.model.text.tokenizer import Tokenizer, all_eos_token_ids
from tfserve.plan import Clock, Runner
from tfserve.types import EngineInfo

logger = logging.getLogger(__name__)

_ROW_BYTES = 1024
"""Approximate size of a row without its block table: sampling parameters, entries in the scheduler's lists."""

_MAX_FOR_ROWS = 0.05
"""Share of the free memory that such tables may take."""


def build_core(
    config: EngineConfig, emit: Callable[[StepOutputs | StreamStates], None]
) -> tuple[EngineCore, EngineInfo]:
    """Load everything `config` names; `config.model` is a local directory by now. Raises ConfigError, ModelError."""
    if config.pipeline_depth == 1:
        return _build(config, emit, None)
    worker = StepWorker()
    try:
        return worker.call(_build, config, emit, worker)
    except BaseException:
        worker.close()
        raise


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model, on the device and in the dtype that it runs in, and what its outputs need."""

    config: ModelConfig
    device: str
    dtype: str
    threads: int
    backend: AttentionBackend
    model: Decoder
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    masks: TokenMasks | None


@dataclass(frozen=True, slots=True)
class _Cache:
    """KV memory on the device, and the longest context that it is to hold."""

    pool: DevicePool
    max_model_len: int


def _build(
    config: EngineConfig, emit: Callable[[StepOutputs | StreamStates], None], worker: StepWorker | None
) -> tuple[EngineCore, EngineInfo]:
    """Everything, on the thread that is to run the steps; with a worker, the calling thread is the worker's."""
    started_s = time.monotonic()
    loaded = _load(config)
    stream = torch.cuda.Stream() if loaded.device == "cuda" else None
    cache = _reserve(config, loaded, stream)
    runner = _runner(config, loaded, cache, stream)
    clock = RealClock()
    tier = open_host_tier(config, cache.pool, clock, runner if isinstance(runner, CudaStreamRunner) else None)
    scheduler = make_scheduler(
        config.scheduler,
        KVMemory(cache.pool.layout.block_size, cache.pool.num_blocks, tier.num_blocks if tier else 0),
        _timed(config, cache, runner, clock),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        transfers=tier.transfers if tier else None,
        gate=_gate(config, loaded.masks, clock),
    )
    if worker is not None:
        worker.serve(runner)
    core = EngineCore(
        scheduler=scheduler,
        runner=worker or runner,
        clock=clock,
        tokenizer=loaded.tokenizer,
        eos_token_ids=loaded.eos_token_ids,
        seed=config.seed,
        emit=emit,
        pipeline_depth=config.pipeline_depth,
        debug_checks=config.debug_checks,
        trace=_trace(config, loaded.device, scheduler.kv, cache.pool.layout.token_bytes),
    )
    return core, _info(config, loaded, cache, tier, time.monotonic() - started_s)


def _load(config: EngineConfig) -> _Loaded:
    """The model, checked against the device and its memory before its weights are read."""
    path = Path(config.model)
    with loading(path):
        model_config = load_model_config(path)
    device = _device(config)
    dtype = _dtype(config, model_config, device)
    threads = _set_threads(config, device)
    backend = select_backend(config.attention_backend, device=device, dtype=dtype, head_dim=model_config.head_dim)
    if device == "cpu":
        _check_weights(config, model_config, dtype)
    kind = config.quantization or dtype
    logger.info("Loading the weights: %.0f M parameters as %s, %s", model_config.num_parameters / 1e6, kind, device)
    with loading(path), ThreadPoolExecutor(1) as beside:
        tokenizer = Tokenizer.from_dir(path)
        eos_token_ids = all_eos_token_ids(model_config, tokenizer, path)
        # Masks and weights do not depend on each other, and both take seconds: load them in parallel.
        opening = beside.submit(open_masks, tokenizer.to_json(), model_config.vocab_size, eos_token_ids)
        model = load_model(
            path,
            model_config,
            dtype=dtype,
            device=device,
            quantization=config.quantization,
            progress=False,
            quantized_dir=None if config.quantization is None else _quantized_dir(),
        )
        masks = opening.result()
    return _Loaded(model_config, device, dtype, threads, backend, model, tokenizer, eos_token_ids, masks)


def _reserve(config: EngineConfig, loaded: _Loaded, stream: torch.cuda.Stream | None) -> _Cache:
    """KV memory on the device: as much as is asked for, or as the largest step leaves free on a GPU."""
    block_size = loaded.backend.block_size(config.block_size)
    layout = KVLayout.for_device(
        loaded.device,
        loaded.dtype,
        num_layers=loaded.config.num_hidden_layers,
        block_size=block_size,
        num_kv_heads=loaded.config.num_key_value_heads,
        head_dim=loaded.config.head_dim,
    )
    measured_bytes = None
    if stream is not None and config.num_gpu_blocks_override is None:
        measured_bytes = measure_kv_bytes(loaded.model, layout, loaded.backend, config, stream)
    num_blocks = _num_blocks(config, layout, loaded.device, measured_bytes)
    max_model_len = _max_model_len(config, loaded.config, num_blocks, block_size)
    _check_rows(config, max_model_len, block_size)
    logger.info("Reserving the KV cache: %d blocks of %d tokens", num_blocks, block_size)
    return _Cache(DevicePool(layout, num_blocks, loaded.device), max_model_len)


def _runner(
    config: EngineConfig, loaded: _Loaded, cache: _Cache, stream: torch.cuda.Stream | None
) -> ModelRunner | CudaStreamRunner:
    """What runs the steps: on a GPU, on `stream`."""
    model, backend, kv = loaded.model, loaded.backend, PagedKV(cache.pool.layers())
    max_model_len, masks = cache.max_model_len, loaded.masks
    if stream is None:
        return ModelRunner(
            model, kv, backend, max_num_seqs=config.max_num_seqs, max_model_len=max_model_len, masks=masks
        )
    return cuda_runner(model, kv, backend, config, max_model_len=max_model_len, stream=stream, masks=masks)


def _timed(config: EngineConfig, cache: _Cache, runner: Runner, clock: Clock) -> CostModel:
    """A cost model that has seen the runner's steps."""
    layout = cache.pool.layout
    logger.info("Warming up: timing steps of several sizes")
    cost = CostModel(kv_bytes_per_token=layout.token_bytes, max_num_seqs=config.max_num_seqs)
    calibrate(
        cost,
        runner,
        clock,
        config,
        num_blocks=cache.pool.num_blocks,
        block_size=layout.block_size,
        max_model_len=cache.max_model_len,
    )
    return cost


def _gate(config: EngineConfig, masks: TokenMasks | None, clock: Clock) -> GrammarGate | None:
    """Where requests wait for their grammar, if outputs can be held to one."""
    return None if masks is None else GrammarGate(masks.compiler, clock, max_held=max(32, config.max_num_seqs))


def _info(
    config: EngineConfig, loaded: _Loaded, cache: _Cache, tier: HostTierMemory | None, load_s: float
) -> EngineInfo:
    """What was loaded, for the front and the banner."""
    layout = cache.pool.layout
    return EngineInfo(
        model=config.served_model_name or config.model,
        architecture=loaded.config.architecture,
        num_parameters=loaded.config.num_parameters,
        dtype=loaded.dtype,
        quantization=config.quantization,
        device=loaded.device,
        attention_backend=loaded.backend.name,
        policy=config.scheduler.policy,
        max_model_len=cache.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        vocab_size=loaded.config.vocab_size,
        block_size=layout.block_size,
        num_blocks=cache.pool.num_blocks,
        kv_bytes_per_token=layout.token_bytes,
        threads=loaded.threads,
        load_s=load_s,
        num_host_blocks=tier.num_blocks if tier else 0,
        host_tier_reason=tier.reason if tier else "",
        grammars=loaded.masks is not None,
    )


def _trace(config: EngineConfig, device: str, kv: KVCacheManager, token_bytes: int) -> StepTrace | None:
    """The step trace, where one is wanted."""
    if config.step_trace is None:
        return None
    head = TraceHead(
        model=config.served_model_name or config.model,
        device=device,
        scheduler=config.scheduler,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=kv.block_size,
        num_blocks=kv.num_blocks,
        num_host_blocks=kv.num_host_blocks,
        kv_bytes_per_token=token_bytes,
    )
    return StepTrace(Path(config.step_trace), head)


def _device(config: EngineConfig) -> str:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device", "'cuda' was asked for, but torch sees no NVIDIA GPU; use 'cpu' or install its driver"
        )
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def _quantized_dir() -> Path | None:
    """Where int8 weights are kept; None where there is no place for them, which costs time at each start."""
    try:
        return cache_dir() / "int8"
    except ModelError as error:
        logger.warning("the int8 weights are not kept: %s", error)
        return None


def _dtype(config: EngineConfig, model: ModelConfig, device: str) -> str:
    """`auto` is the checkpoint's own dtype on a GPU and float32 on a CPU, where it is the fastest without AMX."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if device == "cpu" else model.dtype


def _set_threads(config: EngineConfig, device: str) -> int:
    threads = config.threads or usable_cpus()
    if device == "cpu":
        torch.set_num_threads(threads)
    return threads


def _check_weights(config: EngineConfig, model: ModelConfig, dtype: str) -> None:
    """Raise ConfigError if the weights alone do not fit into memory: the system would kill this process for them."""
    kind = config.quantization or dtype
    item_bytes = 1 if config.quantization else getattr(torch, dtype).itemsize
    least_bytes, free_bytes = model.num_parameters * item_bytes, available_bytes()
    if least_bytes > free_bytes:
        raise ConfigError(
            "model",
            f"its weights take at least {least_bytes / 2**30:.2f} GiB as {kind}, and {free_bytes / 2**30:.2f} are free;"
            " choose a smaller model, a smaller dtype, or quantization int8",
        )


def _num_blocks(config: EngineConfig, layout: KVLayout, device: str, measured_bytes: int | None) -> int:
    """Blocks in the device pool, the reserved one included; `measured_bytes` is what a GPU has left for them."""
    free_bytes = available_bytes() if device == "cpu" else torch.cuda.mem_get_info()[0]
    if config.num_gpu_blocks_override is not None:
        most = free_bytes // layout.block_bytes
        if config.num_gpu_blocks_override > most:
            raise ConfigError(
                "num_gpu_blocks_override",
                f"{config.num_gpu_blocks_override} blocks of {layout.block_bytes / 2**20:.3g} MiB of KV do not fit;"
                f" {free_bytes / 2**30:.1f} GiB are free, enough for {most}. Set it to less than that",
            )
        return config.num_gpu_blocks_override
    if measured_bytes is None:
        budget_bytes = int(config.kv_cache_gib * 2**30)
        if budget_bytes > free_bytes:
            raise ConfigError(
                "kv_cache_gib",
                f"{config.kv_cache_gib:g} GiB of KV cache do not fit; {free_bytes / 2**30:.1f} are free. Set a smaller"
                " value",
            )
    else:
        budget_bytes = measured_bytes
    num_blocks = budget_bytes // layout.block_bytes
    if num_blocks < 2:
        key = "kv_cache_gib" if measured_bytes is None else "gpu_memory_utilization"
        raise ConfigError(
            key, f"leaves {budget_bytes / 2**20:.0f} MiB for KV; a block takes {layout.block_bytes} bytes"
        )
    return int(num_blocks)


def _check_rows(config: EngineConfig, max_model_len: int, block_size: int) -> None:
    """Raise ConfigError if there is no memory for the tables of `max_num_seqs` rows."""
    row_bytes = _ROW_BYTES + 4 * -(-max_model_len // block_size)
    most = int(available_bytes() * _MAX_FOR_ROWS / row_bytes)
    if config.max_num_seqs > most:
        raise ConfigError(
            "max_num_seqs",
            f"the tables of {config.max_num_seqs} requests at once take {config.max_num_seqs * row_bytes / 2**30:.3g}"
            f" GiB, more than this machine can spare for them; set at most {most} (32 to 1024 are usual)",
        )


def _max_model_len(config: EngineConfig, model: ModelConfig, num_blocks: int, block_size: int) -> int:
    """The longest context: as asked or as the model was made for, and no more than the KV pool can hold."""
    kv_tokens = (num_blocks - 1) * block_size
    wanted = config.max_model_len or model.max_position_embeddings
    if config.max_model_len is not None and wanted > model.max_position_embeddings:
        limit = "sliding window" if model.sliding_window == model.max_position_embeddings else "own"
        raise ConfigError(
            "max_model_len", f"{wanted} is beyond the model's {limit} {model.max_position_embeddings} tokens"
        )
    if wanted <= kv_tokens:
        return wanted
    if config.max_model_len is not None:
        key = "kv_cache_gib" if config.num_gpu_blocks_override is None else "num_gpu_blocks_override"
        raise ConfigError(
            key,
            f"the KV cache holds {kv_tokens} tokens, one request of max_model_len {wanted} does not fit; raise {key}"
            f" or lower max_model_len to {kv_tokens}",
        )
    logger.warning("max_model_len lowered from %d to %d: the KV cache holds no more", wanted, kv_tokens)
    return kv_tokens
