"""The OpenAPI 3.1 document of this server, made of the same Structs that parse requests and write answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

import tfserve
from tfserve.http import replies, streams, tokens
from tfserve.http.errors import ErrorBody
from tfserve.http.protocol import (
    MAX_BIASED,
    MAX_N,
    MAX_PROMPTS,
    MAX_STOP,
    MAX_STOP_CHARS,
    ChatRequest,
    CompletionRequest,
)
from tfserve.http.tools import MAX_TOOLS
from tfserve.types import FASTEST_RATE, MAX_LOGPROBS, SLOWEST_RATE

_REF = "#/components/schemas/{name}"

_MEANINGS = {
    400: "The request cannot be served as it is; `param` names the field at fault.",
    401: "The API key is missing or wrong.",
    404: "The model is not served here.",
    408: "The body did not come in time.",
    413: "The body is larger than server.max_body_bytes.",
    415: "The Content-Encoding is neither gzip nor deflate; or a web page's request is not called application/json.",
    429: "Too many requests wait; Retry-After says for how long to stay away.",
    500: "The engine failed on this request.",
    503: "The server is loading, draining or dead, or the answer was aborted.",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One address with its method. `errors` are the statuses that come with an error object.

    `reply` is the Struct of the answer, or the type of one that is no JSON; `chunk` is what the events of a streamed
    answer hold; `also` are statuses that come with `reply`, too; `query` are schemas of what may follow the address.
    """

    method: str
    path: str
    summary: str
    reply: type | str
    body: type | None = None
    chunk: type | None = None
    errors: tuple[int, ...] = ()
    also: Mapping[int, str] = field(default_factory=dict)
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_GENERATING = (400, 404, 413, 429, 500, 503)

OPERATIONS = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation, whole or as a stream of events",
        replies.ChatCompletion,
        ChatRequest,
        replies.ChatChunk,
        _GENERATING,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Continue prompts, whole or as a stream of events",
        replies.Completion,
        CompletionRequest,
        replies.Completion,
        _GENERATING,
    ),
    Operation(
        "post",
        "/tokenize",
        "The token ids of a text or a conversation",
        tokens.TokenizeReply,
        tokens.TokenizeRequest,
        errors=(400, 404, 413, 503),
    ),
    Operation(
        "post",
        "/detokenize",
        "The text of token ids",
        tokens.DetokenizeReply,
        tokens.DetokenizeRequest,
        errors=(400, 404, 413, 503),
    ),
    Operation("get", "/v1/models", "The model that is served", replies.ModelList, errors=(503,)),
    Operation("get", "/v1/models/{id}", "One model", replies.ModelCard, errors=(404, 503)),
    Operation(
        "get",
        "/health",
        "Whether the engine is loaded, alive and making progress",
        replies.Status,
        also={503: "Loading, dead or stuck."},
    ),
    Operation(
        "get",
        "/ready",
        "Whether new requests are admitted",
        replies.Status,
        also={503: "Loading, draining or dead."},
    ),
    Operation("get", "/version", "The server's version", replies.Version),
    Operation(
        "get",
        "/v1/streams",
        "Every live request: its state, its reader's buffer; once, or as a stream of events",
        streams.StreamList,
        chunk=streams.StreamList,
        errors=(400, 503),
        query={"interval": streams.INTERVAL},
    ),
    Operation(
        "post",
        "/v1/streams/{id}/buffer",
        "Report how much of an answer its reader has read",
        streams.PlayedReply,
        streams.PlayedReport,
        errors=(400, 404, 413),
    ),
    Operation(
        "post",
        "/abort_request",
        "End a request that is under way",
        streams.AbortReply,
        streams.AbortBody,
        errors=(400, 404, 413),
    ),
    Operation("get", "/metrics", "What the server counts, for Prometheus", "text/plain"),
    Operation("get", "/", "A page to chat with and to watch every stream on", "text/html"),
)
"""Everything this document speaks of; it speaks of every address but its own."""

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/metrics"})
"""What is answered without a key: probes and scrapers have none, and the page asks for it."""

_POSITIVE = {"minimum": 1}
_TOKEN_IDS = {"items": {"type": "integer", "minimum": 0}}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}

_LIMITS: Mapping[str, Mapping[str, Any]] = {
    "max_tokens": _POSITIVE,
    "max_completion_tokens": _POSITIVE,
    "n": {"minimum": 1, "maximum": MAX_N},
    "best_of": {"minimum": 1, "maximum": MAX_N},
    "temperature": {"minimum": 0, "maximum": 2},
    "top_p": {"minimum": 0, "maximum": 1},
    "seed": {"description": "-1 is random."},
    "top_k": {"minimum": -1, "maximum": 2**31 - 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "repetition_penalty": {"minimum": 0.01, "maximum": 100},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "min_tokens": {"minimum": 0},
    "stop_token_ids": _TOKEN_IDS,
    "messages": {"minItems": 1},
    "chat_template_kwargs": {"description": "Variables that the model's chat template reads."},
    "tools": {"maxItems": MAX_TOOLS},
}
"""What the engine asks of fields beyond their types, by field name, where all bodies agree; it checks them itself."""

_OWN_LIMITS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("ChatRequest", "top_logprobs"): {"minimum": 0, "maximum": MAX_LOGPROBS},
    ("CompletionRequest", "logprobs"): {"minimum": 0, "maximum": MAX_LOGPROBS},
    ("CompletionRequest", "max_tokens"): {"minimum": 0, "description": "0 only with echo."},
    ("CompletionRequest", "max_completion_tokens"): {"minimum": 0, "description": "0 only with echo."},
    ("ChatMessage", "role"): {"enum": ["system", "developer", "user", "assistant", "tool"]},
    ("PlayedReport", "played_tokens"): {"minimum": 0},
    ("PlayedReport", "played_chars"): {"minimum": 0},
    ("DetokenizeRequest", "tokens"): {"items": {"type": "integer", "minimum": 0}},
}

