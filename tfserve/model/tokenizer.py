"""Text to token ids and back, and conversations to prompts. Torch-free and quick to load: the HTTP process uses it.

Works on the Rust `tokenizers` library alone; a checkpoint without tokenizer.json needs the extra `convert-tokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from tfserve.errors import ModelError, RequestError
from tfserve.install_hint import install_command
from tfserve.model.chat_template import ChatTemplate, ToolFormat, read_chat_template
from tfserve.model.token_bytes import TokenBytes

_LONG_TEXT_CHARS = 16_384


class Tokenizer:
    """A checkpoint's tokenizer. Safe to use from several threads.

    `special_tokens` maps names as "eos_token" to texts; `special_ids` are what `skip_special_tokens` leaves out.
    """

    def __init__(self, backend: Backend, special_tokens: Mapping[str, str], chat_template: ChatTemplate | None) -> None:
        # A checkpoint may carry its training's truncation and padding: a prompt must be neither.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self._bytes = TokenBytes(backend)
        self.special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._text_bytes = TokenBytes(backend, self.special_ids)

    @classmethod
    def from_dir(cls, path: Path | str) -> Tokenizer:
        """Load from a Hugging Face model directory. Raises ModelError naming the file that cannot be used."""
        model_dir = Path(path)
        if not model_dir.is_dir():
            raise ModelError(f"{model_dir} is not a directory: give the directory that holds tokenizer.json")
        config = _read_json(model_dir / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(model_dir / "special_tokens_map.json")) | _special_tokens(config)
        source = model_dir / "tokenizer.json"
        if source.exists():
            try:
                backend = Backend.from_file(str(source))
            except Exception as error:  # the library raises bare Exception
                raise ModelError(f"{source} is not a tokenizer the `tokenizers` library can read: {error}") from None
        else:
            backend, defaults = _convert(model_dir)
            special_tokens = defaults | special_tokens
        template = read_chat_template(model_dir, config)
        return cls(backend, special_tokens, ChatTemplate(template, special_tokens) if template else None)

    @cached_property
    def vocab_size(self) -> int:
        """Highest token id + 1; the model's own vocabulary may be padded beyond it."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence token; a checkpoint's generation_config.json may name more."""
        token = self.special_tokens.get("eos_token")
        return None if token is None else self._backend.token_to_id(token)

    @property
    def leading_spaces(self) -> int:
        """How many spaces `decode` drops from the first token of a sequence (SentencePiece)."""
        return self._bytes.leading_spaces

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model is told to write tool calls; None if its chat template shows no tools."""
        return None if self._chat_template is None else self._chat_template.tool_format

    def to_json(self) -> str:
        """The whole tokenizer in the format of tokenizer.json."""
        return self._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; text from `apply_chat_template` has its special tokens already: pass False for it."""
        if len(text) < _LONG_TEXT_CHARS:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        # `encode` keeps the interpreter lock for seconds on megabytes of text; the batch call gives it up.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; may be part of a UTF-8 character, and empty for an id without a token."""
        return self._bytes[token_id]

    def bytes_table(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """`token_bytes` of every id as a mapping, for speed; in it special tokens are empty if they are skipped."""
        return self._text_bytes if skip_special_tokens else self._bytes

    def token_str(self, token_id: int) -> str:
        """One token for display: a partial character shows as U+FFFD; `token_bytes` is exact."""
        return self._bytes[token_id].decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt text of a conversation, ready for the assistant's answer; `kwargs` reach the template.

        Raises RequestError if the model has no template, and for content that is no text or that the template rejects.
        """
        if self._chat_template is None:
            raise RequestError(
                "messages", "this model has no chat template; use /v1/completions, or add chat_template.jinja to it"
            )
        return self._chat_template.render(messages, add_generation_prompt, **kwargs)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Entries as "eos_token", whose value is the text itself or a serialised AddedToken."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _convert(model_dir: Path) -> tuple[Backend, dict[str, str]]:
    """Let transformers build the tokenizer from older files (vocab.json and merges.txt, tokenizer.model)."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        how = install_command("convert-tokenizer")
        raise ModelError(f"{model_dir} has no tokenizer.json, and only transformers can make one: {how}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        return tokenizer.backend_tokenizer, _special_tokens(tokenizer.special_tokens_map)
    except Exception as error:  # any of a dozen types, by what is missing
        raise ModelError(
            f"{model_dir} has no tokenizer.json, and transformers cannot make one from its other files: {error}"
        ) from None
