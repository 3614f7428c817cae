"""The OpenAPI 3.1 document of this server, made of the same Structs that parse requests and write answers."""

from __future__ import annotations

from typing import Any

import msgspec

import tfserve
from tfserve.http.documented import settle
from tfserve.http.errors import ErrorBody
from tfserve.http.reading import BODY_ERRORS
from tfserve.http.route import Route
from tfserve.http.routes import ROUTES

_REF = "#/components/schemas/{name}"

_MEANINGS = {
    400: "The request cannot be served as it is; `param` names the field at fault.",
    401: "The API key is missing or wrong.",
    404: "The model is not served here.",
    408: "The body did not come in time.",
    413: "The body is larger than server.max_body_bytes.",
    415: "The Content-Encoding is neither gzip nor deflate; or a web page's request is not called application/json.",
    429: "Too many requests wait, or a limit of the key is reached; Retry-After says for how long to stay away.",
    500: "The engine failed on this request.",
    503: "The server is loading, draining, dead, stuck or full, or the answer was aborted.",
}


def document(model: str, *, with_keys: bool) -> dict[str, Any]:
    """The document of a server that serves `model`; `with_keys`: it asks for API keys."""
    components = _components(model)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.canonical, {})[route.method.lower()] = _described(route, with_keys and not route.is_open)
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "tfserve", "version": tfserve.__version__, "summary": "An OpenAI-compatible LLM server"},
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return result


def _described(route: Route, secured: bool) -> dict[str, Any]:
    good = _content(route.reply)
    if route.chunk is not None:
        events = f"Events whose data is a {route.chunk.__name__} or an ErrorBody each; the last one's is [DONE]."
        # Without a type: OpenAPI 3.1 leaves open whether a schema is about the whole stream or about each event.
        good["text/event-stream"] = {"schema": {"description": events}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": good}}
    for status, meaning in route.also.items():
        responses[str(status)] = {"description": meaning, "content": _content(route.reply)}
    bodily = () if route.body is None else BODY_ERRORS
    for status in sorted({*route.errors, *bodily, *((401,) if secured else ())}):
        content = {"application/json": {"schema": _ref(ErrorBody)}}
        responses[str(status)] = {"description": _MEANINGS[status], "content": content}
    described: dict[str, Any] = {"summary": route.summary, "responses": responses}
    if route.body is not None:
        content = {"application/json": {"schema": _ref(route.body)}}
        described["requestBody"] = {"required": True, "content": content}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()
    ]
    if "{id}" in route.canonical:
        parameters.append({"name": "id", "in": "path", "required": True, "schema": {"type": "string"}})
    if parameters:
        described["parameters"] = parameters
    if secured:
        described["security"] = [{"key": []}]
    return described


def _components(model: str) -> dict[str, Any]:
    """Every Struct that a route mentions."""
    mentioned: list[type] = [ErrorBody]
    for route in ROUTES:
        mentioned += [each for each in (route.reply, route.body, route.chunk) if isinstance(each, type)]
    _, components = msgspec.json.schema_components(list(dict.fromkeys(mentioned)), ref_template=_REF)
    settle(components)
    for body in {route.body for route in ROUTES if route.body is not None}:
        if (name := components[body.__name__]["properties"].get("model")) is not None:
            name["anyOf"][0]["enum"] = [model]
    return components


def _content(reply: type | str) -> dict[str, Any]:
    """What an answer is: JSON of a Struct, or text of some type."""
    if isinstance(reply, str):
        return {reply: {"schema": {"type": "string"}}}
    return {"application/json": {"schema": _ref(reply)}}


def _ref(struct: type) -> dict[str, str]:
    return {"$ref": _REF.format(name=struct.__name__)}
