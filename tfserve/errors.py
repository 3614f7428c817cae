"""Every exception tfserve raises on purpose. Each message names what was wrong, where it came from and what to do."""

from __future__ import annotations

from typing import ClassVar

import msgspec

NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the JSON asked for: of another shape, no UTF-8, nested too deep."""


class TfserveError(Exception):
    """Base of all deliberate errors: safe to show to the person who caused it.

    `exit_code` is how a command ends that meets it: 2 if the user must change something first, 1 if the same command
    may succeed when it is run again. docs/operations.md tells supervisors so.
    """

    exit_code: ClassVar[int] = 2


class ConfigError(TfserveError):
    """A setting that cannot be honoured: unknown key, bad value, or a wish this machine cannot meet."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class ModelError(TfserveError):
    """A checkpoint that cannot be loaded: missing file, unknown architecture, missing or misshapen tensor."""


class DownloadError(ModelError):
    """A model that could not be fetched now; the network or the index may be back later."""

    exit_code = 1


class RequestError(TfserveError):
    """A request that cannot be served as asked. `param` names the offending field (OpenAI's `error.param`)."""

    def __init__(self, param: str | None, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(TfserveError):
    """The bounded waiting queue is full; try again in `retry_after_s` seconds."""

    exit_code = 1

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(TfserveError):
    """The engine has stopped and cannot serve: it was shut down, it was killed, or a step failed beyond repair."""

    exit_code = 1
