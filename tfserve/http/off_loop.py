"""Long work off the event loop, so that it holds up no stream.

Work in Python gives the interpreter lock away every 5 ms, but one call of a library may keep it for as long as it runs.
So one thread does all such work: the loop then waits for one call at most, however many requests need it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

LONG = 32_768
"""Bytes, characters or items of input from which work is long."""

_PYTHON = ThreadPoolExecutor(1, "tfserve-long")
_NATIVE = ThreadPoolExecutor(2, "tfserve-native")


async def off_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns; it runs in a thread if `size`, that of its input, is LONG."""
    return await _run(_PYTHON, size, lambda: function(*args, **kwargs))


async def native_off_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `off_loop`, for functions that give the interpreter lock away: two run at once, which bounds their memory."""
    return await _run(_NATIVE, size, lambda: function(*args, **kwargs))


async def _run(pool: ThreadPoolExecutor, size: int, call: Callable[[], T]) -> T:
    if size < LONG:
        return call()
    return await asyncio.get_running_loop().run_in_executor(pool, call)
