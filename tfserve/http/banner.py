"""What the server prints when it is ready."""

from __future__ import annotations

import json
import shlex
import textwrap

import tfserve
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies import POLICIES
from tfserve.http.service import Service
from tfserve.types import EngineInfo

_WIDTH = 100


def banner(info: EngineInfo, service: Service, url: str) -> str:
    """Model, device, both KV tiers, the policy and what it goes by, the page's address, and a curl line to try."""
    weights = f"{info.dtype} weights in {info.quantization}" if info.quantization else info.dtype
    place = f"{info.device} ({info.threads} threads)" if info.device == "cpu" else info.device
    kv_gib = info.num_blocks * info.block_size * info.kv_bytes_per_token / 2**30
    lines = (
        f"tfserve {tfserve.__version__} serves {service.model_name} ({info.architecture},"
        f" {info.num_parameters / 1e6:,.0f} M parameters), loaded in {info.load_s:.1f} s",
        f"  Device: {place}, {weights}, {info.attention_backend} attention",
        f"  KV cache: {info.num_blocks} blocks of {info.block_size} tokens ({kv_gib:.2f} GiB) hold {info.kv_tokens:,}"
        f" tokens, {info.concurrency:.1f} requests of {info.max_model_len:,}; up to {info.max_num_seqs} run at once",
        f"  {_host_tier(info)}",
        f"  {_policy(info, service.config.scheduler)}",
        f"  Page: {url}/ (chat at your own reading speed, and every stream)",
        f"Listening on {url}; try:",
    )
    return "\n".join([*(part for line in lines for part in _wrapped(line)), _curl(service, url)])


def _wrapped(line: str) -> list[str]:
    text = line.lstrip()
    return textwrap.wrap(text, _WIDTH, initial_indent=line.removesuffix(text), subsequent_indent=" " * 4)


def _host_tier(info: EngineInfo) -> str:
    if not info.num_host_blocks:
        return "Host tier: none, a preempted request is computed again"
    tokens = (info.num_host_blocks - 1) * info.block_size
    gib = info.num_host_blocks * info.block_size * info.kv_bytes_per_token / 2**30
    return f"Host tier: {gib:.2f} GiB keep {tokens:,} tokens of paused requests ({info.host_tier_reason})"


def _policy(info: EngineInfo, config: SchedulerConfig) -> str:
    ignored = POLICIES[info.policy].ignores
    if ignored:
        return f"Policy {info.policy}: ignores {', '.join(ignored)}"
    return (
        f"Policy {info.policy}, overload: {config.overload}; a streamed answer that names no consumption_rate counts as"
        f" read at {config.default_rate:g} tokens/s"
    )


def _curl(service: Service, url: str) -> str:
    """A request to paste into a shell; the key, if one is needed, is not printed."""
    # Spread over some lines that a shell takes for one command.
    question = '"messages": [{"role": "user", "content": "Why is the sky blue?"}]'
    body = f'{{"model": {json.dumps(service.model_name)}, "stream": true,\n  {question}}}'
    headers = "-H 'Content-Type: application/json'"
    if service.keys:
        headers += ' -H "Authorization: Bearer $API_KEY"'
    return f"curl -N {url}/v1/chat/completions \\\n  {headers} \\\n  -d {shlex.quote(body)}"
