from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from tests.tokenizers import write_tiny_tokenizer
from tfserve.errors import ModelError, RequestError
from tfserve.install_hint import install_command
from tfserve.model.tokenizer import Tokenizer

TEXTS = [
    "Why is the sky blue?",
    "In 2024, 1234567890 of 3.14159 and 007",
    "def f(x):\n\treturn {'a': x ** 2}  # comment\n\n\n",
    "🙂🎉👩‍👩‍👧 café naïve größer",
    "привет мир, 你好，世界 مرحبا नमस्ते 한국어",
    "  leading and trailing  ",
    "<|im_start|>user\nspecial<|im_end|>",
    "",
]

CHAT = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "Add 12 and 30, 你好 🙂"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "  {% raw %} & <b>"},
]

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_tiny_tokenizer(tmp_path / "model")


def with_template(model_dir: Path, template: str) -> Tokenizer:
    (model_dir / "chat_template.jinja").write_text(template)
    return Tokenizer.from_dir(model_dir)


def edit_config(model_dir: Path, **changes: Any) -> None:
    path = model_dir / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_transformers(model_dir: Path, text: str) -> None:
    ours, theirs = Tokenizer.from_dir(model_dir), AutoTokenizer.from_pretrained(model_dir)
    token_ids = ours.encode(text)
    assert token_ids == theirs.encode(text)
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.decode(token_ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompt_and_its_ids_equal_transformers(model_dir: Path, add_generation_prompt: bool) -> None:
    ours, theirs = Tokenizer.from_dir(model_dir), AutoTokenizer.from_pretrained(model_dir)
    prompt = ours.apply_chat_template(CHAT, add_generation_prompt)
    options = {"add_generation_prompt": add_generation_prompt, "return_dict": False}
    assert prompt == theirs.apply_chat_template(CHAT, tokenize=False, **options)
    assert ours.encode(prompt, add_special_tokens=False) == theirs.apply_chat_template(CHAT, **options)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }}{{ eos_token }}",
        "{% if tools is none %}no tools{% endif %}{{ unknown_token }} {{ strftime_now('%Y') }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}\n  {% if true %}\n  x\n  {% endif %}\n",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ mood }}",
    ],
)
def test_template_features_render_as_in_transformers(model_dir: Path, template: str) -> None:
    ours = with_template(model_dir, template)
    theirs = AutoTokenizer.from_pretrained(model_dir)
    assert ours.apply_chat_template(CHAT, mood="good") == theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True, mood="good"
    )


def test_template_may_live_in_tokenizer_config(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").unlink()
    edit_config(model_dir, chat_template="one {{ messages[0].content }}")
    assert Tokenizer.from_dir(model_dir).apply_chat_template(USER) == "one hi"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    edit_config(model_dir, chat_template=named)
    assert Tokenizer.from_dir(model_dir).apply_chat_template(USER) == "default"


def test_text_parts_become_one_text(model_dir: Path) -> None:
    parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    prompt = Tokenizer.from_dir(model_dir).apply_chat_template([{"role": "user", "content": parts}])
    assert "<|im_start|>user\nfirst\nsecond<|im_end|>" in prompt


def test_image_parts_are_refused_by_name(model_dir: Path) -> None:
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(RequestError, match=r"messages\[1\].content.*image_url") as caught:
        Tokenizer.from_dir(model_dir).apply_chat_template([*USER, {"role": "user", "content": parts}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + messages[0].name + 1 }}", "chat template rejected"),
        ("{{ messages.append(1) }}", "chat template rejected"),
        ("{{ ''.__class__.__mro__ }}", "chat template rejected"),
    ],
)
def test_conversation_the_template_rejects_is_the_callers_error(model_dir: Path, template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        with_template(model_dir, template).apply_chat_template(USER)
    assert caught.value.param == "messages"


def test_model_without_template_says_so(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").unlink()
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer.from_dir(model_dir).apply_chat_template(USER)


def test_broken_template_names_its_line(model_dir: Path) -> None:
    with pytest.raises(ModelError, match="chat template, line 2:"):
        with_template(model_dir, "fine\n{% if %}")


def test_special_tokens_and_sizes(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.eos_token_id == 2
    assert tokenizer.special_ids == {0, 1, 2}
    assert 259 < tokenizer.vocab_size <= 512
    assert tokenizer.token_str(tokenizer.vocab_size - 1)
    assert tokenizer.token_str(tokenizer.vocab_size) == ""


def test_token_bytes_show_parts_of_a_character(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    token_ids = tokenizer.encode(" the 𝄞")
    assert b"".join(tokenizer.token_bytes(token) for token in token_ids) == " the 𝄞".encode()
    assert tokenizer.token_bytes(token_ids[-1]) == "𝄞".encode()[-1:]
    assert tokenizer.token_str(token_ids[-1]) == "�"


def test_added_tokens_with_characters_of_their_own_keep_them(model_dir: Path) -> None:
    path = model_dir / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.add_tokens([AddedToken("<｜think｜>", normalized=False)])
    backend.save(str(path))
    tokenizer = Tokenizer.from_dir(model_dir)
    token_ids = tokenizer.encode("<｜think｜> the")
    assert tokenizer.token_str(token_ids[0]) == "<｜think｜>"
    assert tokenizer.decode(token_ids) == "<｜think｜> the"


def test_stored_truncation_and_padding_do_not_touch_prompts(model_dir: Path) -> None:
    path = model_dir / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(path))
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.decode(tokenizer.encode("1234567890")) == "1234567890"
    assert len(tokenizer.encode("1")) == 1


def test_directory_without_tokenizer_json_is_converted(model_dir: Path) -> None:
    expected = Tokenizer.from_dir(model_dir).encode("the sky")
    Backend.from_file(str(model_dir / "tokenizer.json")).model.save(str(model_dir))
    (model_dir / "tokenizer.json").unlink()
    edit_config(model_dir, tokenizer_class="GPT2Tokenizer")
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.encode("the sky") == expected
    assert tokenizer.eos_token_id == 2


def test_only_a_directory_without_tokenizer_json_needs_transformers(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert Tokenizer.from_dir(model_dir).encode("the sky")
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=re.escape(install_command("convert-tokenizer"))):
        Tokenizer.from_dir(model_dir)


def test_unusable_directories_say_what_is_wrong(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a directory"):
        Tokenizer.from_dir(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.from_dir(empty)
    backend = Backend.from_file(str(model_dir / "tokenizer.json"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        Tokenizer(backend, {}, None)
    (model_dir / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config.json is not valid JSON"):
        Tokenizer.from_dir(model_dir)
    (model_dir / "tokenizer_config.json").write_text("{}")
    (model_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer.json is not a tokenizer"):
        Tokenizer.from_dir(model_dir)


def test_loads_without_torch_and_transformers(model_dir: Path) -> None:
    program = (
        "import sys\n"
        "from tfserve.model.detokenizer import Detokenizer\n"
        "from tfserve.model.tokenizer import Tokenizer\n"
        "Detokenizer(Tokenizer.from_dir(sys.argv[1]))\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(model_dir)], check=False).returncode == 0
