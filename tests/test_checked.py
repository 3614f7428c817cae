"""Settings and sampling parameters made in Python are checked as those of a file or a request are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.scheduler_settings import scheduler_config
from tfserve.config import EngineConfig, SchedulerConfig, ServerConfig
from tfserve.errors import ConfigError, RequestError
from tfserve.scheduler_sections import FcfsConfig, TokenFlowConfig
from tfserve.types import SamplingParams


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"quantization": "awq"}, "quantization"),
        ({"device": "tpu"}, "device"),
        ({"dtype": torch.float32}, "dtype"),
        ({"engine_process": True}, "engine_process"),
        ({"pipeline_depth": 3}, "pipeline_depth"),
        ({"max_num_seqs": "8"}, "max_num_seqs"),
        ({"max_num_seqs": 8.5}, "max_num_seqs"),
        ({"max_num_seqs": True}, "max_num_seqs"),
        ({"threads": np.float64(1.5)}, "threads"),
        ({"enforce_eager": "no"}, "enforce_eager"),
        ({"seed": 2**64}, "seed"),
        ({"seed": b"7"}, "seed"),
        ({"max_model_len": print}, "max_model_len"),
        ({"model": None}, "model"),
        ({"model": b"m"}, "model"),
        ({"scheduler": "fcfs"}, "scheduler"),
        ({"scheduler": None}, "scheduler"),
        ({"scheduler": ServerConfig()}, "scheduler"),
        ({"scheduler": {"policy": "lifo"}}, "scheduler.policy"),
        ({"scheduler": {"tokenflow": 3}}, "scheduler.tokenflow"),
        ({"scheduler": {"tokenflow": FcfsConfig()}}, "scheduler.tokenflow.reserve_ratio"),
        ({"scheduler": {"polcy": "fcfs"}}, "scheduler.polcy"),
        ({"scheduler": {"tokenflow": {"underflow_weight": -1}}}, "scheduler.tokenflow.underflow_weight"),
        ({"server": {"port": "9000"}}, "server.port"),
        ({"server": {"api_keys": "secret"}}, "server.api_keys"),
        ({"server": {"api_keys": ["a", 5]}}, "server.api_keys[1]"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_its_name(given, key):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{"model": "m"} | given)
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}: ")
    assert "secret" not in str(caught.value)


def test_a_section_is_checked_where_it_is_made():
    with pytest.raises(ConfigError, match=r"^scheduler\.policy: must be 'fcfs', "):
        SchedulerConfig(policy="lifo")
    with pytest.raises(ConfigError, match=r"^scheduler\.tokenflow\.low_buffer_s: must be a number >= 0"):
        TokenFlowConfig(low_buffer_s=-1)
    with pytest.raises(ConfigError, match=r"^scheduler\.tokenflow\.low_buffer_s: must be a number >= 0"):
        SchedulerConfig(tokenflow={"low_buffer_s": -1})
    with pytest.raises(ConfigError, match=r"^scheduler\.fcfs\.reserve_ratio: must be at least reserve_min_ratio"):
        FcfsConfig(reserve_ratio=0.05)
    with pytest.raises(ConfigError, match=r"^server\.api_keys: must be a list"):
        ServerConfig(api_keys="key")


def test_what_can_only_mean_one_thing_is_taken():
    config = EngineConfig(
        model=Path("a/b"),
        max_num_seqs=np.int64(5),
        kv_cache_gib=1,
        host_kv_gib=np.float32(0.5),
        debug_checks=np.bool_(True),
        scheduler={"policy": "fcfs", "tokenflow": {"underflow_weight": np.float64(2)}},
        server={"api_keys": ["a", "b"]},
    )
    assert (config.model, config.max_num_seqs, config.kv_cache_gib, config.host_kv_gib) == ("a/b", 5, 1.0, 0.5)
    assert config.debug_checks is True
    assert config.scheduler == scheduler_config(policy="fcfs", underflow_weight=2.0)
    assert config.server.api_keys == ("a", "b")
    assert {type(config.max_num_seqs), type(config.host_kv_gib)} == {int, float}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"max_tokens": 4.5}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stop": "word"}, "stop"),
        ({"stop": ("a", 3)}, "stop[1]"),
        ({"stop": (b"a",)}, "stop[0]"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids[0]"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"seed": object()}, "seed"),
    ],
    ids=repr,
)
def test_a_sampling_parameter_of_the_wrong_kind_is_refused_by_its_name(given, param):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**given)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("max_tokens", np.int32(4), 4),
        ("temperature", np.float64(0.5), 0.5),
        ("temperature", 1, 1.0),
        ("temperature", torch.tensor(0.5), 0.5),
        ("stop", ["a"], ("a",)),
        ("stop_token_ids", [np.int64(1), 2], (1, 2)),
        ("stop_token_ids", np.array([1, 2]), (1, 2)),
        ("stop_token_ids", torch.tensor([1, 2]), (1, 2)),
        ("logit_bias", {np.int64(1): np.float32(2)}, {1: 2.0}),
        ("logit_bias", {"1": 2}, {1: 2.0}),
    ],
)
def test_numbers_of_other_libraries_become_pythons_own(name, given, value):
    assert getattr(SamplingParams(**{name: given}), name) == value
