from __future__ import annotations

from pathlib import Path

import pytest

from tfserve.bench.roofline import Work, floor_s, step_operations
from tfserve.model.loading.config import load_model_config


@pytest.fixture
def config(tiny_llama3: Path):
    return load_model_config(tiny_llama3)


def test_a_decode_reads_every_weight_of_the_linears_once(config):
    work = Work(tokens=1, sampled=1, pairs=0, kv_tokens=0)
    ops = step_operations(config, work, weight_bytes=1, itemsize=0)
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = hidden * (config.q_size + 2 * config.kv_size) + config.q_size * hidden + 3 * inner * hidden
    weights = config.num_hidden_layers * layer + config.vocab_size * hidden
    assert sum(nbytes for nbytes, _ in ops) == weights
    assert sum(flops for _, flops in ops) == 2 * weights


def test_attention_reads_keys_and_values_and_multiplies_twice_with_them(config):
    without = step_operations(config, Work(tokens=4, sampled=4, pairs=0, kv_tokens=0), weight_bytes=4, itemsize=4)
    work = Work(tokens=4, sampled=4, pairs=400, kv_tokens=400)
    ops = step_operations(config, work, weight_bytes=4, itemsize=4)
    more = [sum(op[kind] for op in ops) - sum(op[kind] for op in without) for kind in (0, 1)]
    assert more == [
        config.num_hidden_layers * 400 * 2 * config.kv_size * 4,
        config.num_hidden_layers * 4 * 400 * config.q_size,
    ]


def test_each_operation_is_bound_by_the_slower_of_the_two():
    assert floor_s([(100.0, 10.0), (10.0, 100.0)], bytes_per_s=10.0, flops_per_s=10.0) == 20.0
    assert floor_s([(100.0, 10.0)], bytes_per_s=100.0, flops_per_s=1.0) == 10.0
