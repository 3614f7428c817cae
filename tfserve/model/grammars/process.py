"""The process that checks grammars: `python -m tfserve.model.grammars.process FD`, started by GrammarChecker.

FD is one end of a socket pair. The first frame out is empty and says that the library is loaded; then each frame in is
a grammar, and its answer is what is wrong with it. The process ends when the other end closes. A grammar that takes
more than CPU_LIMIT_S of processor time, or too much memory, ends the process. Torch-free.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from tfserve.errors import failures
from tfserve.model.grammars.limits import parser_limits
from tfserve.model.grammars.schema_ends import has_finite_text

if TYPE_CHECKING:
    from llguidance import LLTokenizer

CPU_LIMIT_S = 3.0
"""Processor time for one grammar. The largest allowed schemas take about a second."""

_MEMORY_BYTES = 2 * 2**30
"""Address space of the whole process."""

_STACK_BYTES = 4 * 2**20
"""Stack size: the library is recursive. The engine's thread has a larger stack, so a checked grammar fits there too."""


def problem_of(grammar: str, tokenizer: LLTokenizer) -> str:
    """What is wrong with a grammar; empty if it is valid."""
    from llguidance import LLMatcher

    try:
        start = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
        if not start.is_error():
            start.compute_bitmask()
        if start.is_error():
            return start.get_error().partition("\n")[0]
        if start.is_stopped() and not start.is_accepting():
            return "no text satisfies it"
        if not all(map(has_finite_text, _schemas(grammar))):
            return "it requires itself again and again, so no finite JSON satisfies it"
    except failures() as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _schemas(grammar: str) -> list[Any]:
    """The JSON schemas of a grammar made by `json_schema_grammar`; of a Lark grammar, none."""
    if not grammar.startswith("{"):
        return []
    return [part["json_schema"] for part in json.loads(grammar)["grammars"] if part.get("json_schema") is not None]


def _serve(conn: Connection) -> None:
    from llguidance import LLTokenizer

    # A vocabulary of single bytes: the check does not depend on a model's tokenizer.
    tokenizer = LLTokenizer("byte", slices=[])
    # From here on the library may panic and print text of the client: discard it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    conn.send_bytes(b"")
    while True:
        grammar = conn.recv_bytes().decode()
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        problem = problem_of(grammar, tokenizer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        conn.send_bytes(problem.encode(errors="replace"))


def _work(conn: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):  # the server has ended
        _serve(conn)


def main(fd: int) -> None:
    """Check grammars until the other end closes."""
    # Ctrl-C and a supervisor's SIGTERM reach the whole process group; the server decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    except (ValueError, OSError) as error:  # macOS, or the limit is lower already
        print(f"tfserve: the memory for checking grammars is not limited to 2 GiB: {error}", file=sys.stderr)
    threading.stack_size(_STACK_BYTES)
    worker = threading.Thread(target=_work, args=(Connection(fd),))
    worker.start()
    worker.join()


if __name__ == "__main__":
    main(int(sys.argv[1]))
