"""What the OpenAPI document says of a field beyond its type: stands beside the field."""

from __future__ import annotations

from typing import Any

import msgspec

_SAID = "x-documented"


def documented(**schema: Any) -> msgspec.Meta:
    """JSON schema of a field, instead of what its type says. It checks nothing: the engine or the endpoint does."""
    return msgspec.Meta(extra_json_schema={_SAID: schema})


def between(low: float, high: float) -> msgspec.Meta:
    """A number from `low` to `high`."""
    return documented(minimum=low, maximum=high)


def settle(node: Any) -> None:
    """Put into a schema, and into all that it holds, what is `documented`."""
    if isinstance(node, dict):
        node.update(node.pop(_SAID, {}))
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        settle(child)
