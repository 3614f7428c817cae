"""The `bench` commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tfserve.bench.compare import bench_compare
from tfserve.bench.replay import add_replay_parsers
from tfserve.bench.report import write_json
from tfserve.bench.serve import DEFAULT_INPUT_LEN, bench_serve
from tfserve.bench.workload import parse_clamp, parse_positive, parse_rate, parse_rate_mix, parse_request_rate
from tfserve.cli_config import config_from_args
from tfserve.logs import log_to_stderr

T = TypeVar("T")


def add_bench_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` and its commands. Each sets `func`: Namespace -> exit code, which may raise TfserveError."""
    bench = subparsers.add_parser("bench")
    commands = bench.add_subparsers(dest="bench_command", required=True)
    add_replay_parsers(commands)
    _add_engine(commands)
    serve = commands.add_parser(
        "serve",
        help="send requests to any OpenAI-compatible server and measure its streams",
        description="Send streaming requests to any OpenAI-compatible server, each at its own time, and report time to "
        "first token, time between chunks, throughput and, for a reading rate, how well the streams could be read. "
        "Exit code 1 if any request failed.",
    )
    serve.set_defaults(func=bench_serve)
    _add_target(serve)
    _add_workload(serve)
    _add_readers(serve)
    serve.add_argument("--output", type=Path, help="write the result, with every request's record, to this JSON file")
    serve.add_argument("--plots", type=Path, help="draw pictures into this directory (needs the extra bench)")
    compare = commands.add_parser(
        "compare",
        help="two results of bench serve side by side",
        description="Print the numbers of two files written by bench serve --output, and the second over the first.",
    )
    compare.set_defaults(func=bench_compare)
    compare.add_argument("a", type=Path, metavar="A.json")
    compare.add_argument("b", type=Path, metavar="B.json")


def _add_engine(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    engine = commands.add_parser(
        "engine",
        help="offline throughput and step times beside the roofline",
        description="Run batches of made-up prompts through an embedded engine, without a network, and print "
        "throughput and step times beside the least that this machine's measured memory and matrix rates allow.",
        epilog="any setting of the engine, too, e.g. --quantization int8, --threads 2: see `tfserve serve --help`",
    )
    engine.set_defaults(func=_bench_engine)
    add = engine.add_argument
    add("target", help="YAML file, model directory, hub id, or 'demo'")
    sizes = "numbers of at least 1, as 1,8,32"
    add("--batches", type=_parsed(_parse_sizes, sizes), default=[1, 8, 32], help="requests at once (default: 1,8,32)")
    size = _parsed(_parse_size, "a number of at least 1")
    add("--input-len", type=size, default=64, help="tokens of a prompt (default: %(default)s)")
    add("--output-len", type=size, default=64, help="tokens of an answer (default: %(default)s)")
    add("--output", type=Path, help="write the result to this JSON file")


def _bench_engine(args: argparse.Namespace) -> int:
    # Imported late: it imports torch, which the other commands do not need.
    from tfserve.bench.engine import bench_engine, table

    config = config_from_args(args.target, args.settings)
    log_to_stderr(config.log_level, config.log_format)
    result = bench_engine(config, args.batches, args.input_len, args.output_len)
    print(table(result))
    if args.output is not None:
        write_json(args.output, result, "--output")
    return 0


def _parse_size(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _parse_sizes(text: str) -> list[int]:
    return [_parse_size(part) for part in text.split(",")]


def _add_target(serve: argparse.ArgumentParser) -> None:
    add = serve.add_argument_group("server").add_argument
    add("--base-url", required=True, help="as http://127.0.0.1:8000, with or without /v1")
    add("--model", help="name to ask for (default: the first of /v1/models)")
    add("--endpoint", choices=("chat", "completions"), default="chat", help="which API to load (default: %(default)s)")
    add("--api-key", help="sent as bearer token")
    add(
        "--timeout",
        type=_parsed(parse_positive, "seconds above 0"),
        default=600.0,
        help="seconds before a request counts as failed (default: %(default)s)",
    )


def _add_workload(serve: argparse.ArgumentParser) -> None:
    add = serve.add_argument_group("requests").add_argument
    add(
        "--dataset",
        "--prompts",
        default="random",
        help='"random" (default), "prompts" (500 real ones that come with tfserve), or a .jsonl file whose rows have '
        'a "prompt", and may have a "max_tokens" and a "ref_output_tokens"',
    )
    add("--num-prompts", type=_positive, default=32, help="how many requests to send (default: %(default)s)")
    add(
        "--input-len",
        type=_positive,
        help=f"prompt tokens, template included, of random (default: {DEFAULT_INPUT_LEN})",
    )
    add(
        "--max-tokens",
        "--output-len",
        type=_positive,
        default=64,
        help="of every request whose row gives no other (default: %(default)s)",
    )
    add(
        "--reference-len",
        type=_parsed(parse_clamp, "two bounds such as 96:256"),
        metavar="LOW:HIGH",
        help="ask for as many tokens as the row's reference answer has, but at least LOW and at most HIGH",
    )
    add("--ignore-eos", action="store_true", help="send ignore_eos, so that every answer has max_tokens tokens")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add(
        "--request-rate",
        type=_parsed(parse_request_rate, 'a number above 0, "inf" or "burst"'),
        default="inf",
        help='requests/s (Poisson), or "inf" (default) or "burst": all at once',
    )
    add("--seed", type=int, default=0, help="of arrivals, prompts and the order of rates (default: %(default)s)")


def _add_readers(serve: argparse.ArgumentParser) -> None:
    group = serve.add_argument_group("readers")
    rates = group.add_mutually_exclusive_group()
    rates.add_argument(
        "--rate",
        type=_parsed(parse_rate, 'tokens/s above 0, or "read", "listen", "fast" or "auto"'),
        help='how fast answers are read, sent as consumption_rate: tokens/s, "read", "listen", "fast" or "auto"',
    )
    rates.add_argument(
        "--rate-mix",
        type=_parsed(parse_rate_mix, "rates and shares that add up to 1, such as 8:0.4,16:0.6"),
        metavar="RATE:SHARE,...",
        help="several kinds of readers, such as 8:0.4,16:0.6",
    )
    group.add_argument(
        "--score-rate",
        type=_parsed(parse_positive, "tokens/s above 0"),
        help="score at this rate, whatever is sent: for auto, for a server that is told none, for a wrong rate",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _parsed(parse: Callable[[str], T], meaning: str) -> Callable[[str], T]:
    """An argparse type from `parse`; if that raises ValueError, the error says what the option accepts."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {meaning}, got {text!r}") from None

    return convert
