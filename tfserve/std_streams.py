"""Standard input, output and error of a command. The caller may have closed them, or may close them later."""

from __future__ import annotations

import os
import sys


def open_closed() -> None:
    """Open the null device for each closed standard stream; otherwise the next file or socket would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # The interpreter sets a closed stream to None.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def say(text: str) -> None:
    """Print to stdout and flush; a closed stdout is not an error."""
    try:
        print(text, flush=True)
    except OSError:
        drop_output()


def drop_output() -> None:
    """Replace a broken stdout by the null device; unwritten output is lost."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
