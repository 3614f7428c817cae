"""Long work off the event loop, so that it holds up no stream.

Work in Python gives the interpreter lock away when another thread wants it, but one call of a library may keep it for
as long as it runs. So one thread does all such work: the loop then waits for one call at most, however many requests
need it. Between two long calls that thread rests: the loop needs the lock several times for one token.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

LONG = 32_768
"""Bytes, characters or items of input from which work is long."""

ENCODING = 8
"""How much longer tokenising takes than other work on a text of the same length: up to 4 us a character, for digits."""

_REST_S = 0.005

_PYTHON = ThreadPoolExecutor(1, "tfserve-long")
_SCHEMAS = ThreadPoolExecutor(1, "tfserve-schemas")
_NATIVE = ThreadPoolExecutor(2, "tfserve-native")
_SHORT_NATIVE = ThreadPoolExecutor(1, "tfserve-short-native")


def rest() -> None:
    """Let the event loop have its turns, between two long calls of work that may run off it."""
    if threading.current_thread() is not threading.main_thread():
        time.sleep(_REST_S)


async def off_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns; it runs in a thread if `size`, that of its input, is LONG."""
    return await _run(_PYTHON, size, lambda: function(*args, **kwargs))


async def schema_off_loop(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `off_loop`, for a walk through schemas, a tenth of a second for large ones; it waits for no other work."""
    return await _run(_SCHEMAS, LONG, lambda: function(*args, **kwargs))


async def native_off_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `off_loop`, for functions that give the interpreter lock away: two run at once, which bounds their memory.

    One of moderate size does not wait for them.
    """
    pool = _NATIVE if size >= ENCODING * LONG else _SHORT_NATIVE
    return await _run(pool, size, lambda: function(*args, **kwargs))


async def _run(pool: ThreadPoolExecutor, size: int, call: Callable[[], T]) -> T:
    if size < LONG:
        return call()
    return await asyncio.get_running_loop().run_in_executor(pool, call)
