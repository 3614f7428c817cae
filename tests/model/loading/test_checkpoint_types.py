"""With any contents of a checkpoint's small files the model loads, or an error in one line names the wrong file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tokenizers import write_tiny_tokenizer
from tfserve.errors import ModelError
from tfserve.model.loading.checkpoint import Checkpoint
from tfserve.model.loading.config import load_model_config
from tfserve.model.text.tokenizer import Tokenizer, all_eos_token_ids

WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2.0,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "two\nlines",
    "half a pair \ud83d",
    [],
    [None],
    ["2"],
    [[]],
    {},
    {"id": 2},
    {"content": 5},
    [{"name": "default"}],
)
"""A value of every type that JSON has, and those within a type that need care."""


@pytest.fixture(scope="module")
def whole(tiny_qwen25: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with every small file that is read."""
    model_dir = Path(shutil.copytree(tiny_qwen25, tmp_path_factory.mktemp("whole") / "model"))
    write_tiny_tokenizer(model_dir)
    (model_dir / "chat_template.jinja").unlink()
    size = Tokenizer.from_dir(model_dir).vocab_size
    edit(
        model_dir / "config.json",
        architectures=["Qwen2ForCausalLM"],
        rope_theta=10000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        head_dim=8,
        partial_rotary_factor=1.0,
        quantization_config=None,
    )
    added = {"content": "<think>", "special": False, "lstrip": False, "normalized": False}
    edit(
        model_dir / "tokenizer_config.json",
        add_bos_token=False,
        chat_template=[{"name": "default", "template": "{{ messages[0].content }}"}],
        added_tokens_decoder={str(size): added},
        additional_special_tokens=["<|im_start|>"],
    )
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (model_dir / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (model_dir / "added_tokens.json").write_text(json.dumps({"<tool>": size + 1}))
    return model_dir


FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "model.safetensors.index.json",
]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(model_dir: Path, file: str) -> None:
    """Read a file of a checkpoint as the engine does."""
    config = load_model_config(model_dir)
    if "safetensors" in file:
        with Checkpoint(model_dir) as checkpoint:
            checkpoint.verify(config)
    if "token" in file:
        all_eos_token_ids(config, Tokenizer.from_dir(model_dir), model_dir)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value in a JSON tree; of long lists and tables the first two."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    long = len(tree) > 40 if isinstance(tree, dict | list) else False
    for place, (key, child) in enumerate(children):
        if not long or place < 2:
            yield from places(child, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value at `path`."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


def loads(model_dir: Path, file: str) -> bool:
    """True if the checkpoint loads; else the complaint must be one line that names `file`."""
    try:
        load(model_dir, file)
    except ModelError as error:
        text = str(error)
        assert file in text or "the files are of different models" in text, text
        assert "\n" not in text, text
        assert text.encode(), text
        assert len(text) < 700, text
        return False
    return True


@pytest.fixture
def model_dir(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.mark.parametrize("file", FILES)
def test_a_value_of_a_wrong_type_loads_or_is_named_by_file(file: str, model_dir: Path) -> None:
    tree = json.loads((model_dir / file).read_text())
    assert loads(model_dir, file)
    refused = 0
    for path in places(tree):
        for value in WRONG:
            (model_dir / file).write_text(json.dumps(replaced(tree, path, value)))
            try:
                refused += not loads(model_dir, file)
            except BaseException as error:
                error.add_note(f"{file}: {path} = {value!r}")
                raise
    assert refused > 0


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_qwen3", "tiny_mistral_window"])
def test_a_value_of_a_wrong_type_in_config_json_of_any_family_loads_or_is_named(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "model")) / "config.json"
    tree = json.loads(file.read_text())
    assert loads(file.parent, file.name)
    for path in places(tree):
        for value in WRONG:
            file.write_text(json.dumps(replaced(tree, path, value)))
            loads(file.parent, file.name)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("key", ["", " ", "\ud83d", "a\nb", "\0", "x" * 5000])
def test_a_key_of_any_text_loads_or_is_named_by_file(file: str, key: str, model_dir: Path) -> None:
    tree = json.loads((model_dir / file).read_text())
    for path in [(), *places(tree)]:
        at = tree
        for step in path:
            at = at[step]
        for value in (437, 438, "text", {"content": "<new>"}) if isinstance(at, dict) else ():
            (model_dir / file).write_text(json.dumps(replaced(tree, path, {**at, key: value})))
            loads(model_dir, file)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b"[]", b"5", b"null", b'{"a": ', b"[" * 100_000, b'{"a":' * 9999 + b"1" + b"}" * 9999],
    ids=["empty", "not UTF-8", "list", "number", "null", "cut", "deep", "deep object"],
)
def test_a_file_that_holds_no_object_is_named(file: str, content: bytes, model_dir: Path) -> None:
    (model_dir / file).write_bytes(content)
    assert not loads(model_dir, file)


@pytest.mark.parametrize("file", FILES)
def test_a_link_to_nothing_is_no_absent_file(file: str, model_dir: Path) -> None:
    (model_dir / file).unlink()
    (model_dir / file).symlink_to("nowhere")
    assert not loads(model_dir, file)


@pytest.mark.parametrize("file", FILES)
def test_a_directory_in_place_of_a_file_is_named(file: str, model_dir: Path) -> None:
    (model_dir / file).unlink()
    (model_dir / file).mkdir()
    assert not loads(model_dir, file)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"{% if %}", b"{{ " + b"(" * 5000, b"{% for a in b %}" * 40 + b"{% endfor %}" * 40, b"{{ x | y }}"],
    ids=["not UTF-8", "syntax", "deep", "nested", "filter"],
)
def test_a_chat_template_that_is_none_is_named_by_file(content: bytes, model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ModelError, match=r"^[^\n]*chat_template\.jinja[^\n]*$"):
        Tokenizer.from_dir(model_dir)
