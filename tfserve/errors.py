"""Every exception that tfserve raises on purpose. Each message names the problem, its origin and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import msgspec

NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the expected JSON: another shape, invalid UTF-8, nested too deep."""


class TfserveError(Exception):
    """Base of all deliberate errors: the message is safe to show to the user.

    `exit_code` is the exit code of a command with this error: 2 if the user must change something first, 1 if the same
    command may succeed later. docs/operations.md documents it for supervisors.
    """

    exit_code: ClassVar[int] = 2


class ConfigError(TfserveError):
    """A setting that cannot be used: an unknown key, a bad value, or a value that this machine cannot support."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class ModelError(TfserveError):
    """A checkpoint that cannot be loaded: missing file, unknown architecture, missing or misshapen tensor."""


class DownloadError(ModelError):
    """A failed download of a model; a retry may succeed."""

    exit_code = 1


class RequestError(TfserveError):
    """A request that cannot be served. `param` names the wrong field (OpenAI's `error.param`)."""

    def __init__(self, param: str | None, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def renamed(self, names: Mapping[str, str]) -> RequestError:
        """The same error with its fields renamed by `names`, for a client that uses other names."""
        message = str(self)
        for name, other in names.items():
            # Other names, such as "prompt", may be an ordinary word of the sentence.
            if "_" in name:
                message = re.sub(rf"\b{name}\b", other, message)
        return RequestError(names.get(self.param or "", self.param), message, self.code)


class QueueFullError(TfserveError):
    """The bounded waiting queue is full; try again in `retry_after_s` seconds."""

    exit_code = 1

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(TfserveError):
    """The engine has ended: it was shut down, it was killed, or it has failed.

    `code` is its name in the API.
    """

    exit_code = 1
    code: ClassVar[str] = "engine_dead"


class EngineStalledError(EngineDeadError):
    """The engine makes no progress: it takes no messages, or its steps do not end. It may recover."""

    code = "engine_stalled"


class LibraryPanicError(TfserveError):
    """A panic of a library written in Rust: a bug of that library."""


def failures() -> tuple[type[BaseException], ...]:
    """The exceptions to catch where a failure must affect only one request, step, feature or thread.

    Exception, and the panics of Rust libraries. pyo3 derives PanicException from BaseException, and each library
    creates its own class at its first panic. So call this in the `except` clause itself, which is evaluated only after
    a raise. KeyboardInterrupt, SystemExit and cancellation are not included.
    """
    panics = [kind for kind in BaseException.__subclasses__() if kind.__name__ == "PanicException"]
    return (Exception, *panics)


@contextmanager
def panics_as_errors(doing: str) -> Iterator[None]:
    """Turn a panic of a Rust library into a LibraryPanicError; `doing` says what was being done."""
    try:
        yield
    except failures() as error:
        if isinstance(error, Exception):
            raise
        raise LibraryPanicError(f"{doing}: a library broke down on it ({error})") from error
