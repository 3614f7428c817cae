"""Compressed request bodies. aiohttp leaves them as they are (see connections.py); this module unpacks them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from tfserve.http.bodies import BodyHold
from tfserve.http.errors import ApiError
from tfserve.http.off_loop import LONG, native_off_loop

_WINDOWS: dict[str, Sequence[int]] = {
    "gzip": (16 + zlib.MAX_WBITS,),
    "x-gzip": (16 + zlib.MAX_WBITS,),
    # Some clients leave out the header that RFC 9110 asks for.
    "deflate": (zlib.MAX_WBITS, -zlib.MAX_WBITS),
}

_KNOWN = "gzip, deflate"

_PIECE_BYTES = 256 * 1024
"""What is unpacked at once, which takes about a millisecond."""


def packing_of(content_encoding: str) -> str | None:
    """The one encoding in a Content-Encoding header; None if the body is not packed. Raises ApiError (415)."""
    names = [name for part in content_encoding.split(",") if (name := part.strip().lower()) not in {"", "identity"}]
    if not names:
        return None
    if len(names) > 1 or names[0] not in _WINDOWS:
        message = f"The Content-Encoding {content_encoding[:50]!r} is not supported; send {_KNOWN} or no encoding."
        raise ApiError(415, message, code="unsupported_encoding", headers={"Accept-Encoding": _KNOWN})
    return names[0]


async def unpacked(body: bytes, packing: str, max_bytes: int, hold: BodyHold) -> bytes | None:
    """The body without its packing; None if it is larger than `max_bytes`.

    What comes out is counted in `hold` piece by piece, for few bytes may stand for many. Raises ApiError for a body
    that is broken (400), and where there is no room for it (503).
    """
    for window in _WINDOWS[packing]:
        stream = zlib.decompressobj(window)
        data, rest = bytearray(), body
        try:
            while piece := await native_off_loop(LONG, stream.decompress, rest, _PIECE_BYTES):
                data += piece
                if len(data) > max_bytes:
                    return None
                hold.resize(len(body) + len(data))
                rest = stream.unconsumed_tail
        except zlib.error:
            continue
        if stream.eof and not stream.unused_data:
            return bytes(data)
    message = f"The body cannot be unpacked; it does not come as it says (Content-Encoding: {packing})."
    raise ApiError(400, message, code="invalid_body")
