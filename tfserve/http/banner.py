"""What the server prints when it is ready."""

from __future__ import annotations

import json
import shlex

import tfserve
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies import IGNORES
from tfserve.http.service import Service
from tfserve.types import EngineInfo


def banner(info: EngineInfo, service: Service, url: str) -> str:
    """Model, dtype, device, both KV tiers, the policy and what it ignores, the address, and one curl line to try."""
    weights = f"{info.dtype} weights in {info.quantization}" if info.quantization else info.dtype
    place = f"{info.device} ({info.threads} threads)" if info.device == "cpu" else info.device
    kv_gib = info.num_blocks * info.block_size * info.kv_bytes_per_token / 2**30
    blocks = f"{info.num_blocks} blocks of {info.block_size} tokens ({kv_gib:.2f} GiB)"
    model = f"{service.model_name} ({info.architecture}, {info.num_parameters / 1e6:,.0f} M parameters)"
    return "\n".join(
        (
            f"tfserve {tfserve.__version__} serves {model}, loaded in {info.load_s:.1f} s",
            f"  {weights} on {place}, {info.attention_backend} attention",
            f"  KV cache: {blocks} hold {info.kv_tokens:,} tokens, {info.concurrency:.1f} requests of "
            f"{info.max_model_len:,}; up to {info.max_num_seqs} run at once",
            f"  {_host_tier(info)}",
            f"  {_policy(info, service.config.scheduler)}",
            f"Listening on {url}; try:",
            _curl(service, url),
        )
    )


def _host_tier(info: EngineInfo) -> str:
    if not info.num_host_blocks:
        return "Host tier: none, a preempted request is computed again"
    tokens = (info.num_host_blocks - 1) * info.block_size
    gib = info.num_host_blocks * info.block_size * info.kv_bytes_per_token / 2**30
    return f"Host tier: {gib:.2f} GiB keep {tokens:,} tokens of paused requests ({info.host_tier_reason})"


def _policy(info: EngineInfo, config: SchedulerConfig) -> str:
    ignored = IGNORES.get(info.policy, ())
    if ignored:
        return f"Policy {info.policy}: ignores {', '.join(ignored)}"
    return (
        f"Policy {info.policy}: a streamed answer that names no consumption_rate counts as read at"
        f" {config.default_rate:g} tokens/s; overload: {config.overload}"
    )


def _curl(service: Service, url: str) -> str:
    """A request to paste into a shell; the key, if one is needed, is not printed."""
    body = {
        "model": service.model_name,
        "stream": True,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    }
    key = ' -H "Authorization: Bearer $API_KEY"' if service.keys else ""
    data = shlex.quote(json.dumps(body))
    return f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {data}"
