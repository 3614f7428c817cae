"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` and a fitting status."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import msgspec
from aiohttp import web

from tfserve.errors import EngineDeadError, QueueFullError, RequestError, TfserveError
from tfserve.strict_json import well_formed

log = logging.getLogger(__name__)

JSON = "application/json"


class ErrorInfo(msgspec.Struct, kw_only=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """A response body, or the data of an SSE event, that reports an error."""

    error: ErrorInfo


_PASSING = frozenset({408, 429, 503})
"""Statuses that pass: the same request may be served later, or by another server."""


_MAX_CHARS, _MAX_NAME_CHARS = 4000, 200
"""Longest message and longest name of a field: both may quote what a client has sent."""


class ApiError(TfserveError):
    """An error with the HTTP status and the error object that report it to the client.

    `recurs`: the same request would get it again, which a header tells OpenAI's clients, for they repeat requests that
    got a 408, 409, 429 or 5xx. By default the status says.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        recurs: bool | None = None,
    ) -> None:
        message, param = _clipped(message, _MAX_CHARS), param and _clipped(param, _MAX_NAME_CHARS)
        super().__init__(message)
        self.status = status
        # An error may quote a header, whose bytes need not be UTF-8.
        self.info = ErrorInfo(message=well_formed(message), type=kind, param=param, code=code)
        self.headers = dict(headers or {})
        if status not in _PASSING if recurs is None else recurs:
            self.headers["X-Should-Retry"] = "false"

    def body(self) -> bytes:
        """The JSON of the error."""
        return msgspec.json.encode(ErrorBody(self.info))

    def response(self) -> web.Response:
        """The error as a whole response."""
        return web.Response(status=self.status, body=self.body(), content_type=JSON, headers=self.headers)


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "..."


def unavailable(message: str, code: str, retry_after_s: float | None = None, *, recurs: bool | None = None) -> ApiError:
    """503: the server cannot serve now (loading, draining, dead, aborted), whatever the request says."""
    headers = _retry_after(retry_after_s)
    return ApiError(503, message, kind="service_unavailable_error", code=code, headers=headers, recurs=recurs)


def too_many(message: str, code: str, retry_after_s: float) -> ApiError:
    """429: too many requests are being served; the client may try again after `retry_after_s`."""
    return ApiError(429, message, kind="rate_limit_error", code=code, headers=_retry_after(retry_after_s))


def api_error(error: BaseException) -> ApiError:
    """The ApiError that reports any exception; an unforeseen one is logged whole and becomes a bare 500."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case QueueFullError():
            return too_many(str(error), "queue_full", error.retry_after_s)
        case EngineDeadError():
            return unavailable(str(error), error.code)
        case web.HTTPException():
            return _routing_error(error)
        case _:
            log.error("Unexpected error while answering a request", exc_info=error)
            return ApiError(500, "Internal server error; the server's log has the details.", kind="server_error")


def _retry_after(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}


def _routing_error(error: web.HTTPException) -> ApiError:
    """What aiohttp itself raises before or around a handler."""
    match error:
        case web.HTTPNotFound():
            return ApiError(404, "No such address; the API lives under /v1, see /v1/models.", code="not_found")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{error.method} is not allowed here; use {allowed}."
            return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
        case _:
            kind = "server_error" if error.status >= 500 else "invalid_request_error"
            return ApiError(error.status, error.text or error.reason, kind=kind)
