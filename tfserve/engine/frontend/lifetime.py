"""The end of an engine without a call to `shutdown`: it is garbage collected, open at exit, or copied by a fork."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")

_EXIT_S = 30.0
"""At exit the program waits this long for the running step, or for a model that is loading."""


class Closable(Protocol):
    """Something that must end before the interpreter does."""

    def close(self, timeout_s: float) -> None:
        """End within `timeout_s`; idempotent."""
        ...


class Disownable(Protocol):
    """Something whose copy in a forked child cannot work."""

    def disown(self) -> None:
        """Release what belongs to the parent process."""
        ...


_at_exit: weakref.WeakSet[Closable] = weakref.WeakSet()
_at_fork: weakref.WeakSet[Disownable] = weakref.WeakSet()


def close_at_exit(client: Closable) -> None:
    """Close `client` at exit, if it still exists.

    A thread that returns from torch's C++ code while the interpreter ends is unwound by force. C++ then ends the
    process with SIGABRT instead of its exit code.
    """
    _at_exit.add(client)


def disown_in_fork(owner: Disownable) -> None:
    """Call `owner.disown()` in every child that is forked."""
    _at_fork.add(owner)


def weakly(method: Callable[[T], None]) -> Callable[[T], None]:
    """A callable that holds its object by a weak reference; a no-op once the object is gone."""
    reference = weakref.WeakMethod(method)

    def call(argument: T) -> None:
        if (live := reference()) is not None:
            live(argument)

    return call


@atexit.register
def _close_all() -> None:
    clients = list(_at_exit)
    try:
        for timeout_s in (0.0, _EXIT_S):  # ask all to end, then wait for each
            for client in clients:
                client.close(timeout_s)
    except KeyboardInterrupt:
        # A second Ctrl-C: exit at once, without finalizing the interpreter.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(130)


def _disown_all() -> None:
    _at_exit.clear()
    for owner in list(_at_fork):
        owner.disown()


os.register_at_fork(after_in_child=_disown_all)
