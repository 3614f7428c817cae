"""Added tokens that a checkpoint defines outside its tokenizer.json. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tfserve.errors import ModelError
from tfserve.model.loading.fields import Fields, is_text, read_fields, shown


def add_missing_tokens(backend: Backend, model_dir: Path, config: Fields, special: Collection[str]) -> None:
    """Add to `backend` the tokens that are only in `config` (tokenizer_config.json) or in added_tokens.json.

    `special` are texts of special tokens. Raises ModelError if a token would get another id than its file says: the
    model is trained with that id. Source: PreTrainedTokenizerBase._from_pretrained of transformers.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    special = {*special, *_extra_special_tokens(config)}
    missing: dict[str, tuple[int, AddedToken, str]] = {}  # by text: id, token, file
    for token_id, token, origin in (*_decoder_tokens(config), *_file_tokens(model_dir, special)):
        if token.content not in known:
            missing.setdefault(token.content, (token_id, token, origin))
    ordered = sorted(missing.values(), key=lambda entry: entry[0])
    backend.add_tokens([token for _, token, _ in ordered])
    for token_id, token, origin in ordered:
        got = backend.token_to_id(token.content)
        if got != token_id:
            raise ModelError(
                f"{origin}: token {shown(token.content)} has id {token_id} there, but tokenizer.json gives it {got}: "
                "the files are of different models"
            )


def with_shown(backend: Backend, texts: Collection[str]) -> Backend:
    """A tokenizer in which the tokens with these texts are not special, so that decoding never skips them.

    `backend` itself if none of them is special. Otherwise a copy: the library cannot change an existing token.
    """
    added = backend.get_added_tokens_decoder().values()
    if not any(token.special and token.content in texts for token in added):
        return backend
    fields = json.loads(backend.to_str())
    for token in fields["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in texts
    return Backend.from_str(json.dumps(fields))


def _decoder_tokens(config: Fields) -> Iterator[tuple[int, AddedToken, str]]:
    """`added_tokens_decoder` of tokenizer_config.json: serialised tokens by id."""
    table = config.section("added_tokens_decoder")
    for key in table:
        entry = table.section(key)
        if not key.isdecimal() or len(key) > 9:
            raise table.error(f"{shown(key)} must be a token id")
        special = entry.flag("special")
        token = AddedToken(
            entry.text("content"),
            single_word=entry.flag("single_word"),
            lstrip=entry.flag("lstrip"),
            rstrip=entry.flag("rstrip"),
            normalized=entry.flag("normalized") if "normalized" in entry else not special,
            special=special,
        )
        yield int(key), token, f"{config.source}: added_tokens_decoder"


def _file_tokens(model_dir: Path, special: Collection[str]) -> Iterator[tuple[int, AddedToken, str]]:
    """added_tokens.json: ids by text."""
    table = read_fields(model_dir / "added_tokens.json", optional=True)
    for text in table:
        if not is_text(text):
            raise table.error(f"{shown(text)} must be text, without half a surrogate pair")
        token_id = table.integer(text, least=0)
        yield token_id, AddedToken(text, normalized=text not in special, special=text in special), str(table.source)


def _extra_special_tokens(config: Fields) -> Iterator[str]:
    """Texts of the additional special tokens, which have no name such as `eos_token`."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        stored = config.value(key)
        entries = stored if isinstance(stored, list) else stored.values() if isinstance(stored, dict) else ()
        for entry in entries:
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                yield text
