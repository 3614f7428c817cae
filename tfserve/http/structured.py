"""`response_format`: answers that are JSON, any or by a schema."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tfserve.errors import RequestError
from tfserve.model.grammar import json_schema_grammar


class JsonSchema(msgspec.Struct, kw_only=True):
    """A JSON schema with a name. It always holds, whether `strict` or not."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """What an answer must look like: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> str | None:
        """The grammar that the answer must follow; None for text. Raises RequestError."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return json_schema_grammar({"type": "object"}, "response_format")
        if self.json_schema is None or self.json_schema.schema is None:
            name = "response_format.json_schema" + ("" if self.json_schema is None else ".schema")
            raise RequestError(name, f"{name} is required for the type json_schema")
        return json_schema_grammar(self.json_schema.schema, "response_format")
