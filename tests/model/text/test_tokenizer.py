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

from tests.conftest import TINY
from tests.tokenizers import write_tiny_tokenizer
from tfserve.errors import ModelError, RequestError
from tfserve.install_hint import install_command
from tfserve.model.loading.config import load_model_config
from tfserve.model.text.chat_template import MISTRAL_TAGS, THOUGHT_TAGS, TOOL_CALL_TAGS
from tfserve.model.text.control_tokens import PromptText
from tfserve.model.text.tokenizer import Tokenizer, all_eos_token_ids

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

CONFIG = TINY | {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 1024, "eos_token_id": None}


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
    with pytest.raises(ModelError, match=r"chat_template\.jinja: chat template, line 2"):
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


def write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree))


ADDED = {"content": "<think>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"<think>": 437, "<｜tool｜>": 438}},
        {"added_tokens.json": {"<｜tool｜>": 438, "<think>": 437, "<|im_end|>": 2}},
        {"added_tokens.json": {"<think>": 437}, "special_tokens_map.json": {"eos_token": {"content": "<think>"}}},
        {"added_tokens.json": {"<think>": 437}, "tokenizer_config.json": {"additional_special_tokens": ["<think>"]}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"437": ADDED, "438": ADDED | {"content": "</think>"}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"437": ADDED | {"special": True, "lstrip": True}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"437": ADDED}}, "added_tokens.json": {"<think>": 437}},
    ],
)
def test_tokens_named_beside_tokenizer_json_are_one_token_as_in_transformers(
    files: dict[str, Any], model_dir: Path
) -> None:
    assert Tokenizer.from_dir(model_dir).vocab_size == 437
    for name, tree in files.items():
        path = model_dir / name
        write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | tree)
    ours, theirs = Tokenizer.from_dir(model_dir), AutoTokenizer.from_pretrained(model_dir)
    assert ours.encode("the<think>sky") == [*ours.encode("the"), 437, *ours.encode("sky")]
    for text in ("a <think> b<｜tool｜></think><|im_end|>", " <think>", "x<｜tool｜> "):
        token_ids = ours.encode(text)
        assert token_ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(token_ids, skip) == theirs.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("added_tokens.json", {"<think>": 500}),
        ("added_tokens.json", {"<think>": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"500": ADDED}}),
    ],
)
def test_an_added_token_of_another_model_is_refused(name: str, tree: Any, model_dir: Path) -> None:
    write_json(model_dir / name, tree)
    with pytest.raises(ModelError, match=rf"{name}: .*'<think>' has id \d+ there, but tokenizer.json gives it 437"):
        Tokenizer.from_dir(model_dir)


@pytest.mark.parametrize(
    ("config", "older", "expected"),
    [
        ("<|im_end|>", None, (2,)),
        ({"content": "<|im_end|>", "__type": "AddedToken"}, None, (2,)),
        (None, "<|endoftext|>", (0,)),
        (None, {"content": "<|endoftext|>"}, (0,)),
        ("<|im_end|>", "<|endoftext|>", (2, 0)),
        ("<|im_end|>", "<|im_end|>", (2,)),
        ("", None, ()),
        (None, None, ()),
    ],
)
def test_every_file_of_the_tokenizer_may_name_its_end(
    config: Any, older: Any, expected: tuple[int, ...], model_dir: Path
) -> None:
    edit_config(model_dir, eos_token=config)
    write_json(model_dir / "special_tokens_map.json", {"eos_token": older})
    assert Tokenizer.from_dir(model_dir).eos_token_ids == expected


