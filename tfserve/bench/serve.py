"""`tfserve bench serve`: load a running OpenAI-compatible server and report what its clients would have seen."""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from tfserve.bench.client import RequestRecord, StreamClient, Target, first_model, open_session
from tfserve.bench.plots import require_matplotlib, timelines, ttft_cdf
from tfserve.bench.report import require_writable, summarize, table, write_result
from tfserve.bench.scoring import score_rate
from tfserve.bench.workload import (
    BUNDLED_PROMPTS,
    Lengths,
    PromptRow,
    PromptSize,
    Rate,
    Work,
    arrival_times,
    mixed_rates,
    random_prompt,
    read_prompts,
)
from tfserve.errors import TfserveError

DEFAULT_INPUT_LEN = 64
_CALIBRATION_WORDS = (8, 40)


def bench_serve(args: argparse.Namespace) -> int:
    """Run the benchmark, print the table and write the result; 1 if any request failed. Raises TfserveError."""
    if args.input_len is not None and args.dataset != "random":
        raise TfserveError("--input-len: prompts of a file have the length they have; leave it out or use random")
    # Check now what would otherwise fail after a long run.
    if args.plots:
        require_matplotlib("leave --plots out")
    if args.output:
        require_writable(args.output)
    return asyncio.run(_serve(args))


async def _serve(args: argparse.Namespace) -> int:
    rates = _rates(args)
    scored = [score_rate(rate, args.score_rate) for rate in rates]
    async with open_session(args.api_key, args.timeout) as session:
        target = Target(
            base_url=args.base_url,
            model=args.model or await first_model(session, args.base_url),
            endpoint=args.endpoint,
            temperature=args.temperature,
            ignore_eos=args.ignore_eos,
        )
        rows = await _rows(args, StreamClient(session, target))
        lengths = Lengths(args.max_tokens, args.reference_len)
        work = [Work(row.prompt, lengths.of(row), rate) for row, rate in zip(rows, rates, strict=True)]
        arrivals = arrival_times(args.request_rate, args.num_prompts, args.seed)
        records = [
            RequestRecord(index=index, arrival_s=arrival, rate=rate)
            for index, (arrival, rate) in enumerate(zip(arrivals, scored, strict=True))
        ]
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        await _send_all(StreamClient(session, target), records, work)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    summary = summarize(records, wall_s, cpu_s)
    print(table(summary))
    for record in [record for record in records if record.error][:3]:
        print(f"request {record.index} failed ({record.error}): {record.error_detail}", file=sys.stderr)
    if args.output:
        write_result(args.output, _config(args, target), summary, records)
    if args.plots:
        ttft_cdf(records, args.plots / "ttft_cdf.png")
        timelines(records, args.plots / "timelines.png")
    return 1 if summary.num_failed else 0


def _rates(args: argparse.Namespace) -> list[Rate]:
    """The rate that each request sends."""
    if args.rate_mix is not None:
        return list(mixed_rates(args.rate_mix, args.num_prompts, args.seed))
    return [args.rate] * args.num_prompts


async def _rows(args: argparse.Namespace, client: StreamClient) -> list[PromptRow]:
    if args.dataset == "prompts":
        return read_prompts(BUNDLED_PROMPTS, args.num_prompts, args.seed)
    if args.dataset != "random":
        return read_prompts(Path(args.dataset), args.num_prompts, args.seed)
    rng = random.Random(args.seed)
    measured = [(words, await _count_tokens(client, random_prompt(words, rng))) for words in _CALIBRATION_WORDS]
    num_words = PromptSize.from_two(*measured).words_for(args.input_len or DEFAULT_INPUT_LEN)
    return [PromptRow(random_prompt(num_words, rng)) for _ in range(args.num_prompts)]


async def _count_tokens(client: StreamClient, prompt: str) -> int:
    """The server's number of tokens for a prompt, from its usage: not every server has /tokenize."""
    record, work = RequestRecord(index=-1, arrival_s=0.0), Work(prompt, max_tokens=1)
    await client.send(record, work)
    if record.error:
        raise TfserveError(f"the first request failed ({record.error}): {record.error_detail}")
    num_tokens = await client.count_prompt_tokens(work) if record.prompt_tokens is None else record.prompt_tokens
    if num_tokens is None:
        raise TfserveError("--dataset random: the server reports no usage.prompt_tokens to size prompts by; use a file")
    return num_tokens


async def _send_all(client: StreamClient, records: list[RequestRecord], work: list[Work]) -> None:
    """Send every request at its arrival time, also after failures, and wait for all of them."""
    # `disable=None` shows the bar on a terminal only, not in a log.
    with tqdm(total=len(records), unit="request", disable=None) as bar:

        async def send(record: RequestRecord, one: Work) -> None:
            await asyncio.sleep(record.arrival_s - client.now())
            await client.send(record, one)
            bar.update()

        async with asyncio.TaskGroup() as group:
            for record, one in zip(records, work, strict=True):
                group.create_task(send(record, one))


def _config(args: argparse.Namespace, target: Target) -> dict[str, Any]:
    """The settings of the run; the key stays out of the file."""
    return {
        **msgspec.structs.asdict(target),
        "dataset": args.dataset,
        "num_prompts": args.num_prompts,
        "input_len": (args.input_len or DEFAULT_INPUT_LEN) if args.dataset == "random" else None,
        "max_tokens": args.max_tokens,
        "reference_len": args.reference_len,
        "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
        "rate": args.rate,
        "rate_mix": args.rate_mix and {str(rate): share for rate, share in args.rate_mix.items()},
        "score_rate": args.score_rate,
        "seed": args.seed,
        "timeout_s": args.timeout,
    }
