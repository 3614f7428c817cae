"""Bytes of a request body to a Struct, with errors that name the field and say what it should be."""

from __future__ import annotations

import codecs
import contextlib
import logging
import re
from typing import Any, Generic, TypeVar

import msgspec

from tfserve.errors import NOT_JSON, RequestError
from tfserve.http.known_fields import Fields
from tfserve.http.off_loop import rest
from tfserve.http.parts import MAX_PARTS, num_parts
from tfserve.http.shapes import body_fix
from tfserve.misfit import NotJsonError, find_misfit, plain_json
from tfserve.strict_json import deepest, mend

log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=msgspec.Struct)

MAX_REMEMBERED = 256
"""Unknown field names remembered so as to log each once; clients choose them, so there is an end."""

_LONGEST_NAME = 80
"""Characters of such a name that are remembered and logged: a client may send one as long as a body."""


class BodyParser(Generic[Body]):
    """Decodes one endpoint's bodies. `fields` are known fields of other servers. An unknown field is logged once."""

    def __init__(self, struct: type[Body], fields: Fields) -> None:
        self._struct = struct
        self._raw = msgspec.json.Decoder(dict[str, msgspec.Raw])
        self._fix = body_fix(struct, fields, self._log_unknown)
        self._logged: set[str] = set()

    def parse(self, body: bytes) -> Body:
        """The request in `body`. Raises RequestError for bad JSON, bad types and unsupported fields.

        Takes time in proportion to the body: one that may be long is parsed `off_loop`.
        """
        if num_parts(body, MAX_PARTS) > MAX_PARTS:
            raise RequestError(None, f"The body holds more than {MAX_PARTS} objects, lists and fields; send fewer")
        value = self._decode(mend(body.removeprefix(codecs.BOM_UTF8)))
        try:
            rest()
            value = self._fix(value, "")
            rest()
            try:
                return msgspec.convert(value, self._struct, str_keys=True)
            except msgspec.ValidationError:
                raise self._refusal(value) from None
        except RecursionError:  # decoded with few levels of the stack to spare
            name = deepest(value)
            raise RequestError(name, f"{name or 'The body'} is nested too deeply", "invalid_json") from None

    def _decode(self, body: bytes) -> Any:
        try:
            return plain_json(body)
        except NotJsonError as error:
            name = self._undecodable(body)
            raise RequestError(name, f"{name or 'The body'} {error}", "invalid_json") from None

    def _undecodable(self, body: bytes) -> str | None:
        """The first field whose value is no plain JSON; None if the body as a whole is none."""
        with contextlib.suppress(*NOT_JSON):
            for name, raw in self._raw.decode(body).items():
                try:
                    plain_json(bytes(raw))
                except NotJsonError:
                    return name
        return None

    def _refusal(self, value: Any) -> RequestError:
        """What is wrong with a body that does not fit, and the name of the field if it is one field."""
        misfit = find_misfit(value, self._struct)
        if misfit is None:
            return RequestError(None, "The body does not have the form of this endpoint's requests; see /openapi.json")
        return RequestError(misfit.path or None, str(misfit) if misfit.path else f"The body {misfit}")

    def _log_unknown(self, name: str) -> None:
        name = re.sub(r"\[\d+\]", "[]", name[:_LONGEST_NAME])
        if name not in self._logged and len(self._logged) < MAX_REMEMBERED:
            self._logged.add(name)
            log.info("Ignoring the unknown request field %.80r (logged once)", name)
