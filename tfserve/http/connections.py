"""The connections of a server, which aiohttp reads: how long they may idle, and what of them is logged."""

from __future__ import annotations

import logging

from aiohttp import http_exceptions, web

IDLE_TIMEOUT_S = 75.0
"""How long a connection may take to begin, to send a request's head, or to come with the next one.

Longer than the 60 s after which common proxies leave connections; aiohttp's own is an hour.
"""


def create_runner(
    app: web.Application, *, shutdown_timeout_s: float, idle_timeout_s: float = IDLE_TIMEOUT_S
) -> web.AppRunner:
    """A runner for `app` whose lost clients end their requests, and whose log quotes nobody."""
    logger = logging.getLogger(__name__)
    logger.addFilter(_without_quotes)
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=shutdown_timeout_s,
        keepalive_timeout=idle_timeout_s,
        logger=logger,
        # aiohttp answers an encoding that it does not know itself, not in the API's words (http/packing.py).
        auto_decompress=False,
    )


def _without_quotes(record: logging.LogRecord) -> bool:
    """Tell of bytes that are no HTTP by the error's name: its words quote them.

    They may be a header with a key in it, or the rest of a prompt that is longer than its Content-Length says.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, http_exceptions.HttpProcessingError):
        record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}", ()
        record.exc_info = None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True
