"""Text to token ids and back, and conversations to prompts. Torch-free and quick to load: the HTTP process uses it.

Works on the Rust `tokenizers` library alone; a checkpoint without tokenizer.json needs the extra `convert-tokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from tfserve.errors import ModelError, RequestError, failures, panics_as_errors
from tfserve.install_hint import install_command
from tfserve.model.loading.config import ModelConfig
from tfserve.model.loading.fields import Fields, is_absent, one_line, read_fields, require_file, shown
from tfserve.model.text.added_tokens import add_missing_tokens, with_shown
from tfserve.model.text.chat_template import ChatTemplate, ToolFormat, read_chat_template
from tfserve.model.text.control_tokens import ControlTokens, PromptText
from tfserve.model.text.token_bytes import TokenBytes

ControlTokensInMessages = Literal["text", "allow"]
"""See ServerConfig."""

_PIECES_AT_ONCE = 1000

_LONG_TEXT_CHARS = 4096

_MAX_BYTES = 128 * 2**20
"""Largest file of a tokenizer; a vocabulary of 250,000 tokens takes about 35 MB."""

_TOKENIZER_SUFFIXES = frozenset((".json", ".txt", ".model", ".jinja"))

_MAX_CHARS_PER_TOKEN = 8
"""More characters per token are rare: English has four or five."""

_CUT_TOKENS = 16
"""More tokens than the cutting of a word or a special token can add."""

_MAX_GROWTH = 16
"""Largest growth of a text by the normalizer; most keep the length."""

_NAMED_TOKENS = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
"""Keys whose value is a token. Other keys with this ending may be flags, such as add_bos_token."""


class Tokenizer:
    """A checkpoint's tokenizer. Safe to use from several threads.

    `control_tokens_in_messages` decides how a control token in a message is encoded: as text, or (allow) as the token.
    `special_tokens` maps names such as "eos_token" to texts. `skip_special_tokens` skips `special_ids`; `special_texts`
    maps their texts to ids. `eos_token_ids` are the tokenizer's own end-of-sequence tokens; config.json and
    generation_config.json may name more.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None,
        eos_token_ids: Collection[int] = (),
        control_tokens_in_messages: ControlTokensInMessages = "text",
    ) -> None:
        # A checkpoint may contain truncation and padding from its training: switch both off.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self._bytes = TokenBytes(backend)
        self.special_tokens = dict(special_tokens)
        self.eos_token_ids = tuple(eos_token_ids)
        added = backend.get_added_tokens_decoder()
        self.special_texts = {token.content: token_id for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(self.special_texts.values())
        self._text_bytes = TokenBytes(backend, self.special_ids)
        normalize = None if backend.normalizer is None else backend.normalizer.normalize_str
        is_text = control_tokens_in_messages == "text"
        self._control = ControlTokens(added.values(), normalize) if is_text else None

    @classmethod
    def from_dir(cls, path: Path | str, control_tokens_in_messages: ControlTokensInMessages = "text") -> Tokenizer:
        """Load from a Hugging Face model directory. Raises ModelError naming the wrong file."""
        model_dir = Path(path)
        if not model_dir.is_dir():
            raise ModelError(f"{model_dir} is not a directory: give the directory that holds tokenizer.json")
        config = read_fields(model_dir / "tokenizer_config.json", optional=True)
        older = read_fields(model_dir / "special_tokens_map.json", optional=True)
        named = _special_tokens(older), _special_tokens(config)
        special_tokens = named[0] | named[1]
        source = model_dir / "tokenizer.json"
        defaults: dict[str, str] = {}
        if is_absent(source):
            backend, defaults = _convert(model_dir)
            special_tokens = defaults | special_tokens
        else:
            require_file(source, _MAX_BYTES)
            try:
                backend = Backend.from_file(str(source))
            except failures() as error:  # the library raises bare Exception
                raise ModelError(
                    f"{source} is not a tokenizer the `tokenizers` library can read: {one_line(error)}"
                ) from None
        _require_vocabulary(backend, source)
        _require_little_growth(backend, source)
        add_missing_tokens(backend, model_dir, config, [*named[0].values(), *named[1].values()])
        eos = [*_eos_token(backend, config), *_eos_token(backend, older)]
        eos = eos or _eos_token(backend, Fields(defaults, source))
        template = _chat_template(model_dir, config, special_tokens)
        if template is not None:
            # Some checkpoints call these tags special, but they are part of the answer's text.
            backend = with_shown(backend, template.answer_tags)
        return cls(backend, special_tokens, template, dict.fromkeys(eos), control_tokens_in_messages)

    @cached_property
    def vocab_size(self) -> int:
        """Highest token id + 1; the model's own vocabulary may be padded beyond it."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token among `special_tokens`."""
        token = self.special_tokens.get("eos_token")
        return None if token is None else self._backend.token_to_id(token)

    @property
    def leading_spaces(self) -> int:
        """Number of spaces that `decode` removes from the first token of a sequence (SentencePiece)."""
        return self._bytes.leading_spaces

    @property
    def tool_format(self) -> ToolFormat | None:
        """The format of tool calls by the chat template; None if it does not support tools."""
        return None if self._chat_template is None else self._chat_template.tool_format

    @property
    def thinks(self) -> bool:
        """True if the chat template separates reasoning from answers."""
        return self._chat_template is not None and self._chat_template.thinks

    @property
    def template_variables(self) -> frozenset[str]:
        """Variables that the chat template reads; empty without a template."""
        return frozenset() if self._chat_template is None else self._chat_template.variables

    def to_json(self) -> str:
        """The whole tokenizer in the format of tokenizer.json."""
        return self._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Text from `apply_chat_template` already has its special tokens: pass False for it.

        Special tokens in a text are encoded as such, except the ones that a PromptText cuts.
        Raises RequestError for text with half a surrogate pair.
        """
        try:
            with panics_as_errors("tokenising a text"):
                return self._encode(text, add_special_tokens)
        except TypeError:
            raise RequestError("prompt", "the prompt is not valid Unicode text") from None

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if isinstance(text, PromptText) and text.cuts:
            return self._encode_pieces(list(text.pieces()), add_special_tokens)
        if len(text) < _LONG_TEXT_CHARS:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        # `encode` holds the interpreter lock, for seconds with megabytes of text; the batch call releases it.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _encode_pieces(self, pieces: Sequence[str], add_special_tokens: bool) -> list[int]:
        """Ids of the pieces of one text, some at a time: the library's result for a piece takes a kilobyte."""
        if add_special_tokens:
            parts = self._backend.encode_batch(pieces, add_special_tokens=False)
            return self._backend.post_process(Encoding.merge(parts), add_special_tokens=True).ids
        ids: list[int] = []
        for start in range(0, len(pieces), _PIECES_AT_ONCE):
            for part in self._backend.encode_batch(pieces[start : start + _PIECES_AT_ONCE], add_special_tokens=False):
                ids += part.ids
        return ids

    def exceeds(self, text: str, most: int) -> bool:
        """True for a text of more than `most` tokens, found without tokenising all of it.

        The text is tokenised piece by piece until the result is known: tokenising takes a hundred bytes per character.
        Raises RequestError as `encode` does.
        """
        if len(text) <= _MAX_CHARS_PER_TOKEN * most:
            return False
        num_tokens, begin = 0, 0
        while begin < len(text) and num_tokens <= most:
            end = _piece_end(text, begin + max(4 * most, _LONG_TEXT_CHARS))
            # Subtract the tokens that the cuts may have added.
            num_tokens += len(self.encode(text[begin:end], add_special_tokens=False)) - _CUT_TOKENS
            begin = end
        return num_tokens > most

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; invalid UTF-8 becomes U+FFFD."""
        with panics_as_errors("decoding tokens"):
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token. They may be part of a UTF-8 character; empty for an id without a token."""
        return self._bytes[token_id]

    def bytes_table(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """`token_bytes` as a mapping, for speed; with `skip_special_tokens` special tokens are empty in it."""
        return self._text_bytes if skip_special_tokens else self._bytes

    def token_str(self, token_id: int) -> str:
        """One token for display: a partial character shows as U+FFFD; `token_bytes` is exact."""
        return self._bytes[token_id].decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> PromptText:
        """The prompt text of a conversation, ready for the assistant's answer; `kwargs` reach the template.

        Control tokens in the messages and in `kwargs` are encoded as text, unless they are allowed.
        Raises RequestError if the model has no template, and for content that is not text or that the template rejects.
        """
        if self._chat_template is None:
            raise RequestError(
                "messages", "this model has no chat template; use /v1/completions, or add chat_template.jinja to it"
            )
        template = self._chat_template

        def render(request: Any) -> str:
            return template.render(request["messages"], add_generation_prompt, **request["kwargs"])

        request = {"messages": messages, "kwargs": kwargs}
        if self._control is None:
            return PromptText(render(request))
        return self._control.keep_text(render, request, template.source)


def _piece_end(text: str, end: int) -> int:
    """End of a piece of at most `end` characters: before its last space, if one is near."""
    space = text.rfind(" ", end - 1024, end) if end < len(text) else -1
    return end if space < 0 else space


def all_eos_token_ids(config: ModelConfig, tokenizer: Tokenizer, model_dir: Path) -> tuple[int, ...]:
    """Every token that ends an answer of the model in `model_dir`: from its two configs and its tokenizer.

    Raises ModelError for a token that the model has no embedding for: it can never be sampled.
    """
    for token in tokenizer.eos_token_ids:
        if token >= config.vocab_size:
            name = shown(tokenizer.token_str(token))
            file = "tokenizer_config.json" if token == tokenizer.eos_token_id else "special_tokens_map.json"
            raise ModelError(
                f"{model_dir / file}: eos_token {name} has id {token}, beyond vocab_size {config.vocab_size} of "
                "config.json: the files are of different models"
            )
    return tuple(dict.fromkeys((*config.eos_token_ids, *tokenizer.eos_token_ids)))


def _special_tokens(fields: Fields) -> dict[str, str]:
    """Entries such as "eos_token"; the value is the text or a serialised AddedToken."""
    tokens = {}
    for name in fields:
        if name in _NAMED_TOKENS or (name.endswith("_token") and isinstance(fields.value(name), str | dict)):
            text = _token_text(fields, name)
            if text is not None:
                tokens[name] = text
    return tokens


def _token_text(fields: Fields, name: str) -> str | None:
    if isinstance(fields.value(name), dict):
        return fields.section(name).text("content")
    return fields.text(name) if name in fields else None


def _chat_template(model_dir: Path, config: Fields, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    found = read_chat_template(model_dir, config)
    if found is None:
        return None
    text, origin = found
    try:
        return ChatTemplate(text, special_tokens)
    except ModelError as error:
        raise ModelError(f"{origin}: {one_line(error)}") from None


def _eos_token(backend: Backend, fields: Fields) -> list[int]:
    """The end-of-sequence token that a file names: one or none."""
    text = _token_text(fields, "eos_token")
    if not text:
        return []
    token_id = backend.token_to_id(text)
    if token_id is None:
        raise fields.error(f"eos_token {shown(text)} is no token of tokenizer.json: correct it, or remove it")
    return [token_id]


def _require_vocabulary(backend: Backend, source: Path) -> None:
    """Refuse a tokenizer with added tokens only: transformers makes one from a directory without a vocabulary."""
    if backend.get_vocab().keys() <= {token.content for token in backend.get_added_tokens_decoder().values()}:
        if is_absent(source):
            raise ModelError(f"{source.parent} has no tokenizer.json, and no other file with a vocabulary; add it")
        raise ModelError(f"{source} holds no vocabulary; download it again")


def _require_little_growth(backend: Backend, source: Path) -> None:
    """Refuse a normalizer that makes a text many times longer: a short prompt could take all memory."""
    if backend.normalizer is None:
        return
    growth, left = 1, [json.loads(backend.normalizer.__getstate__())]
    while left:
        step = left.pop()
        left += step.get("normalizers", ())
        growth *= max(len(step.get("content", "")), len(step.get("prepend", "")), 1)
    if growth > _MAX_GROWTH:
        raise ModelError(f"{source}: its normalizer can make a text more than {_MAX_GROWTH} times as long; correct it")


def _convert(model_dir: Path) -> tuple[Backend, dict[str, str]]:
    """Let transformers build the tokenizer from older files (vocab.json and merges.txt, tokenizer.model)."""
    for path in model_dir.iterdir():
        if path.suffix in _TOKENIZER_SUFFIXES:
            require_file(path, _MAX_BYTES)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        how = install_command("convert-tokenizer")
        raise ModelError(f"{model_dir} has no tokenizer.json, and only transformers can make one: {how}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        return tokenizer.backend_tokenizer, _special_tokens(Fields(tokenizer.special_tokens_map, model_dir))
    except failures() as error:  # a dozen types are possible, depending on what is missing
        raise ModelError(
            f"{model_dir} has no tokenizer.json, and transformers cannot make one from its other files: "
            f"{one_line(error)}"
        ) from None
