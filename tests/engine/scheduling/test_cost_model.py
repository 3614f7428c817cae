"""The cost model learns from synthetic steps and copies."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tfserve.engine.scheduling.cost_model import CostModel, StepCoefficients, StepSample
from tfserve.plan import Ack, CopyId, Direction

TRUE = StepCoefficients(step=8e-3, decode=1e-4, decode_ctx=3e-7, prefill=1.2e-4, prefill_ctx=2e-9)


def seconds(c: StepCoefficients, n_decode, decode_ctx, n_prefill, prefill_ctx) -> float:
    return (
        c.step
        + c.decode * n_decode
        + c.decode_ctx * decode_ctx
        + c.prefill * n_prefill
        + c.prefill_ctx * prefill_ctx
        + c.prompts * (n_prefill > 0)
    )


def steps(true: StepCoefficients, n: int, seed: int = 0, noise: float = 0.02) -> list[StepSample]:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(n):
        n_decode = int(rng.integers(0, 64))
        ctx = float(n_decode * rng.integers(100, 3000))
        n_prefill = int(rng.choice([0, 0, 256, 2048]))
        pairs = float(n_prefill * rng.integers(128, 2000))
        s = seconds(true, n_decode, ctx, n_prefill, pairs) * (1 + noise * rng.normal())
        samples.append(StepSample(n_decode, ctx, n_prefill, pairs, max(s, 1e-4)))
    return samples


def model(**kw) -> CostModel:
    return CostModel(**({"kv_bytes_per_token": 1000, "max_num_seqs": 64} | kw))


CASES = [(1, 500, 0, 0), (32, 32_000, 0, 0), (64, 128_000, 0, 0), (0, 0, 2048, 2048 * 1024), (16, 16_000, 512, 131_072)]


@pytest.mark.parametrize("case", CASES)
def test_it_predicts_within_five_percent_after_200_noisy_steps(case):
    cost = model()
    for sample in steps(TRUE, 200):
        cost.observe_step(sample)
    assert cost.step_s(*case) == pytest.approx(seconds(TRUE, *case), rel=0.05)


def test_it_follows_a_machine_that_becomes_twice_as_slow():
    cost = model()
    slow = StepCoefficients(*(2 * x for x in (TRUE.step, TRUE.decode, TRUE.decode_ctx, TRUE.prefill, TRUE.prefill_ctx)))
    for sample in [*steps(TRUE, 300), *steps(slow, 256, seed=1)]:
        cost.observe_step(sample)
    for case in CASES:
        assert cost.step_s(*case) == pytest.approx(seconds(slow, *case), rel=0.05)


def test_a_few_wild_steps_do_not_move_it():
    cost = model()
    for i, sample in enumerate(steps(TRUE, 200)):
        wild = StepSample(sample.n_decode, sample.decode_ctx, sample.n_prefill, sample.prefill_ctx, 1.0)
        cost.observe_step(wild if i % 25 == 7 else sample)
    assert cost.step_s(32, 32_000) == pytest.approx(seconds(TRUE, 32, 32_000, 0, 0), rel=0.15)


def test_few_samples_leave_the_prior_where_they_say_nothing():
    cost = model(prior=TRUE)
    for _ in range(3):
        cost.observe_step(StepSample(1, 100, 0, 0, 2 * seconds(TRUE, 1, 100, 0, 0)))
    assert cost.step_s(1, 100) == pytest.approx(2 * seconds(TRUE, 1, 100, 0, 0), rel=0.05)
    assert cost.prefill_s_per_token == pytest.approx(TRUE.prefill, rel=0.01)


def test_calibration_becomes_what_it_starts_from():
    cost = model()
    cost.calibrate(steps(TRUE, 40, noise=0.0))
    for case in CASES:
        assert cost.step_s(*case) == pytest.approx(seconds(TRUE, *case), rel=0.02)


def test_a_handful_of_noisy_steps_does_not_overrule_calibration():
    dear = msgspec.structs.replace(TRUE, prompts=0.02)
    cost = model()
    cost.calibrate(steps(dear, 40, noise=0.0))
    # A burst begins: every step is full of prompts, so the costs of prompts and of decodes cannot be separated.
    for n_decode, noise in zip((0, 6, 10, 14, 17), (1.1, 0.92, 1.08, 0.95, 1.05), strict=True):
        work = (n_decode, 200.0 * n_decode, 512 - n_decode, 40_000.0)
        cost.observe_step(StepSample(*work, seconds(dear, *work) * noise))
    assert cost.step_s(32, 6400) == pytest.approx(seconds(dear, 32, 6400, 0, 0), rel=0.25)
    assert cost.prompts_s == pytest.approx(0.02, rel=0.3)


def test_minutes_of_decoding_do_not_make_it_forget_what_prompts_cost():
    cost = model(prior=StepCoefficients(prefill=1e-9, prefill_ctx=1e-12))
    for n_decode, ctx, n_prefill, pairs in [(0, 0, 512, 131_072), (0, 0, 2048, 2048 * 1024)] * 5:
        cost.observe_step(StepSample(n_decode, ctx, n_prefill, pairs, seconds(TRUE, n_decode, ctx, n_prefill, pairs)))
    for i in range(2000):
        n = 1 + i % 40
        cost.observe_step(StepSample(n, 500.0 * n, 0, 0, seconds(TRUE, n, 500.0 * n, 0, 0)))
    assert cost.step_s(0, 0, 1024, 1024 * 512) == pytest.approx(seconds(TRUE, 0, 0, 1024, 1024 * 512), rel=0.1)


def test_no_coefficient_turns_negative():
    cost = model()
    rng = np.random.default_rng(3)
    for _ in range(100):
        n = int(rng.integers(1, 30))
        cost.observe_step(StepSample(n, 100.0 * n, 0, 0, 0.02 - 0.0002 * n))
    assert min(cost.step_s(*case) for case in [(0, 0), (64, 0), (0, 1e6), (0, 0, 1000), (0, 0, 0, 1e7)]) >= 0


def ack(nbytes: int, duration: float, ok: bool = True) -> Ack:
    return Ack(CopyId(0), ok, nbytes, 10.0, 10.0 + duration)


def test_bandwidths_are_measured_per_direction_and_slide():
    cost = model(store_bps=1e9, load_bps=1e9)
    for _ in range(10):
        cost.observe_copy(Direction.LOAD, ack(4_000_000, 1e-3))
    assert cost.bandwidth(Direction.LOAD) == pytest.approx(4e9)
    assert cost.bandwidth(Direction.STORE) == 1e9
    for _ in range(64):
        cost.observe_copy(Direction.LOAD, ack(1_000_000, 1e-3))
    assert cost.bandwidth(Direction.LOAD) == pytest.approx(1e9)


def test_a_failed_copy_leaves_the_queue_but_teaches_nothing():
    cost = model(store_bps=1e9)
    cost.observe_submit(Direction.STORE, 3_000_000)
    assert cost.queue_s(Direction.STORE) == pytest.approx(3e-3)
    cost.observe_copy(Direction.STORE, ack(1_000_000, 5.0, ok=False))
    cost.observe_cancel(Direction.STORE, 1_000_000)
    assert cost.queue_s(Direction.STORE) == pytest.approx(1e-3)
    assert cost.bandwidth(Direction.STORE) == 1e9


def test_switching_by_transfer_counts_queues_and_both_ways():
    cost = model(prior=TRUE, store_bps=1e6, load_bps=2e6)
    cost.observe_submit(Direction.LOAD, 2_000_000)
    transfer, recompute = cost.switch_s([0, 100], [1000, 1000], [1000, 1000])
    assert transfer == pytest.approx([1.0 + 0.5, 0.1 + 1.0 + 0.5])
    assert recompute == pytest.approx([1000 * (TRUE.prefill + TRUE.prefill_ctx * 500)] * 2)


def test_gamma_is_the_best_batch_that_fits_and_prompts_take_their_share():
    cost = model(prior=TRUE, max_num_seqs=64)
    capacity = cost.capacity_tokens_per_s(1000, 32_000)
    assert capacity == pytest.approx(32 / seconds(TRUE, 32, 32_000, 0, 0))
    assert cost.capacity_tokens_per_s(1000, 1e9) == pytest.approx(64 / seconds(TRUE, 64, 64_000, 0, 0))
    assert cost.capacity_tokens_per_s(1000, 32_000, 0.5) == pytest.approx(1 / (1 / capacity + 0.5 * TRUE.prefill))
