"""A tiny random model on the GPU: graphs, transfers and sampling give the tokens of an undisturbed eager run."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.scheduler_settings import scheduler_config
from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.engine import Engine
from tfserve.model.attention.paged_kernels import FlashKernels
from tfserve.model.loading.config import load_model_config
from tfserve.model.loading.loader import load_model
from tfserve.types import SamplingParams

NUM_REQUESTS, NUM_TOKENS = 10, 300
PROMPTS = [[3 + (i * 7 + k) % 500 for k in range(40 + 60 * i)] for i in range(NUM_REQUESTS)]
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
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    drawn = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=NUM_TOKENS, ignore_eos=True) for i in range(NUM_REQUESTS)
    ]
    params = [drawn[i] if i % 2 else greedy for i in range(NUM_REQUESTS)]
    with Engine(config) as engine:
        outputs = engine.generate(PROMPTS, params, rate=500.0)
        return [output.token_ids for output in outputs], engine.stats(), engine.info


@pytest.fixture(scope="module")
def judge(model_dir):
    """The same model in float32 on the CPU."""
    config = EngineConfig(model=str(model_dir), device="cpu", engine_process="off", max_model_len=1024)
    with Engine(config) as engine:
        yield engine


def share_not_nearest(judge, answers) -> float:
    """Share of the greedy requests' tokens that the judge, given all before them, finds clearly less likely.

    In bf16 a near-tie may fall either way, and from there on two texts have nothing in common; but each token is likely
    in its own context. On a CPU all bf16 tokens are within 0.02 of the best, and half of another request's are not.
    """
    prompts, tokens = PROMPTS[::2], answers[::2]
    texts = [prompt + answer for prompt, answer in zip(prompts, tokens, strict=True)]
    scored = judge.generate(texts, SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1))
    gaps = [
        entry.top[0][1] - entry.logprob
        for prompt, output in zip(prompts, scored, strict=True)
        for entry in output.prompt_logprobs[len(prompt) - 1 :]
    ]
    assert len(gaps) == len(prompts) * NUM_TOKENS
    return sum(gap > 0.15 for gap in gaps) / len(gaps)


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
def test_flash_attn_is_chosen_with_and_without_graphs(model_dir, judge):
    graphs, _, info = run(model_dir, num_blocks=60, scheduler=SchedulerConfig())
    eager, _, _ = run(model_dir, num_blocks=60, scheduler=SchedulerConfig(), enforce_eager=True)
    assert info.attention_backend == "flash_attn"
    assert info.block_size == 256
    assert share_not_nearest(judge, graphs) < 0.02
    assert share_not_nearest(judge, eager) < 0.02
    assert share_not_nearest(judge, graphs[2:] + graphs[:2]) > 0.3, "the judge would accept anything"


@needs_flash
def test_two_deep_loses_no_token(model_dir, judge):
    tokens, _, _ = run(model_dir, num_blocks=60, scheduler=SchedulerConfig(), pipeline_depth=2)
    assert share_not_nearest(judge, tokens) < 0.02


@needs_flash
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["round-robin", "tokenflow"])
def test_preempted_requests_go_on_as_if_undisturbed(model_dir, judge, policy, depth):
    scheduler = scheduler_config(policy=policy, **SHARED)
    tokens, stats, _ = run(model_dir, num_blocks=21, scheduler=scheduler, pipeline_depth=depth)
    assert stats.num_preemptions > 0
    if policy == "round-robin":
        assert stats.bytes_loaded > 0
    assert share_not_nearest(judge, tokens) < 0.02


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
