"""Honest readers beside a client that asks for more than its share, over HTTP with the demo model.

    python -m benchmarks.attack.fairness --root . --attacks fast,slow --policies tokenflow,fcfs

A cell is one attack under one policy: a fresh server of the checkout `--root`, the attack at once, and then `--readers`
honest requests, one every `--every-s`: 60 words of prompt, 100 tokens read at 6 tokens/s. The same without an attack
("alone") comes first. Each row shows how many honest requests were answered in whole, their time to first token, their
stalls, and both over those of the same policy alone. An attack is a row of ATTACKS. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from benchmarks.local_server import free_port, running
from tfserve.bench.client import RequestRecord, StreamClient, Target, open_session
from tfserve.bench.scoring import served
from tfserve.bench.workload import Work
from tfserve.engine.scheduling.qos import buffer_sizes

HONEST_RATE, HONEST_TOKENS, PROMPT_WORDS = 6.0, 100, 60
ALONE = "alone"
PATIENCE_S = 120.0
"""Longest wait of an honest reader for its whole answer."""

REPORT_EVERY = 8
"""Interval in tokens at which a reporting attacker claims to have played everything."""


class Attack(NamedTuple):
    """`streams` requests at once, with `body` over an ordinary one; `reports`: each claims to have played everything.

    `settings` are the server's; `key` and `honest_key` authenticate the two sides.
    """

    streams: int
    body: Mapping[str, Any]
    reports: bool = False
    settings: Mapping[str, str] = {}
    key: str | None = None
    honest_key: str | None = None


SMALL_KV = {"num_gpu_blocks_override": "101", "block_size": "32"}
"""Device memory for a dozen of the attackers: 3,200 tokens."""

SHED = {"scheduler.overload": "shed"}

KEYS = {"server.api_keys": "hostile,honest"}
"""Keys of two tenants: one floods, the honest readers are the other."""

LONG = {"prompt": [5000 + number % 1000 for number in range(7700)], "consumption_rate": None}
"""The longest prompt that leaves room for an answer in the demo model's context."""

ATTACKS: dict[str, Attack] = {
    ALONE: Attack(0, {}),
    "named 6": Attack(20, {"consumption_rate": 6.0}),
    "fast": Attack(20, {"consumption_rate": 1e6}),
    "slow": Attack(100, {"consumption_rate": 0.01}),
    "played": Attack(20, {"consumption_rate": "auto"}, reports=True),
    "alone, small": Attack(0, {}, settings=SMALL_KV),
    "named 6, small": Attack(20, {"consumption_rate": 6.0}, settings=SMALL_KV),
    "fast, small": Attack(20, {"consumption_rate": 1e6}, settings=SMALL_KV),
    "slow, small": Attack(100, {"consumption_rate": 0.01}, settings=SMALL_KV),
    "alone, shed": Attack(0, {}, settings=SHED),
    "one fast, shed": Attack(1, {"consumption_rate": 1e6}, settings=SHED),
    "fast, shed": Attack(20, {"consumption_rate": 1e6}, settings=SHED),
    "many": Attack(1000, {}),
    "alone, keys": Attack(0, {}, settings=KEYS, honest_key="honest"),
    "fast, keys": Attack(20, {"consumption_rate": 1e6}, settings=KEYS, key="hostile", honest_key="honest"),
    "slow, keys": Attack(100, {"consumption_rate": 0.01}, settings=KEYS, key="hostile", honest_key="honest"),
    "many, keys": Attack(1000, {}, settings=KEYS, key="hostile", honest_key="honest"),
    "prompts, keys": Attack(1, {**LONG, "n": 128}, settings=KEYS, key="hostile", honest_key="honest"),
}


class Outcome(NamedTuple):
    """Results of the honest readers; times in seconds, of readers with a first token."""

    answered: int
    errors: Mapping[str, int]
    ttft_p50_s: float
    ttft_p99_s: float
    stall_s: float
    seconds: float


def prompt(number: int) -> str:
    """Sixty words; no two prompts are alike."""
    return " ".join(f"word{(number * 7919 + k * 104729) % 997}" for k in range(PROMPT_WORDS))


async def attacker(session: aiohttp.ClientSession, url: str, number: int, attack: Attack, tokens: int) -> None:
    """One hostile stream, read to its end; its result is ignored."""
    body = {
        "model": "demo",
        "prompt": prompt(1000 + number),
        "stream": True,
        "max_tokens": tokens,
        "ignore_eos": True,
        **attack.body,
    }
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with session.post(f"{url}/v1/completions", json=body) as response:
            name, seen = "", 0
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                name = name or json.loads(line[6:]).get("id", "")
                seen += 1
                if attack.reports and seen % REPORT_EVERY == 0:
                    report = {"played_tokens": seen}
                    async with session.post(f"{url}/v1/streams/{name}/buffer", json=report):
                        pass


