"""A runner with paged attention, assembled as on a GPU, and plans with every parameter of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tfserve.memory.storage.device_pool import DevicePool
from tfserve.memory.storage.kv_layout import KVLayout, KVOrder
from tfserve.model.attention.base import PagedKV
from tfserve.model.attention.paged_backend import PagedBackend
from tfserve.model.attention.paged_kernels import PagedKernels
from tfserve.model.loading.config import load_model_config
from tfserve.model.loading.loader import load_model
from tfserve.model.runner.cuda_graphs import DecodeGraphs, Recorder
from tfserve.model.runner.runner import ModelRunner
from tfserve.plan import BlockId, SeqStep, SlotId, SlotInit, StepId, StepPlan
from tfserve.types import SamplingParams

WISHES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"logprobs": 3},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "logprobs": 0},
    {"top_p": 0.5},
    {"top_k": 7},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"min_tokens": 9, "stop_token_ids": (5,), "logit_bias": {3: 1.0}},
    {"prompt_logprobs": 2},
]
PROMPT = tuple(range(3, 80))


def paged_runner(path: Path, device: str, kernels: PagedKernels, recorder: Recorder | None) -> ModelRunner:
    """In bfloat16, with a row for every parameter; decodes are replayed if there is a recorder."""
    config = load_model_config(path)
    model = load_model(path, config, dtype="bfloat16", device=device, quantization=None, progress=False)
    heads, width = config.num_key_value_heads, config.head_dim
    layout = KVLayout(KVOrder.BLOCK_MAJOR, config.num_hidden_layers, 256, heads, width, model.dtype)
    kv = PagedKV(DevicePool(layout, 30, device).layers())
    backend, rows, graphs = PagedBackend(kernels), len(WISHES), None
    if recorder is not None:
        graphs = DecodeGraphs(model, kv, backend, recorder, max_num_seqs=rows, max_blocks=2, num_processors=132)
    return ModelRunner(model, kv, backend, max_num_seqs=rows, max_model_len=500, graphs=graphs)


def plans(num_decodes: int) -> list[StepPlan]:
    """A prompt for every parameter in its own block (some with output, as after a preemption), and decodes."""
    rows = range(len(WISHES))
    entered = tuple(
        SlotInit(SlotId(i), f"r{i}", SamplingParams(**wish), i, PROMPT, len(PROMPT) - 3 * (i % 2), (BlockId(i + 1),))
        for i, wish in enumerate(WISHES)
    )
    prompts = tuple(SeqStep(f"r{i}", SlotId(i), 0, len(PROMPT), True, PROMPT) for i in rows)
    decodes = [
        StepPlan(
            StepId(1 + step),
            tuple(SeqStep(f"r{i}", SlotId(i), len(PROMPT) + step, 1, True, None) for i in rows),
            len(rows),
        )
        for step in range(num_decodes)
    ]
    return [StepPlan(StepId(0), prompts, 0, entered), *decodes]