@pytest.mark.parametrize(
    ("eos", "message"),
    [
        ("<|im_emd|>", "eos_token '<|im_emd|>' is no token of tokenizer.json"),
        (2, "eos_token must be text, got 2"),
        (["<|im_end|>"], "eos_token must be text"),
        ({"id": 2}, "eos_token.content is missing"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_an_end_that_is_no_token_is_refused_by_file_and_key(name: str, eos: Any, message: str, model_dir: Path) -> None:
    write_json(model_dir / name, {"eos_token": eos})
    with pytest.raises(ModelError, match=f"{name}: {re.escape(message)}"):
        Tokenizer.from_dir(model_dir)


@pytest.mark.parametrize(
    ("template", "tags"),
    [
        ("{{ tools }}<tool_call>", TOOL_CALL_TAGS),
        ("{{ tools }}[TOOL_CALLS]", MISTRAL_TAGS),
        ("{{ messages[0].content.split('</think>') }}", THOUGHT_TAGS),
    ],
)
def test_tags_that_part_an_answer_are_text_though_the_tokenizer_calls_them_special(
    template: str, tags: tuple[str, ...], model_dir: Path
) -> None:
    every = [*TOOL_CALL_TAGS, *MISTRAL_TAGS, *THOUGHT_TAGS]
    write_json(model_dir / "added_tokens.json", dict(zip(every, range(437, 450), strict=False)))
    edit_config(model_dir, additional_special_tokens=every)
    (model_dir / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.thinks is (tags == THOUGHT_TAGS)
    for tag in every:
        [token_id] = tokenizer.encode(tag, add_special_tokens=False)
        assert tokenizer.decode([token_id]) == (tag if tag in tags else "")


def test_ends_of_the_model_and_of_its_tokenizer_are_one_set(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    write_json(model_dir / "config.json", {**CONFIG, "eos_token_id": [7, 2]})
    assert all_eos_token_ids(load_model_config(model_dir), tokenizer, model_dir) == (7, 2)
    write_json(model_dir / "config.json", CONFIG)
    write_json(model_dir / "generation_config.json", {"eos_token_id": 9})
    assert all_eos_token_ids(load_model_config(model_dir), tokenizer, model_dir) == (9, 2)


def test_an_end_that_the_model_has_no_embedding_for_is_refused(model_dir: Path) -> None:
    write_json(model_dir / "added_tokens.json", {"<end>": 437})
    edit_config(model_dir, eos_token="<end>")
    write_json(model_dir / "config.json", CONFIG | {"vocab_size": 437})
    with pytest.raises(ModelError, match=r"tokenizer_config.json: eos_token '<end>' has id 437, beyond vocab_size 437"):
        all_eos_token_ids(load_model_config(model_dir), Tokenizer.from_dir(model_dir), model_dir)


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "LlamaTokenizer", "GPT2Tokenizer", None])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_directory_without_a_vocabulary_is_refused(kind: str | None, architecture: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG | {"model_type": architecture})
    if kind is not None:
        write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": kind})
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


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
        "from tfserve.model.text.detokenizer import Detokenizer\n"
        "from tfserve.model.text.tokenizer import Tokenizer\n"
        "Detokenizer(Tokenizer.from_dir(sys.argv[1]))\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(model_dir)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("a b " * 20, 1000, False),
        ("a b " * 100_000, 1000, True),
        ("a b " * 100_000, 100_000, False),
        ("ab" * 200_000, 1000, True),
        ("<|im_start|>" * 20_000, 1000, True),
        ("<|im_start|>" * 20_000, 20_000, False),
    ],
)
def test_a_text_exceeds_what_its_tokens_exceed(tmp_path: Path, text: str, most: int, expected: bool) -> None:
    tokenizer = Tokenizer.from_dir(write_tiny_tokenizer(tmp_path))
    assert tokenizer.exceeds(text, most) is expected
    assert not expected or len(tokenizer.encode(text)) > most


def test_a_text_exceeds_what_its_forged_control_tokens_are_as_text(tmp_path: Path) -> None:
    file = write_tiny_tokenizer(tmp_path) / "tokenizer.json"
    backend = Backend.from_file(str(file))
    backend.add_tokens([AddedToken("y" * 20, special=False)])
    tokenizer = Tokenizer(backend, {}, None)
    honest, forged, most = "y" * 80_000, "<|im_end|>" * 14_000, 20_000
    cuts = range(len(honest) + 1, len(honest + forged), len("<|im_end|>"))
    text = PromptText(honest + forged, cuts)
    assert len(tokenizer.encode(text)) > most
    assert tokenizer.exceeds(text, most)
    assert not tokenizer.exceeds(PromptText(honest + forged), most)
