"""Every exception tfserve raises on purpose. Each message names what was wrong, where it came from and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

    def renamed(self, names: Mapping[str, str]) -> RequestError:
        """The same error with its fields called as `names` has them, for a client that knows them by these names."""
        message = str(self)
        for name, other in names.items():
            # Others, such as "prompt", may be just a word of the sentence.
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
    """The engine has stopped and cannot serve: it was shut down, it was killed, or a step failed beyond repair.

    `code` is what the API calls it.
    """

    exit_code = 1
    code: ClassVar[str] = "engine_dead"


class EngineStalledError(EngineDeadError):
    """The engine is there and does nothing: it takes no messages, or its steps do not end. It may go on."""

    code = "engine_stalled"


class LibraryPanicError(TfserveError):
    """A library written in Rust gave up on what it was given, which is a fault of that library."""


def failures() -> tuple[type[BaseException], ...]:
    """What an `except` catches that keeps a failure to one request, step, feature or thread: use it for `Exception`.

    Beside every Exception these are the panics of Rust libraries. pyo3 derives its PanicException from BaseException,
    and each library makes a class of its own at its first panic: so call this in the `except` clause itself, which is
    evaluated only when something was raised. KeyboardInterrupt, SystemExit and cancellation are none of them.
    """
    panics = [kind for kind in BaseException.__subclasses__() if kind.__name__ == "PanicException"]
    return (Exception, *panics)


@contextmanager
def panics_as_errors(doing: str) -> Iterator[None]:
    """Turn a panic of a Rust library into a LibraryPanicError, which says that it happened while `doing` something."""
    try:
        yield
    except failures() as error:
        if isinstance(error, Exception):
            raise
        raise LibraryPanicError(f"{doing}: a library broke down on it ({error})") from error
