"""What the server knows of one endpoint: address, handler, and its part of the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp.typedefs import Handler


@dataclass(frozen=True, slots=True)
class Route:
    """An address with its method. `handler` gets each request; its Service is at `request.app[SERVICE]`.

    `reply` is the Struct of the answer, or the media type of one that is no JSON; `body` is the Struct of the request;
    `chunk` is what the events of a streamed answer hold; `errors` are the statuses that come with an error object,
    beside those of reading a body (`BODY_ERRORS`) and a missing key;
    `also` are statuses that come with `reply`, too; `query` has the schemas of what may follow the address.

    An open route needs no API key. A request of a routine route comes every few seconds for as long as the server, or a
    stream, lives, and is logged at debug level.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    reply: type | str
    body: type | None = None
    chunk: type | None = None
    errors: tuple[int, ...] = ()
    also: Mapping[int, str] = field(default_factory=dict)
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    is_open: bool = False
    is_routine: bool = False

    @property
    def canonical(self) -> str:
        """The path without the router's patterns: "/v1/models/{id}" of "/v1/models/{id:.+}"."""
        return re.sub(r"\{(\w+):[^{}]*\}", r"{\1}", self.path)


TABLE: list[Route] = []
"""Every route that has been registered; `routes.py` imports the modules that register them."""


def register(*routes: Route) -> None:
    """Add endpoints to the table."""
    TABLE.extend(routes)
