"""QoS by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tfserve.engine.scheduling.qos import (
    Served,
    bounds,
    buffer_sizes,
    effective_tokens,
    fluid_effective_throughput,
    on_time_tokens,
    prefill_bound_s,
    qos,
    score,
    token_weights,
)


def served(times, rate=10.0, arrival=0.0) -> Served:
    return Served(arrival, rate, np.array(times, np.float64))


def test_tokens_at_the_reading_rate_never_queue_up():
    unread, stall = buffer_sizes(served(np.arange(20) / 10))
    assert unread == pytest.approx(np.ones(20))
    assert stall == pytest.approx(0)


def test_tokens_at_twice_the_rate_queue_up_one_in_two():
    unread, stall = buffer_sizes(served(np.arange(5) / 20))
    assert unread == pytest.approx([1, 1.5, 2, 2.5, 3])
    assert stall == 0


def test_tokens_all_at_once_are_all_unread():
    unread, _ = buffer_sizes(served([3.0, 3.0, 3.0]))
    assert unread == pytest.approx([1, 2, 3])


def test_a_late_token_stalls_the_reader_and_the_backlog_starts_anew():
    # Read until 0.1, next token at 0.5: 0.4 s of stall, and nothing unread but that token.
    unread, stall = buffer_sizes(served([0.0, 0.5, 0.55]))
    assert stall == pytest.approx(0.4)
    assert unread == pytest.approx([1, 1, 1.5])


def test_weights_fall_from_one_to_nothing_between_the_thresholds():
    weights = token_weights(served([0.0] * 6), tau_full=2, tau_zero=4)
    assert weights == pytest.approx([1, 1, 0.5, 0, 0, 0])


def test_effective_tokens_use_ten_and_twenty_percent_of_the_output():
    # 20 tokens at once: buffers 1..20, full weight to 2, none from 4 on.
    assert effective_tokens(served([0.0] * 20)) == pytest.approx(2.5)
    assert effective_tokens(served(np.arange(20) / 10)) == pytest.approx(20)
    assert effective_tokens(served([0.0] * 20, rate=math.nan)) == 20


def test_on_time_is_measured_from_arrival_and_patience():
    # Deadlines 1.3, 1.4, 1.5 after an arrival at 2.
    assert on_time_tokens(served([3.3, 3.35, 3.6], arrival=2.0)) == 2


def test_the_papers_qos_with_penalties():
    run = [served([1.0, 1.0, 1.5], arrival=0.0)]
    # Buffers 1, 2 and 1; read until 1.2, so 0.3 s of stall; first token after 1 s; 1.5 s in all.
    expected = (1 + 0.5 + 1 - 2 * 1.0 - 3 * 0.3) / 1.5
    assert qos(run, tau=1, alpha=0.5, ttft_penalty=2, stall_penalty=3) == pytest.approx(expected)


def test_a_report_by_hand():
    run = [served([1.0, 1.1, 1.6], arrival=0.0), served([2.0, 2.1], arrival=1.0), served([], arrival=1.0)]
    report = score(run)
    assert (report.num_requests, report.num_tokens) == (3, 5)
    assert report.duration_s == pytest.approx(2.1)
    assert report.raw_throughput == pytest.approx(5 / 2.1)
    assert report.ttft_mean_s == pytest.approx(1.0)
    assert report.stall_s == pytest.approx(0.4)
    assert report.stall_share == pytest.approx(0.4 / (0.4 + 0.5))
    assert report.tbt_p99_s == pytest.approx(np.percentile([0.1, 0.5, 0.1], 99))


def test_a_starving_server_looks_effective_but_not_on_time():
    slow = [served(np.arange(20) * 1.0)]
    report = score(slow)
    assert report.effective_throughput == pytest.approx(report.raw_throughput)
    assert report.on_time_goodput < 0.15 * report.raw_throughput
    assert report.stall_share > 0.8


def test_prefill_bound_of_a_burst_and_of_a_trickle():
    assert prefill_bound_s([0.0] * 101, [100] * 101, 1000.0) == pytest.approx(10.0)
    assert prefill_bound_s([0.0, 5.0, 50.0], [100, 100, 100], 1000.0) == pytest.approx(0.1)


def test_fluid_model_counts_everything_while_rates_exceed_capacity():
    run = [served(np.zeros(100), rate=10.0) for _ in range(4)]
    assert fluid_effective_throughput(run, capacity=20.0) == pytest.approx(20.0, rel=0.01)


def test_fluid_model_loses_what_overflows_the_buffers():
    # 4 readers of 10 tokens/s at 100: the buffer grows by 15/s and reaches 20 % of 100 after 1.33 s.
    run = [served(np.zeros(100), rate=10.0) for _ in range(4)]
    value = fluid_effective_throughput(run, capacity=100.0)
    # Each is full until b = 10 (16.7 tokens), falls to 0 at b = 20 (16.7 tokens at half weight): 25 of 100.
    assert value == pytest.approx(25.0, rel=0.05)


def test_bounds_stand_beside_a_result():
    run = [served(np.arange(10) / 10) for _ in range(2)]
    fcfs = score([served(np.zeros(10) + 1e-3)])
    b = bounds(
        run, fcfs, raw_throughput=100.0, prompt_tokens=[50, 50], prefill_tokens_per_s=100.0, capacity=20.0
    )  # fmt: skip
    assert b.effective_ratio == pytest.approx(100.0 / fcfs.effective_throughput)
    assert b.ttft_p99_s == pytest.approx(0.995)
    assert b.fluid_effective_throughput == pytest.approx(20.0, rel=0.02)
