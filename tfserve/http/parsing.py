"""Bytes of a request body to a Struct, with errors that name the field and say what it should be."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from tfserve.errors import NOT_JSON, RequestError
from tfserve.http.protocol import ChatRequest, CompletionRequest
from tfserve.misfit import NotJsonError, find_misfit, plain_json

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
        self._struct = struct
        self._decoder = msgspec.json.Decoder(struct)
        self._fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
        self._known = frozenset(struct.__struct_fields__)
        self._unsupported = unsupported
        self._logged: set[str] = set()

    def parse(self, body: bytes) -> Body:
        """The request in `body`. Raises RequestError for bad JSON, bad types and unsupported fields."""
        try:
            fields = self._fields.decode(body)
            for name in fields.keys() - self._known:
                self._check_extra(name, fields[name])
            return self._decoder.decode(body)
        except NOT_JSON:
            raise self._refusal(body) from None

    def _refusal(self, body: bytes) -> RequestError:
        """What is wrong with a body that was refused, and the name of the field if it is one field."""
        try:
            misfit = find_misfit(plain_json(body), self._struct)
        except NotJsonError as error:
            name = self._undecodable(body)
            return RequestError(name, f"{name or 'The body'} {error}", "invalid_json")
        if misfit is None:
            return RequestError(None, "The body does not have the form of this endpoint's requests; see /openapi.json")
        return RequestError(misfit.path or None, str(misfit) if misfit.path else f"The body {misfit}")

    def _undecodable(self, body: bytes) -> str | None:
        """The first field whose value is no plain JSON; None if the body as a whole is none."""
        with contextlib.suppress(*NOT_JSON):
            for name, raw in self._fields.decode(body).items():
                try:
                    plain_json(bytes(raw))
                except NotJsonError:
                    return name
        return None

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