_REPLACED: Mapping[str, Mapping[str, Any]] = {
    "stop": {
        "anyOf": [
            _STOP,
            {"type": "array", "items": _STOP, "maxItems": MAX_STOP},
            {"type": "null"},
        ]
    },
    "logit_bias": {
        "anyOf": [
            {
                "type": "object",
                "maxProperties": MAX_BIASED,
                "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,17})$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            },
            {"type": "null"},
        ]
    },
    "consumption_rate": {
        "description": "How fast the reader reads: tokens/s, or by name; null: nobody reads along.",
        "anyOf": [
            {"type": "number", "minimum": SLOWEST_RATE, "maximum": FASTEST_RATE},
            {"enum": ["listen", "read", "fast", "auto"]},
            {"type": "null"},
        ],
    },
    "tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required"]},
            {"$ref": _REF.format(name="NamedToolChoice")},
            {"type": "null"},
        ]
    },
    "prompt": {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
            {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            {
                "type": "array",
                "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                "minItems": 1,
                "maxItems": MAX_PROMPTS,
            },
        ]
    },
}
"""Fields of generation requests that are said better by hand."""


def document(model: str, *, with_keys: bool) -> dict[str, Any]:
    """The document of a server that serves `model`; `with_keys`: it asks for API keys."""
    components = _components(model)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        secured = with_keys and operation.path not in OPEN_PATHS
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, secured)
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "tfserve", "version": tfserve.__version__, "summary": "An OpenAI-compatible LLM server"},
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return result


def _described(operation: Operation, secured: bool) -> dict[str, Any]:
    good = _content(operation.reply)
    if operation.chunk is not None:
        events = f"Events whose data is a {operation.chunk.__name__} or an ErrorBody each; the last one's is [DONE]."
        # Without a type: OpenAPI 3.1 leaves open whether a schema is about the whole stream or about each event.
        good["text/event-stream"] = {"schema": {"description": events}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": good}}
    for status, meaning in operation.also.items():
        responses[str(status)] = {"description": meaning, "content": _content(operation.reply)}
    bodily = () if operation.body is None else (408, 415)
    for status in (*operation.errors, *bodily, *((401,) if secured else ())):
        content = {"application/json": {"schema": _ref(ErrorBody)}}
        responses[str(status)] = {"description": _MEANINGS[status], "content": content}
    described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.body is not None:
        content = {"application/json": {"schema": _ref(operation.body)}}
        described["requestBody"] = {"required": True, "content": content}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()
    ]
    if "{id}" in operation.path:
        parameters.append({"name": "id", "in": "path", "required": True, "schema": {"type": "string"}})
    if parameters:
        described["parameters"] = parameters
    if secured:
        described["security"] = [{"key": []}]
    return described


def _components(model: str) -> dict[str, Any]:
    """Every Struct that an operation mentions, with the limits that its types do not say."""
    mentioned: list[type] = [ErrorBody]
    for operation in OPERATIONS:
        mentioned += [each for each in (operation.reply, operation.body, operation.chunk) if isinstance(each, type)]
    _, components = msgspec.json.schema_components(list(dict.fromkeys(mentioned)), ref_template=_REF)
    bodies = {operation.body.__name__ for operation in OPERATIONS if operation.body is not None}
    generating = {ChatRequest.__name__, CompletionRequest.__name__}
    for name, schema in components.items():
        properties = schema.get("properties", {})
        for field_name, property in properties.items():
            if name in generating and field_name in _REPLACED:
                properties[field_name] = dict(_REPLACED[field_name])
                continue
            limits = dict(_LIMITS.get(field_name, {})) if name in bodies else {}
            limits |= _OWN_LIMITS.get((name, field_name), {})
            if name in bodies and field_name == "model":
                limits = {"enum": [model]}
            _limit(property, limits)
    return components


def _limit(property: dict[str, Any], limits: Mapping[str, Any]) -> None:
    """Add `limits` to a property, or to what it is if it is not null."""
    variants: Sequence[dict[str, Any]] = property.get("anyOf", [property])
    for variant in variants:
        if variant.get("type") != "null":
            variant.update(limits)


def _content(reply: type | str) -> dict[str, Any]:
    """What an answer is: JSON of a Struct, or text of some type."""
    if isinstance(reply, str):
        return {reply: {"schema": {"type": "string"}}}
    return {"application/json": {"schema": _ref(reply)}}


def _ref(struct: type) -> dict[str, str]:
    return {"$ref": _REF.format(name=struct.__name__)}
