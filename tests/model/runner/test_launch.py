"""`ModelRunner.launch` never waits for a GPU: run on the meta device, whose tensors have no values to wait for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.model.launching import paged_runner, plans
from tfserve.model.attention.paged_backend import PagedBackend
from tfserve.model.runner.runner import FailedStep


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


def test_steps_are_launched_without_a_look_at_what_was_computed(tiny_llama3: Path) -> None:
    recorder = Recorder()
    runner = paged_runner(tiny_llama3, "meta", Kernels(), recorder)
    with WaitingCopies() as copies:
        flights = [runner.launch(plan) for plan in plans(3)]
    assert copies.seen == []
    assert recorder.replays == 3
    for flight in flights:
        assert not isinstance(flight, FailedStep), repr(flight)
        with pytest.raises((RuntimeError, NotImplementedError)):
            flight.result()  # which, in contrast, has to look


def test_without_graphs_neither(tiny_llama3: Path) -> None:
    runner = paged_runner(tiny_llama3, "meta", Kernels(), None)
    with WaitingCopies() as copies:
        flights = [runner.launch(plan) for plan in plans(2)]
    assert copies.seen == []
    assert not any(isinstance(flight, FailedStep) for flight in flights), flights


def test_a_launch_that_looks_fails_here(tiny_llama3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the finite check, which a backend that reads stale KV makes necessary."""
    monkeypatch.setattr(PagedBackend, "reads_stale_kv", True)
    runner = paged_runner(tiny_llama3, "meta", Kernels(), None)
    assert isinstance(runner.launch(plans(0)[0]), FailedStep)


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
