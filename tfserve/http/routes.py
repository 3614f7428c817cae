"""The table of routes: the router, the OpenAPI document and the paths that need no key are made of it.

A new endpoint is a file here, which registers it, and its name in this line.
"""

from tfserve.http import about, chat, completions, page, scrape, streams, tokens  # noqa: F401
from tfserve.http.route import TABLE

ROUTES = tuple(TABLE)
"""Every address but that of the OpenAPI document."""

OPEN_PATHS = frozenset(route.path for route in ROUTES if route.is_open)
"""What is answered without a key: probes and scrapers have none, and the page asks for it."""
