"""The `tfserve` command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tfserve import __version__
from tfserve.cli_config import config_from_args, settings_help, split_settings
from tfserve.errors import TfserveError
from tfserve.logs import log_to_stderr
from tfserve.std_streams import drop_output, open_closed

logger = logging.getLogger("tfserve.cli")

_WITH_SETTINGS = (["serve"], ["generate"], ["bench", "engine"])
"""Commands that take every setting."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0; 1 if a retry may succeed; 2 if the user must change something."""
    open_closed()
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(is_bench=words[:1] == ["bench"])
    takes_settings = any(words[: len(command)] == command for command in _WITH_SETTINGS)
    settings, words = split_settings(words) if takes_settings else ([], words)
    args, rest = parser.parse_known_args(words)
    if rest and not takes_settings:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.settings = [*settings, *rest]  # words unknown to argparse are settings; the command checks them
    log_to_stderr()
    try:
        code: int = args.func(args)
    except TfserveError as error:
        print(f"tfserve: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        drop_output()
        return 1
    return code


def _parser(is_bench: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfserve", description="Serve a language model to people who read as it writes."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_commands(commands)
    if is_bench:
        # Imported late: it imports the whole simulator, which a server does not need.
        from tfserve.bench.cli import add_bench_parser

        add_bench_parser(commands)
    else:
        commands.add_parser(
            "bench", help="measure a running server, the engine, or the scheduler on simulated hardware"
        )
    return parser


def _add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser("serve", help="serve a model over HTTP")
    serve.add_argument("target", nargs="?", help="YAML file, model directory, hub id, or 'demo'")
    serve.set_defaults(func=_serve)
    serve.formatter_class = argparse.RawDescriptionHelpFormatter
    serve.epilog = settings_help()

    generate = commands.add_parser(
        "generate", help="answer one prompt in the terminal", epilog="every setting, too: see `tfserve serve --help`"
    )
    generate.add_argument("target", help="YAML file, model directory, hub id, or 'demo'")
    generate.add_argument("prompt")
    generate.add_argument("--max-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--raw", action="store_true", help="send the prompt as it is, without the chat template")
    generate.set_defaults(func=_generate)

    demo = commands.add_parser("demo-model", help="prepare SmolLM2-135M-Instruct, the model called 'demo'")
    demo.set_defaults(func=_demo_model)

    gguf = commands.add_parser(
        "import-gguf", help="convert a Llama, Mistral, Qwen2 or Qwen3 GGUF file into a Hugging Face directory"
    )
    gguf.add_argument("file", type=Path)
    gguf.add_argument("directory", type=Path)
    gguf.set_defaults(func=_import_gguf)


def _serve(args: argparse.Namespace) -> int:
    from tfserve.http.server import serve

    config = config_from_args(args.target, args.settings)
    log_to_stderr(config.log_level, config.log_format)
    logger.info("Settings read; serving %s", config.model)
    return serve(config)


def _generate(args: argparse.Namespace) -> int:
    from tfserve.generate import generate

    config = config_from_args(args.target, args.settings)
    log_to_stderr(config.log_level, config.log_format)
    return generate(config, args.prompt, args.max_tokens, args.temperature, args.raw)


def _demo_model(_: argparse.Namespace) -> int:
    from tfserve.model.loading.demo import prepare_demo_model

    print(prepare_demo_model())
    return 0


def _import_gguf(args: argparse.Namespace) -> int:
    from tfserve.model.gguf.conversion import import_gguf

    print(import_gguf(args.file, args.directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
