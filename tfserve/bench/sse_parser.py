"""Parses server-sent events of any server."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from tfserve.errors import NOT_JSON


class SseParser:
    """Splits a byte stream, in chunks of any size, into the payloads of server-sent events.

    Lines end in LF, CRLF or CR. The payload of an event of type "error", or of llama.cpp's field "error", becomes the
    usual JSON object `{"error": ...}`.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []
        self._is_error = False
        self._ends_in_cr = False
        self._has_begun = False

    def feed(self, received: bytes) -> Iterator[bytes]:
        """Yield the payload of each event that `received` completes."""
        if self._ends_in_cr:
            received = received.removeprefix(b"\n")
        self._ends_in_cr = received.endswith(b"\r")
        if b"\r" in received:
            received = received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._tail = (self._tail + received).split(b"\n")
        for line in lines:
            yield from self._line(line)

    def close(self) -> Iterator[bytes]:
        """Yield the last event if the stream ends without a blank line, as some servers do."""
        yield from self._line(self._tail)
        yield from self._line(b"")

    def _line(self, line: bytes) -> Iterator[bytes]:
        if not self._has_begun:
            self._has_begun = True
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            if self._data:
                payload = b"\n".join(self._data)
                yield _as_error(payload) if self._is_error else payload
            self._data, self._is_error = [], False
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field in (b"data", b"error"):
            self._data.append(value)
        self._is_error = self._is_error or field == b"error" or (field == b"event" and value == b"error")


def _as_error(payload: bytes) -> bytes:
    """The payload of an error as the JSON object `{"error": ...}`."""
    try:
        error = msgspec.json.decode(payload)
    except NOT_JSON:
        error = payload.decode(errors="replace")
    return msgspec.json.encode(error if isinstance(error, dict) and "error" in error else {"error": error})
