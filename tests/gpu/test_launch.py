"""Launching on a real device: `launch` never waits, and the results that are read later are correct."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.model.launching import paged_runner, plans
from tfserve.model.attention.paged_kernels import FlashKernels
from tfserve.model.runner.cuda_graphs import CudaRecorder
from tfserve.model.runner.cuda_stream_runner import CudaStreamRunner

KERNELS = FlashKernels.load()

pytestmark = [
    pytest.mark.skipif(KERNELS is None, reason="flash-attn is not installed"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Any wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stream_runner(model_dir, *, with_graphs: bool) -> CudaStreamRunner:
    stream = torch.cuda.Stream()
    recorder = CudaRecorder(stream) if with_graphs else None
    return CudaStreamRunner(paged_runner(model_dir, "cuda", KERNELS, recorder), stream)


@pytest.mark.parametrize("with_graphs", [True, False])
def test_nothing_in_launch_waits_and_results_may_be_read_late(model_dir, with_graphs):
    steps = plans(6)
    late, each = (stream_runner(model_dir, with_graphs=with_graphs) for _ in range(2))
    expected = [each.launch(plan).result() for plan in steps]
    with waiting_forbidden():
        flights = [late.launch(plan) for plan in steps]
    results = [flight.result() for flight in flights]
    for one, other in zip(expected, results, strict=True):
        assert other.tokens == one.tokens
        assert other.logprobs == one.logprobs
        assert other.prompt_logprobs == one.prompt_logprobs
        assert not other.failed
        assert other.device_s > 0
        assert other.idle_s >= 0


def test_a_wait_would_be_noticed():
    with waiting_forbidden(), pytest.raises(RuntimeError):
        torch.ones(3, device="cuda").sum().item()


def test_a_row_that_is_not_finite_fails_alone(model_dir):
    runner = stream_runner(model_dir, with_graphs=False)
    first, second = plans(1)
    runner.launch(first).result()
    for keys, _ in runner._inner._kv.layers:
        keys[3] = torch.nan  # the third row's block
    torch.cuda.synchronize()
    result = runner.launch(second).result()
    assert [req for req, _ in result.failed] == ["r2"]
    assert result.tokens[2] == 0
