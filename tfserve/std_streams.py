"""Standard input, output and error of a command, which its caller may have closed, or may close at any time."""

from __future__ import annotations

import os
import sys


def open_closed() -> None:
    """Put the null device where a standard stream is closed; else the next file, or socket, would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # The interpreter has found them closed, and has none.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def say(text: str) -> None:
    """Print for the person at the terminal, at once; it is no error if nobody reads it any more."""
    try:
        print(text, flush=True)
    except OSError:
        drop_output()


def drop_output() -> None:
    """Let go of a standard output that cannot be written to, and of what could not be written."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
