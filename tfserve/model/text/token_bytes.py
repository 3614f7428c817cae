"""The bytes of each token: a tokenizer's decoder, applied token by token. Torch-free.

The `tokenizers` library decodes whole sequences. Every decoder of Llama and Qwen checkpoints is equivalent to a table
from token to bytes. With it, text is decoded in linear time, and a token's bytes can be returned with its log
probability.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from tfserve.errors import ModelError, panics_as_errors

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_KNOWN = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}


class TokenBytes(dict[int, bytes]):
    """Bytes of each token of `backend`; the text of a sequence is their concatenation, decoded as UTF-8.

    Look a token up by `[]`; results are cached. Empty for an id without a token (padded vocabularies), and for ids in
    `left_out`.

    Knows byte-level BPE (Llama 3, Qwen2) and the SentencePiece decoders (Metaspace; Replace, ByteFallback, Fuse, Strip)
    and raises ModelError for others. `leading_spaces` is the number of spaces that are removed from a sequence's first
    token.
    """

    def __init__(self, backend: Backend, left_out: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self._left_out = left_out
        self._backend = backend
        steps = _decoder_steps(backend)
        kinds = {step["type"] for step in steps}
        if not kinds or not kinds <= _KNOWN or ("ByteLevel" in kinds and len(kinds - {"Fuse"}) > 1):
            found = ", ".join(str(step["type"]) for step in steps) or "none"
            raise ModelError(
                f"tokenizer.json: its decoder ({found}) is not one this server can stream; "
                "it knows ByteLevel, Metaspace, and Replace + ByteFallback + Fuse + Strip"
            )
        self._byte_of_char = _byte_level_chars() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._replaced = [pair for step in steps for pair in _replacements(step)]
        self.leading_spaces = sum(_leading_spaces(step) for step in steps)

    def __missing__(self, token_id: int) -> bytes:
        data = self[token_id] = self._compute(token_id)
        return data

    def _compute(self, token_id: int) -> bytes:
        known = token_id >= 0 and token_id not in self._left_out
        with panics_as_errors("decoding a token"):
            token = self._backend.id_to_token(token_id) if known else None
        if token is None:
            return b""
        if self._byte_of_char is not None:
            try:
                return bytes([self._byte_of_char[char] for char in token])
            except KeyError:  # an added token with other characters, as DeepSeek's
                return token.encode()
        for pattern, content in self._replaced:
            token = token.replace(pattern, content)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()


def _decoder_steps(backend: Backend) -> list[Mapping[str, Any]]:
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    steps: list[Mapping[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _replacements(step: Mapping[str, Any]) -> list[tuple[str, str]]:
    if step["type"] == "Metaspace":
        return [(step["replacement"], " ")]
    if step["type"] != "Replace":
        return []
    pattern = step["pattern"].get("String")
    if pattern is None:
        raise ModelError("tokenizer.json: its decoder replaces a regular expression, which this server cannot stream")
    return [(pattern, step["content"])]


def _leading_spaces(step: Mapping[str, Any]) -> int:
    if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
        return 1 << 30  # all bytes of the first token
    if step["type"] == "Strip" and step["content"] == " ":
        return int(step["start"])
    return 0


def _byte_level_chars() -> dict[str, int]:
    """GPT-2's printable character for each byte: printable Latin-1 unchanged, the others from U+0100 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    table = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = (byte for byte in range(256) if byte not in table.values())
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table
