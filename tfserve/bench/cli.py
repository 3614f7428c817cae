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
from tfserve.bench.paper.cli import add_paper_parser
from tfserve.bench.paper.replay import add_replay_parsers
from tfserve.bench.report import summarize, table, write_result
from tfserve.bench.workload import PromptSize, arrival_times, parse_rate, random_prompt, read_prompts
from tfserve.errors import TfserveError

_CALIBRATION_WORDS = (8, 40)
_DEFAULT_INPUT_LEN = 64


def add_bench_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` and its commands. Each sets `func`: Namespace -> exit code, which may raise TfserveError."""
    bench = subparsers.add_parser("bench", help="measure a running server, or the scheduler on simulated hardware")
    commands = bench.add_subparsers(dest="bench_command", required=True)
    add_paper_parser(commands)
    add_replay_parsers(commands)
    serve = commands.add_parser(
        "serve",
        help="send requests to any OpenAI-compatible server and measure its streams",
        description="Send streaming requests to any OpenAI-compatible server, each at its own time, and report time to "
        "first token, time between chunks and throughput. Exit code 1 if any request failed.",
    )
    serve.set_defaults(func=bench_serve)
    add = serve.add_argument
    add("--base-url", required=True, help="as http://127.0.0.1:8000, with or without /v1")
    add("--model", help="name to ask for (default: the first of /v1/models)")
    add("--endpoint", choices=("chat", "completions"), default="chat", help="which API to load (default: %(default)s)")
    add("--api-key", help="sent as bearer token")
    add("--dataset", default="random", help='"random" (default), or a .jsonl file whose rows have a "prompt"')
    add("--num-prompts", type=_positive, default=32, help="how many requests to send (default: %(default)s)")
    add(
        "--input-len",
        type=_positive,
        help=f"prompt tokens, template included, of random (default: {_DEFAULT_INPUT_LEN})",
    )
    add(
        "--max-tokens",
        "--output-len",
        type=_positive,
        default=64,
        help="of every request (default: %(default)s)",
    )
    add("--ignore-eos", action="store_true", help="send ignore_eos, so that every answer has max_tokens tokens")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add(
        "--rate",
        type=_rate,
        default="inf",
        help='requests/s (Poisson), or "inf" (default) or "burst": all at once',
    )
    add("--seed", type=int, default=0, help="of arrivals and prompts (default: %(default)s)")
    add(
        "--timeout",
        type=float,
        default=600.0,
        help="seconds before a request counts as failed (default: %(default)s)",
    )
    add("--output", type=Path, help="write the result, with every request's record, to this JSON file")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _rate(text: str) -> float:
    try:
        return parse_rate(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a number above 0, "inf" or "burst", got {text!r}') from None


def bench_serve(args: argparse.Namespace) -> int:
    """Run the benchmark, print the table and write the result; 1 if any request failed. Raises TfserveError."""
    if args.input_len is not None and args.dataset != "random":
        raise TfserveError("--input-len: prompts of a file have the length they have; leave it out or use random")
    return asyncio.run(_serve(args))


async def _serve(args: argparse.Namespace) -> int:
    async with open_session(args.api_key, args.timeout) as session:
        target = Target(
            base_url=args.base_url,
            model=args.model or await first_model(session, args.base_url),
            endpoint=args.endpoint,
            temperature=args.temperature,
            ignore_eos=args.ignore_eos,
        )
        prompts = await _prompts(args, StreamClient(session, target))
        arrivals = arrival_times(args.rate, args.num_prompts, args.seed)
        records = [RequestRecord(index=index, arrival_s=arrival) for index, arrival in enumerate(arrivals)]
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        await _send_all(StreamClient(session, target), records, prompts, args.max_tokens)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    summary = summarize(records, wall_s, cpu_s)
    print(table(summary))
    for record in [record for record in records if record.error][:3]:
        print(f"request {record.index} failed ({record.error}): {record.error_detail}", file=sys.stderr)
    if args.output:
        write_result(args.output, _config(args, target), summary, records)
    return 1 if summary.num_failed else 0


async def _prompts(args: argparse.Namespace, client: StreamClient) -> list[str]:
    if args.dataset != "random":
        return read_prompts(Path(args.dataset), args.num_prompts, args.seed)
    rng = random.Random(args.seed)
    measured = [(words, await _count_tokens(client, random_prompt(words, rng))) for words in _CALIBRATION_WORDS]
    num_words = PromptSize.from_two(*measured).words_for(args.input_len or _DEFAULT_INPUT_LEN)
    return [random_prompt(num_words, rng) for _ in range(args.num_prompts)]


async def _count_tokens(client: StreamClient, prompt: str) -> int:
    """How many tokens the server counts in a prompt: every server with usage can tell, not every one has /tokenize."""
    record = RequestRecord(index=-1, arrival_s=0.0)
    await client.send(record, prompt, max_tokens=1)
    if record.error:
        raise TfserveError(f"the first request failed ({record.error}): {record.error_detail}")
    if record.prompt_tokens is None:
        raise TfserveError("--dataset random: the server reports no usage.prompt_tokens to size prompts by; use a file")
    return record.prompt_tokens


async def _send_all(client: StreamClient, records: list[RequestRecord], prompts: list[str], max_tokens: int) -> None:
    """Send every request at its arrival time, whatever became of the others, and wait for all of them."""
    # `disable=None` shows the bar on a terminal only: it must not fill a log.
    with tqdm(total=len(records), unit="request", disable=None) as bar:

        async def send(record: RequestRecord, prompt: str) -> None:
            await asyncio.sleep(record.arrival_s - client.now())
            await client.send(record, prompt, max_tokens)
            bar.update()

        async with asyncio.TaskGroup() as group:
            for record, prompt in zip(records, prompts, strict=True):
                group.create_task(send(record, prompt))


def _config(args: argparse.Namespace, target: Target) -> dict[str, Any]:
    """The settings of the run; the key stays out of the file."""
    return {
        **msgspec.structs.asdict(target),
        "dataset": args.dataset,
        "num_prompts": args.num_prompts,
        "input_len": (args.input_len or _DEFAULT_INPUT_LEN) if args.dataset == "random" else None,
        "max_tokens": args.max_tokens,
        "rate": "inf" if math.isinf(args.rate) else args.rate,
        "seed": args.seed,
        "timeout_s": args.timeout,
    }
