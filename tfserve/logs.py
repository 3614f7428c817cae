"""Logging of the commands: lines of text or JSON on stderr."""

from __future__ import annotations

import logging
import time

import msgspec

_TEXT = "%(asctime)s %(levelname)s %(message)s"
_NAME = "tfserve"
"""Marks our own handler: handlers that a program has set up stay."""


class JsonFormatter(logging.Formatter):
    """A record as a JSON object: time (UTC, ISO 8601), level, logger, message, and the traceback of an error."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {"time": f"{seconds}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        fields |= {"logger": record.name, "message": record.getMessage()} | self._process
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode({name: _valid(text) for name, text in fields.items()}).decode()


def log_to_stderr(level: str = "info", layout: str = "text", process: str = "") -> None:
    """Log messages of tfserve from `level` on, and of libraries from info on; every line names `process`.

    May be called again. Does nothing if the program has its own handlers.
    """
    root = logging.getLogger()
    ours = [handler for handler in root.handlers if handler.name == _NAME]
    if root.handlers and not ours:
        return
    handler = ours[0] if ours else logging.StreamHandler()
    handler.name = _NAME
    text = logging.Formatter(_TEXT.replace("%(message)s", f"{process} %(message)s" if process else "%(message)s"))
    handler.setFormatter(JsonFormatter(process) if layout == "json" else text)
    if not ours:
        root.addHandler(handler)
    least = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(least, logging.INFO))
    logging.getLogger("tfserve").setLevel(least)


def _valid(text: str) -> str:
    """Text that is valid in JSON: half a surrogate pair is written as its code."""
    return text.encode(errors="backslashreplace").decode()
