"""How an engine ends that no call ends: dropped by the program, left behind at its exit, or copied by a fork."""

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
"""How long a program that leaves waits for the step under way, or for a model that is still loading."""


class Closable(Protocol):
    """What must have ended before the interpreter does."""

    def close(self, timeout_s: float) -> None:
        """End within `timeout_s`; may be called again."""
        ...


class Disownable(Protocol):
    """What a fork has a copy of that cannot work."""

    def disown(self) -> None:
        """Let go of what belongs to the process that was forked."""
        ...


_at_exit: weakref.WeakSet[Closable] = weakref.WeakSet()
_at_fork: weakref.WeakSet[Disownable] = weakref.WeakSet()


def close_at_exit(client: Closable) -> None:
    """Close `client` when the program leaves, if it is still alive.

    A thread that comes back from torch's C++ while the interpreter ends is unwound by force, and C++ then ends the
    process with SIGABRT in place of its own exit code.
    """
    _at_exit.add(client)


def disown_in_fork(owner: Disownable) -> None:
    """Call `owner.disown()` in every child that is forked."""
    _at_fork.add(owner)


def weakly(method: Callable[[T], None]) -> Callable[[T], None]:
    """The method, as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def call(argument: T) -> None:
        if (live := reference()) is not None:
            live(argument)

    return call


@atexit.register
def _close_all() -> None:
    clients = list(_at_exit)
    try:
        for timeout_s in (0.0, _EXIT_S):  # first all are asked, then each is waited for
            for client in clients:
                client.close(timeout_s)
    except KeyboardInterrupt:
        # Impatience: leave without the interpreter's own end.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(130)


def _disown_all() -> None:
    _at_exit.clear()
    for owner in list(_at_fork):
        owner.disown()


os.register_at_fork(after_in_child=_disown_all)