async def honest(client: StreamClient, record: RequestRecord, number: int) -> None:
    """One honest reader, from its arrival on."""
    await asyncio.sleep(max(record.arrival_s - client.now(), 0.0))
    await client.send(record, Work(prompt=prompt(number), max_tokens=HONEST_TOKENS, rate=HONEST_RATE))


async def measure(url: str, attack: Attack, args: argparse.Namespace) -> Outcome:
    """Run the honest readers during one attack."""
    target = Target(base_url=url, model="demo", endpoint="completions", ignore_eos=True)
    async with open_session(attack.key, 600) as theirs, open_session(attack.honest_key, PATIENCE_S) as ours:
        warm = StreamClient(ours, target)
        await asyncio.gather(*(honest(warm, RequestRecord(index=0, arrival_s=0.0), 500 + k) for k in range(2)))
        hostile = [
            asyncio.create_task(attacker(theirs, url, k, attack, args.attack_tokens)) for k in range(attack.streams)
        ]
        client = StreamClient(ours, target)
        records = [
            RequestRecord(index=k, arrival_s=args.lead_s + k * args.every_s, rate=HONEST_RATE)
            for k in range(args.readers)
        ]
        await asyncio.gather(*(honest(client, record, record.index) for record in records))
        for task in hostile:
            task.cancel()
        await asyncio.gather(*hostile, return_exceptions=True)
        seconds = client.now()
    first = [record.ttft_s for record in records if record.ttft_s is not None]
    p50, p99 = np.percentile(first, (50, 99)) if first else (float("nan"), float("nan"))
    return Outcome(
        sum(record.error is None for record in records),
        collections.Counter(record.error for record in records if record.error),
        float(p50),
        float(p99),
        sum(buffer_sizes(served(record))[1] for record in records),
        seconds,
    )


def cell(name: str, policy: str, args: argparse.Namespace) -> Outcome:
    """One attack under one policy, with a server of its own."""
    attack, port = ATTACKS[name], free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {
        "served_model_name": "demo",
        "threads": str(args.threads),
        "server.port": str(port),
        "scheduler.policy": policy,
        **attack.settings,
    }
    if policy != "tokenflow":
        settings.pop("scheduler.overload", None)
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    env = {**os.environ, "PYTHONPATH": str(args.root.resolve()), "PYTHONSAFEPATH": "1"}
    with running([sys.executable, "-m", "tfserve.cli", "serve", args.model, *words], url, "/ready", env=env):
        return asyncio.run(measure(url, attack, args))


def row(name: str, policy: str, outcome: Outcome, alone: Outcome | None, readers: int) -> str:
    times = f"{outcome.ttft_p99_s / alone.ttft_p99_s:5.1f}x" if alone else "     -"
    ttft = f"{outcome.ttft_p50_s:8.2f} {outcome.ttft_p99_s:8.2f} {times}"
    errors = ", ".join(f"{count} {kind}" for kind, count in outcome.errors.items())
    return (
        f"{name:16} {policy:10} {outcome.answered:3d} of {readers:<3d} {ttft}"
        f" {outcome.stall_s:8.2f} {outcome.seconds:7.0f}  {errors}"
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, default=Path(), help="the checkout whose server is measured (default: this directory)")
    add("--model", default="demo")
    add("--attacks", type=lambda text: text.split(";"), default=list(ATTACKS), help="names of ATTACKS, by semicolons")
    add("--policies", type=lambda text: text.split(","), default=["tokenflow", "fcfs"])
    add("--readers", type=int, default=8)
    add("--every-s", type=float, default=4.0, help="between two honest readers (default: %(default)s)")
    add("--lead-s", type=float, default=1.0, help="from the attack to the first of them (default: %(default)s)")
    add("--attack-tokens", type=int, default=400, help="max_tokens of an attacker (default: %(default)s)")
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    unknown = [name for name in args.attacks if name not in ATTACKS]
    if unknown:
        parser.error(f"no such attack: {unknown[0]}; there are {', '.join(ATTACKS)}")
    return args


def main() -> None:
    args = parse_args()
    heads = {"attack": "<16", "policy": "<10", "answered": ">10", "TTFT p50": ">8", "p99": ">8"}
    heads |= {"/alone": ">6", "stall s": ">8", "took s": ">7"}
    print(" ".join(format(head, width) for head, width in heads.items()))
    for policy in args.policies:
        # Each attack is compared with the same server settings without it.
        alone: dict[tuple[tuple[str, str], ...], Outcome] = {}
        for name in args.attacks:
            outcome = cell(name, policy, args)
            settings = tuple(sorted(ATTACKS[name].settings.items()))
            print(row(name, policy, outcome, alone.get(settings), args.readers), flush=True)
            if not ATTACKS[name].streams:
                alone[settings] = outcome


if __name__ == "__main__":
    main()
