"""Bytes of a request body to a Struct, with errors that name the field and say what it should be."""

from __future__ import annotations

import codecs
import logging
import re
from typing import Generic, TypeVar

import msgspec

from tfserve.errors import RequestError
from tfserve.http.known_fields import Fields
from tfserve.http.shapes import body_fix

log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=msgspec.Struct)

MAX_REMEMBERED = 256
"""Unknown field names remembered so as to log each once; clients choose them, so there is an end."""


class BodyParser(Generic[Body]):
    """Decodes one endpoint's bodies; remembers the unknown fields it has logged. `fields` are those of others."""

    def __init__(self, struct: type[Body], fields: Fields) -> None:
        self._struct = struct
        self._fix = body_fix(struct, fields, self._log_unknown)
        self._logged: set[str] = set()

    def parse(self, body: bytes) -> Body:
        """The request in `body`. Raises RequestError for bad JSON, bad types and unsupported fields."""
        try:
            value = msgspec.json.decode(body.removeprefix(codecs.BOM_UTF8))
            return msgspec.convert(self._fix(value, ""), self._struct, str_keys=True)
        except msgspec.ValidationError as error:
            raise _type_error(str(error)) from None
        except msgspec.DecodeError as error:
            raise RequestError(None, f"The body is not valid JSON: {error}", "invalid_json") from None
        except RecursionError:
            raise RequestError(None, "The body is nested too deeply", "invalid_json") from None
        except UnicodeDecodeError as error:
            raise RequestError(None, f"The body is not valid UTF-8: {error.reason}", "invalid_json") from None

    def _log_unknown(self, name: str) -> None:
        name = re.sub(r"\[\d+\]", "[]", name)
        if name not in self._logged and len(self._logged) < MAX_REMEMBERED:
            self._logged.add(name)
            log.info("Ignoring the unknown request field %.80r (logged once)", name)


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
    subject = _part(message) + (name or "The body")
    return RequestError(name, f"{subject} must be {expected}, got {_WORDS.get(types[2], types[2])}")


def _path(message: str) -> str | None:
    """The field, as a client can name it: msgspec writes `[...]` for the values of a mapping."""
    found = re.search(r"`\$\.?([^`]*)`$", message)
    return found[1].replace("[...]", "") or None if found else None


def _part(message: str) -> str:
    """Which part of a mapping's field is wrong; nothing where it is the field itself."""
    if " - at `key` in `" in message:
        return "each key of "
    return "each value of " if message.endswith("[...]`") else ""
