"""Bytes of a request body to a Struct, with errors that name the field and say what it should be."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from tfserve.errors import RequestError
from tfserve.http.protocol import ChatRequest, CompletionRequest
from tfserve.strict_json import mend

log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=msgspec.Struct)

HINTS = frozenset(
    {
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    }
)
"""OpenAI fields that are about billing, caching or bookkeeping and change nothing in an answer."""

CHAT_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "store": (False,),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
}
"""OpenAI fields that are known and not supported, with the values (beside null) that ask for nothing."""

COMPLETION_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
}

MAX_REMEMBERED = 256
"""Unknown field names remembered so as to log each once; clients choose them, so there is an end."""


class BodyParser(Generic[Body]):
    """Decodes one endpoint's bodies; remembers the unknown fields it has logged."""

    def __init__(self, struct: type[Body], unsupported: Mapping[str, tuple[object, ...]]) -> None:
        self._decoder = msgspec.json.Decoder(struct)
        self._fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
        self._known = frozenset(struct.__struct_fields__)
        self._unsupported = unsupported
        self._logged: set[str] = set()

    def parse(self, body: bytes) -> Body:
        """The request in `body`. Raises RequestError for bad JSON, bad types and unsupported fields."""
        try:
            body = mend(body)
            fields = self._fields.decode(body)
            for name in fields.keys() - self._known:
                self._check_extra(name, fields[name])
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _type_error(str(error)) from None
        except msgspec.DecodeError as error:
            raise RequestError(None, f"The body is not valid JSON: {error}", "invalid_json") from None
        except RecursionError:
            raise RequestError(None, "The body is nested too deeply", "invalid_json") from None
        except UnicodeDecodeError as error:
            raise RequestError(None, f"The body is not valid UTF-8: {error.reason}", "invalid_json") from None

    def _check_extra(self, name: str, raw: msgspec.Raw) -> None:
        if name not in self._unsupported:
            self._log_unknown(name)
            return
        value: Any = msgspec.json.decode(raw)
        if value is None or value in self._unsupported[name]:
            return
        harmless = [msgspec.json.encode(value).decode() for value in self._unsupported[name]]
        wish = f"remove it or send {' or '.join(harmless)}" if harmless else "remove it"
        raise RequestError(name, f"{name}: this value is not supported by this server; {wish}", "unsupported_parameter")

    def _log_unknown(self, name: str) -> None:
        if name in HINTS or name in self._logged or len(self._logged) >= MAX_REMEMBERED:
            return
        self._logged.add(name)
        log.info("Ignoring the unknown request field %.80r (logged once)", name)


def chat_parser() -> BodyParser[ChatRequest]:
    """The parser of /v1/chat/completions."""
    return BodyParser(ChatRequest, CHAT_UNSUPPORTED)


def completion_parser() -> BodyParser[CompletionRequest]:
    """The parser of /v1/completions."""
    return BodyParser(CompletionRequest, COMPLETION_UNSUPPORTED)


_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _type_error(message: str) -> RequestError:
    """msgspec's validation message, in the words and with the field name of the client's JSON."""
    if missing := re.search(r"missing required field `(\w+)`", message):
        inside = _path(message)
        name = f"{inside}.{missing[1]}" if inside else missing[1]
        return RequestError(name, f"{name} is required")
    name = _path(message)
    types = re.match(r"Expected `([^`]+)`, got `([^`]+)`", message)
    if types is None:
        return RequestError(name, f"{name}: {message.partition(' - at ')[0]}")
    expected = " or ".join(_WORDS.get(word, word) for word in types[1].split(" | ") if word != "null")
    subject = name or "The body"
    return RequestError(name, f"{subject} must be {expected}, got {_WORDS.get(types[2], types[2])}")


def _path(message: str) -> str | None:
    found = re.search(r"`\$\.?([^`]*)`$", message)
    return found[1] or None if found else None
