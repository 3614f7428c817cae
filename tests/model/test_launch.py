"""`ModelRunner.launch` never waits for a GPU: run on the meta device, whose tensors have no values to wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tfserve.memory.device_pool import DevicePool
from tfserve.memory.kv_layout import KVLayout
from tfserve.model.attention.base import PagedKV
from tfserve.model.attention.paged_backend import PagedBackend
from tfserve.model.config import ModelConfig, load_model_config
from tfserve.model.cuda_graphs import DecodeGraphs
from tfserve.model.decoder import Decoder
from tfserve.model.loader import load_model
from tfserve.model.runner import FailedStep, ModelRunner
from tfserve.plan import BlockId, Fence, InFlight, Row, RowInit, SeqStep, StepPlan
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


class Kernels:
    """Attention that takes the right shapes and computes nothing."""

    name = "none"

    def decode(self, q: Tensor, *_: object) -> Tensor:
        return torch.empty_like(q)

    prefill = decode


class Recorder:
    """Graphs that do nothing when they are replayed."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, work):
        def replay() -> None:
            self.replays += 1

        return replay, work()


class WaitingCopies(TorchDispatchMode):
    """Notes operations that take ordinary memory of the host to the device, which waits for all that is queued."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        # A number for the device to compute with is an argument of the kernel.
        from_host = any(each.device.type == "cpu" and each.dim() for each in tensors)
        non_blocking = kwargs.get(
            "non_blocking", args[2] if func is torch.ops.aten.copy_.default and args[2:] else False
        )
        if from_host and any(each.is_meta for each in tensors) and not non_blocking:
            self.seen.append(str(func))
        return out


class Runner:
    """A runner in bfloat16 as a GPU has it, its rows in blocks of their own, on the meta device."""

    def __init__(self, path: Path, *, masks=None) -> None:
        config: ModelConfig = load_model_config(path)
        model: Decoder = load_model(path, config, dtype="bfloat16", device="meta", quantization=None, progress=False)
        heads, width = config.num_key_value_heads, config.head_dim
        layout = KVLayout.for_device(
            "meta",
            "bfloat16",
            num_layers=config.num_hidden_layers,
            block_size=256,
            num_kv_heads=heads,
            head_dim=width,
        )
        kv = PagedKV(DevicePool(layout, 30, "meta").layers())
        self.backend = PagedBackend(Kernels())
        self.recorder = Recorder()
        rows = len(WISHES)
        graphs = DecodeGraphs(
            model, kv, self.backend, self.recorder, max_num_seqs=rows, max_blocks=2, num_processors=132
        )
        self.inner = ModelRunner(
            model, kv, self.backend, max_num_seqs=rows, max_model_len=500, graphs=graphs, masks=masks
        )
        self.waits: list[str] = []
        self.step = 0

    def launch(self, seqs: tuple[SeqStep, ...], n_decode: int, entered: tuple[RowInit, ...] = ()) -> InFlight:
        self.step += 1
        with WaitingCopies() as copies:
            flight = self.inner.launch(StepPlan(Fence(self.step), seqs, n_decode, entered))
        self.waits += copies.seen
        return flight


def prompts(runner: Runner) -> InFlight:
    """Every wish enters, two of them with output, as after a preemption."""
    entered = tuple(
        RowInit(Row(i), f"r{i}", SamplingParams(**wish), i, PROMPT, len(PROMPT) - 3 * (i % 2), (BlockId(i + 1),))
        for i, wish in enumerate(WISHES)
    )
    seqs = tuple(SeqStep(f"r{i}", Row(i), 0, len(PROMPT), True, PROMPT) for i in range(len(WISHES)))
    return runner.launch(seqs, 0, entered)


def decodes(runner: Runner, start: int) -> InFlight:
    seqs = tuple(SeqStep(f"r{i}", Row(i), start, 1, True, None) for i in range(len(WISHES)))
    return runner.launch(seqs, len(seqs))


def assert_launched(flight: InFlight) -> None:
    assert not isinstance(flight, FailedStep), repr(flight)
    with pytest.raises(Exception, match="meta"):
        flight.result()  # a result, in contrast, has to be read


def test_two_steps_and_more_are_launched_without_a_look_at_what_was_computed(tiny_llama3: Path) -> None:
    runner = Runner(tiny_llama3)
    flights = [prompts(runner), *(decodes(runner, len(PROMPT) + i) for i in range(3))]
    for flight in flights:
        assert_launched(flight)
    assert runner.recorder.replays == 3
    assert runner.waits == []


def test_a_backend_that_reads_stale_kv_makes_a_launch_look(tiny_llama3: Path) -> None:
    """The control: what the meta device does about a launch that waits."""
    runner = Runner(tiny_llama3)
    runner.backend.reads_stale_kv = True
    assert isinstance(prompts(runner), FailedStep)


@pytest.mark.parametrize(
    "waiting",
    [
        lambda device: torch.ones(3).to(device),
        lambda device: torch.zeros(4, device=device)[torch.tensor([1, 2])],
        lambda device: torch.zeros(3, device=device).copy_(torch.ones(3)),
    ],
)
def test_copies_that_wait_would_be_noticed(waiting) -> None:
    with WaitingCopies() as copies:
        waiting(torch.device("meta"))
    assert copies.seen
