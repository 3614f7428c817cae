"""How much KV a GPU holds, and the step that decides it; the measuring itself is in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from tests.model.runner.test_runner import Driver
from tfserve.engine.core.cuda_device import kv_bytes, largest_step, run_largest
from tfserve.errors import ConfigError
from tfserve.model.runner.runner import FailedStep

GIB = 2**30


def test_kv_gets_the_wanted_share_less_what_the_peak_and_the_graphs_take():
    assert kv_bytes(80 * GIB, 60 * GIB, 0.9, GIB // 2) == 72 * GIB - 20 * GIB - GIB // 2
    # Memory of other processes counts too.
    assert kv_bytes(80 * GIB, 5 * GIB, 0.9, 0) < 0


@pytest.mark.parametrize(
    ("seqs", "tokens", "longest"), [(256, 2048, 8192), (8, 8192, 8192), (64, 32, 128), (1, 512, 100)]
)
def test_the_largest_step_spends_the_whole_budget_on_as_many_prompts_as_fit(seqs, tokens, longest):
    plan = largest_step(seqs, tokens, longest, 256, 1000)
    assert len(plan.seqs) == len(plan.entered) == min(seqs, tokens)
    assert plan.num_tokens == min(tokens, len(plan.seqs) * longest)
    assert max(seq.n for seq in plan.seqs) <= longest
    for seq in plan.seqs:
        assert len(seq.new_blocks) * 256 >= seq.n
        assert set(seq.new_blocks) == {1}
        assert seq.sample


def test_a_largest_step_without_room_says_what_to_set():
    class Full:
        def launch(self, plan):
            return FailedStep(torch.OutOfMemoryError("CUDA out of memory"))

        def close(self):
            pass

    with pytest.raises(ConfigError, match="a step of 64 tokens for 8 requests") as error:
        run_largest(Full(), largest_step(8, 64, 100, 256, 1000))
    assert error.value.key == "max_num_batched_tokens"


def test_the_largest_step_runs(tiny_llama3):
    """Through a real runner, whose blocks are smaller, with two blocks in all."""
    driver = Driver(tiny_llama3, num_blocks=2)
    plan = largest_step(8, 100, 64, 8, 512)
    result = driver.runner.launch(plan).result()
    assert len(result.tokens) == 8
    assert all(logprob is not None for logprob in result.logprobs)
    assert all(torch.isfinite(keys).all() for keys, _ in driver.kv.layers)
