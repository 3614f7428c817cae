"""Compressed request bodies. aiohttp leaves them as they are (see connections.py); this module unpacks them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from tfserve.http.errors import ApiError

_WINDOWS: dict[str, Sequence[int]] = {
    "gzip": (16 + zlib.MAX_WBITS,),
    "x-gzip": (16 + zlib.MAX_WBITS,),
    # Some clients leave out the header that RFC 9110 asks for.
    "deflate": (zlib.MAX_WBITS, -zlib.MAX_WBITS),
}

_KNOWN = "gzip, deflate"


def packing_of(content_encoding: str) -> str | None:
    """The one encoding in a Content-Encoding header; None if the body is not packed. Raises ApiError (415)."""
    names = [name for part in content_encoding.split(",") if (name := part.strip().lower()) not in {"", "identity"}]
    if not names:
        return None
    if len(names) > 1 or names[0] not in _WINDOWS:
        message = f"The Content-Encoding {content_encoding[:50]!r} is not supported; send {_KNOWN} or no encoding."
        raise ApiError(415, message, code="unsupported_encoding", headers={"Accept-Encoding": _KNOWN})
    return names[0]


def unpacked(body: bytes, packing: str, max_bytes: int) -> bytes | None:
    """The body without its packing; None if it is larger than `max_bytes`. Raises ApiError (400) if it is broken."""
    for window in _WINDOWS[packing]:
        stream = zlib.decompressobj(window)
        try:
            data = stream.decompress(body, max_bytes + 1)
        except zlib.error:
            continue
        if len(data) > max_bytes:
            return None
        if stream.eof and not stream.unused_data:
            return data
    message = f"The body cannot be unpacked; it does not come as it says (Content-Encoding: {packing})."
    raise ApiError(400, message, code="invalid_body")
