"""Rebuilds the tokenizer of a GGUF file as Hugging Face `tokenizer.json` and `tokenizer_config.json`.

Built with the `tokenizers` library from the stored tokens, merges and token types. The GGUF conversion of transformers
loses the pre-tokenizer, which GGUF stores only as a name (`tokenizer.ggml.pre`): SmolLM2 would then split numbers
wrongly.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tfserve.errors import ModelError, failures
from tfserve.model.gguf.file import GgufFile
from tfserve.model.loading.fields import one_line, shown


class TokenType(enum.IntEnum):
    """Values of `tokenizer.ggml.token_type` (llama.cpp's `llama_token_type`) that matter for byte-level BPE."""

    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True, slots=True)
class Splitter:
    """The pre-tokenizer of a `tokenizer.ggml.pre` name."""

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _words(letters: str, max_digits: str, symbol_end: str = "") -> Callable[[], pre_tokenizers.PreTokenizer]:
    """The pre-tokenizer of newer models.

    Parameters: the pattern for runs of letters, the number of digits in a group, and what may end a run of symbols.
    """
    pattern = rf"{letters}|\p{{N}}{max_digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{symbol_end}]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_WHOLE_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

_LLAMA3 = Splitter(_words(_WHOLE_WORDS, "{1,3}"), ignore_merges=True, add_bos=True)
_QWEN2 = Splitter(_words(_WHOLE_WORDS, ""), nfc=True)

SPLITTERS = {
    "gpt-2": Splitter(_gpt2),
    "smollm": Splitter(_digits_then_gpt2),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": Splitter(_words(_CAMEL_WORDS, "", "/"), ignore_merges=True, add_bos=True),
}
"""By `tokenizer.ggml.pre`. "default" is not supported: the converter did not know the pre-tokenizer."""


def build_tokenizer(source: GgufFile) -> Tokenizer:
    """Rebuild the tokenizer of a GGUF file; ids equal the file's. Raises ModelError for kinds it does not know."""
    splitter = _splitter(source)
    tokens = source.fields.texts("tokenizer.ggml.tokens")
    has_types = "tokenizer.ggml.token_type" in source.fields
    types = source.fields.integers("tokenizer.ggml.token_type") if has_types else [1] * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(f"{source.path} holds {len(tokens)} tokens but {len(types)} token types; it is damaged")
    merges = [_merge(source, text) for text in source.fields.texts("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}

    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=splitter.ignore_merges)
    except failures() as error:  # the library raises bare Exception
        raise ModelError(f"{source.path}: its tokens and merges do not fit together ({one_line(error)})") from None
    tokenizer = Tokenizer(model)
    if splitter.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(source, tokens, splitter)
    special = [_verbatim(token) for i, token in enumerate(tokens) if types[i] == TokenType.CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([_verbatim(token) for i, token in enumerate(tokens) if types[i] == TokenType.USER_DEFINED])
    return tokenizer


def _merge(source: GgufFile, text: str) -> tuple[str, str]:
    cut = text.find(" ", 1)  # from 1 on: the first half of a merge may begin with a space
    if cut < 0:
        raise source.fields.error(f"tokenizer.ggml.merges must hold pairs parted by a space, got {shown(text)}")
    return text[:cut], text[cut + 1 :]


def write_tokenizer(source: GgufFile, out_dir: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template, if there is one) into `out_dir`."""
    build_tokenizer(source).save(str(out_dir / "tokenizer.json"))
    (out_dir / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(source), indent=2, ensure_ascii=False))


def _splitter(source: GgufFile) -> Splitter:
    kind = source.fields.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(
            f"{source.path} has a tokenizer of kind {kind!r} (SentencePiece, as in Llama 2); only byte-level BPE "
            "('gpt2', as in Llama 3, Qwen and Mistral Nemo) can be imported: use its Hugging Face checkpoint instead"
        )
    pre = source.fields.text("tokenizer.ggml.pre", "default")
    if pre not in SPLITTERS:
        raise ModelError(
            f"{source.path}: tokenizer.ggml.pre is {pre!r}; known are {', '.join(sorted(SPLITTERS))}. Text would be "
            "cut wrongly with a guess: use the model's Hugging Face checkpoint, or a GGUF file that names one of these"
        )
    return SPLITTERS[pre]


def _verbatim(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _adds_bos(source: GgufFile, splitter: Splitter) -> bool:
    key = "tokenizer.ggml.add_bos_token"
    return source.fields.flag(key) if key in source.fields else splitter.add_bos


def _post_processor(source: GgufFile, tokens: list[str], splitter: Splitter) -> processors.PostProcessor:
    byte_level = processors.ByteLevel(trim_offsets=False)
    named = source.fields.token_ids("tokenizer.ggml.bos_token_id", len(tokens))
    if not named or not _adds_bos(source, splitter):
        return byte_level
    bos_id, bos = named[0], tokens[named[0]]
    template = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
    )
    return processors.Sequence([byte_level, template])


def _tokenizer_config(source: GgufFile) -> dict[str, Any]:
    fields = source.fields
    tokens = fields.texts("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.integer(source.key("context_length")),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        for token_id in fields.token_ids(f"tokenizer.ggml.{key}_token_id", len(tokens)):
            config[f"{name}_token"] = tokens[token_id]
    template = fields.text("tokenizer.chat_template", "")
    if template:
        config["chat_template"] = template
    return config
