"""A tiny random model on the GPU: graphs, transfers and sampling give the tokens of an undisturbed eager run."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.engine import Engine
from tfserve.model.attention.paged_kernels import FlashKernels
from tfserve.model.config import load_model_config
from tfserve.model.loader import load_model
from tfserve.types import SamplingParams

NUM_REQUESTS, NUM_TOKENS = 10, 300
SHARED = {"schedule_interval_s": 0.02, "min_residency_s": 0.02}

needs_flash = pytest.mark.skipif(FlashKernels.load() is None, reason="flash-attn is not installed")


def run(model_dir, *, num_blocks: int, scheduler: SchedulerConfig, **settings):
    config = EngineConfig(
        model=str(model_dir),
        device="cuda",
        engine_process="off",
        max_model_len=1024,
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=num_blocks,
        debug_checks=True,
        scheduler=scheduler,
        **{"dtype": "bfloat16", "host_kv_gib": 0.25, **settings},
    )
    prompts = [[3 + (i * 7 + k) % 500 for k in range(40 + 60 * i)] for i in range(NUM_REQUESTS)]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    drawn = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=NUM_TOKENS, ignore_eos=True) for i in range(NUM_REQUESTS)
    ]
    params = [drawn[i] if i % 2 else greedy for i in range(NUM_REQUESTS)]
    with Engine(config) as engine:
        outputs = engine.generate(prompts, params, rate=500.0)
        return [output.token_ids for output in outputs], engine.stats(), engine.info


def agreement(one, other) -> float:
    """Mean share of each request's tokens before the first that differs: in bf16 a near-tie may fall either way."""
    shares = []
    for a, b in zip(one, other, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        shares.append(same / len(a))
    return sum(shares) / len(shares)


def test_float32_on_the_gpu_gives_the_cpus_tokens(model_dir):
    settings = {"dtype": "float32", "num_blocks": 400, "scheduler": SchedulerConfig()}
    tokens, _, info = run(model_dir, **settings)
    assert info.attention_backend == "torch"
    prompt = [3 + k % 500 for k in range(40)]
    config = load_model_config(model_dir)
    assert config.head_dim == 64
    reference = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert tokens[0][:32] == expected[0, 40:].tolist()


@needs_flash
def test_flash_attn_is_chosen_and_graphs_agree_with_eager(model_dir):
    graphs, _, info = run(model_dir, num_blocks=60, scheduler=SchedulerConfig())
    eager, _, _ = run(model_dir, num_blocks=60, scheduler=SchedulerConfig(), enforce_eager=True)
    assert info.attention_backend == "flash_attn"
    assert info.block_size == 256
    assert agreement(graphs, eager) > 0.5


@needs_flash
def test_two_deep_gives_the_tokens_of_one_deep(model_dir):
    one, two = (run(model_dir, num_blocks=60, scheduler=SchedulerConfig(), pipeline_depth=depth)[0] for depth in (1, 2))
    assert agreement(two, one) > 0.5


@needs_flash
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["round-robin", "tokenflow"])
def test_preempted_requests_go_on_as_if_undisturbed(model_dir, policy, depth):
    undisturbed, _, _ = run(model_dir, num_blocks=60, scheduler=SchedulerConfig())
    scheduler = SchedulerConfig(policy=policy, **SHARED)
    tokens, stats, _ = run(model_dir, num_blocks=21, scheduler=scheduler, pipeline_depth=depth)
    assert stats.num_preemptions > 0
    if policy == "round-robin":
        assert stats.bytes_loaded > 0
    assert agreement(tokens, undisturbed) > 0.5


@needs_flash
def test_memory_that_is_left_decides_the_number_of_blocks(model_dir):
    few, many = (
        run(model_dir, num_blocks=None, scheduler=SchedulerConfig(), gpu_memory_utilization=share)[2].num_blocks
        for share in (0.2, 0.4)
    )
    total = torch.cuda.get_device_properties(0).total_memory
    block_bytes = 3 * 2 * 256 * 2 * 64 * 2
    assert (many - few) * block_bytes == pytest.approx(0.2 * total, rel=0.1)


def test_loading_in_bfloat16_puts_weights_on_the_device(model_dir):
    config = load_model_config(model_dir)
    model = load_model(model_dir, config, dtype="bfloat16", device="cuda", quantization=None, progress=False)
    assert model.embed_tokens.is_cuda
    assert model.embed_tokens.dtype == torch.bfloat16
