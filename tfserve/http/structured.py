"""`response_format`: answers that are JSON, any or by a schema."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tfserve.engine.frontend.validation import require_grammars
from tfserve.errors import RequestError
from tfserve.http.off_loop import schema_off_loop
from tfserve.model.grammars.grammar import check_grammar_beside, json_schema_grammar
from tfserve.types import EngineInfo, Tenant


class JsonSchema(msgspec.Struct, kw_only=True):
    """A JSON schema with a name. It always holds, whether `strict` or not."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """What an answer must look like: any text, any JSON object, or JSON by a schema.

    `schema` is that of a json_object, as for llama.cpp and Together, or stands for `json_schema.schema`.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None

    def grammar(self) -> str | None:
        """The grammar that the answer must follow; None for text. Raises RequestError."""
        if self.json_schema is not None and self.type != "json_schema":
            name = "response_format.json_schema"
            raise RequestError(name, f"{name} needs the type json_schema, got {self.type}")
        if self.schema is not None and (self.type == "text" or self.json_schema is not None):
            name = "response_format.schema"
            raise RequestError(name, f"{name} needs the type json_object, or json_schema without json_schema.schema")
        if self.type == "text":
            return None
        if self.type == "json_object":
            return json_schema_grammar(self.schema or {"type": "object"}, "response_format")
        schema = self.schema if self.json_schema is None else self.json_schema.schema
        if schema is None:
            name = "response_format.json_schema" + ("" if self.json_schema is None else ".schema")
            raise RequestError(name, f"{name} is required for the type json_schema")
        return json_schema_grammar(schema, "response_format")


async def response_grammar(asked: ResponseFormat | None, info: EngineInfo, tenant: Tenant) -> str | None:
    """The grammar of a request's format, checked; None for text. Raises RequestError, QueueFullError."""
    if asked is None:
        return None
    # In a thread: a large schema is walked through, and the streams go on.
    grammar = await schema_off_loop(asked.grammar)
    if grammar is not None:
        await check_grammar_beside(grammar, "response_format", tenant.name)
        require_grammars(info, "response_format")
    return grammar
