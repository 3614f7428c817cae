"""A small real tokenizer for tests, written as a Hugging Face directory holds it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2: padding, begin of a message, end of a message (the end-of-sequence token)."""

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

CORPUS = (
    "Why is the sky blue? The sky is blue because air scatters blue light more than red light.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "def add(first, second):\n    return first + second\n",
    "You are a helpful assistant. user system assistant",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 2024. Naïve café, größer, привет мир, 你好 世界, 🙂🎉",
)


def write_tiny_tokenizer(model_dir: Path, vocab_size: int = 512) -> Path:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `model_dir`, and return it.

    Byte-level BPE behind a single-digit splitter (as SmolLM2's), ChatML template; every id is below `vocab_size`, which
    must be at least 259: three special tokens and one token per byte.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": {"content": SPECIAL_TOKENS[2], "special": True, "__type": "AddedToken"},
        "pad_token": SPECIAL_TOKENS[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (model_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return model_dir


def long_token_json(model_dir: Path) -> str:
    """The directory's tokenizer.json with one more token, of 1,100 bytes: llguidance panics on more than 1,024."""
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    number = len(tokenizer["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": number, "content": "x" * 1100, **flags})
    return json.dumps(tokenizer)
