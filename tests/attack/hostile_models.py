"""Some 300 model directories and GGUF files that no honest tool makes, and what loading each of them comes to.

    PYTHONPATH=CHECKOUT python tests/attack/hostile_models.py [PART OF A NAME]...

Each is loaded in a process of its own, of which the peak of the memory is told. It must end as an error that names the
file, or load; within the time and memory of a small model.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from tests.tokenizers import write_tiny_tokenizer
from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.engine import Engine
from tfserve.errors import ConfigError, ModelError, RequestError
from tfserve.model.loading.config import load_model_config
from tfserve.model.models.base import stored_tensors
from tfserve.types import SamplingParams

TIMEOUT_S = 15
MAX_BYTES = 6 * 2**30
"""Address space of a process that loads one, so that none takes the machine's memory."""

Harm = Callable[[Path], None]

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
MISTRAL, QWEN3 = "MistralForCausalLM", "Qwen3ForCausalLM"
SIZES = (*(key for key, value in SHAPE.items() if type(value) is int and key != "eos_token_id"),)
ODD = (0, -1, 3, 10**6, 10**9, 2**31 - 1, 2**31, 10**12, 2**64, 1.5, "many", [], {}, True, float("inf"), float("nan"))


class Outcome(NamedTuple):
    """What loading came to: "loaded", an error of ours, "traceback", "killed" or "too long"; peak memory in MiB."""

    kind: str
    said: str
    peak_mib: int
    seconds: float


def write_tiny_checkpoint(model_dir: Path) -> Path:
    """A whole checkpoint with random weights, without the help of transformers."""
    write_tiny_tokenizer(model_dir)
    (model_dir / "config.json").write_text(json.dumps(SHAPE))
    tensors = {tensor.name: torch.rand(tensor.shape) for tensor in stored_tensors(load_model_config(model_dir))}
    save_file(tensors, model_dir / "model.safetensors")
    return model_dir


def edit(name: str, **changes: Any) -> Harm:
    """Other values in a JSON file."""

    def harm(model_dir: Path) -> None:
        path = model_dir / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | changes))

    return harm


def replace(name: str, data: bytes | str, times: int = 1) -> Harm:
    """Other contents of a file: `data` so many times."""
    piece = data.encode() if isinstance(data, str) else data

    def harm(model_dir: Path) -> None:
        (model_dir / name).write_bytes(piece * times)

    return harm


def _instead(make: Callable[[Path], Any]) -> Callable[[str], Harm]:
    """Something else in place of a file."""

    def of(name: str) -> Harm:
        def harm(model_dir: Path) -> None:
            (model_dir / name).unlink(missing_ok=True)
            make(model_dir / name)

        return harm

    return of


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path may have 100 characters
        sock.bind(path.name)
        os.chdir(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**32)


def _wide(name: str) -> Harm:
    def harm(model_dir: Path) -> None:
        (model_dir / name).write_text('{"a":[' + "[]," * 6_000_000 + "[]]}")

    return harm


INSTEAD: dict[str, Callable[[str], Harm]] = {
    "pipe": _instead(os.mkfifo),
    "socket": _instead(_bind),
    "directory": _instead(Path.mkdir),
    "link to nothing": _instead(lambda path: path.symlink_to("nothing")),
    "link to itself": _instead(lambda path: path.symlink_to(path.name)),
    "device": _instead(lambda path: path.symlink_to("/dev/zero")),
    "empty": _instead(Path.touch),
    "deep list": lambda name: replace(name, "[", 200_000),
    "deep object": lambda name: replace(name, '{"a":', 200_000),
    "wide": _wide,
    "noise": lambda name: replace(name, bytes(range(256)) * 40),
    "zeros": lambda name: replace(name, bytes(10_000)),
    "sparse": _instead(_sparse),
}

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FILES += ("added_tokens.json", "chat_template.jinja", "model.safetensors")


def _weight_map(name: Any) -> Harm:
    def harm(model_dir: Path) -> None:
        (model_dir / "model.safetensors").rename(model_dir / "part.safetensors")
        for folder in (model_dir / "below", model_dir.parent):
            folder.mkdir(exist_ok=True)
            shutil.copy(model_dir / "part.safetensors", folder / "other.safetensors")
        said = name.replace("HERE", str(model_dir)) if isinstance(name, str) else name
        (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": said}}))

    return harm


def _header(header: Any, length: int | None = None) -> Harm:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return replace("model.safetensors", struct.pack("<Q", size) + text + bytes(64))


def _tensor(shape: Any, start: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"model.embed_tokens.weight": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


def _tokenizer(change: Callable[[dict[str, Any]], Any]) -> Harm:
    def harm(model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))

    return harm


def _add(content: str, number: int) -> Callable[[dict[str, Any]], Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return lambda fields: fields["added_tokens"].append({"id": number, "content": content, **flags})


def directories() -> Iterator[tuple[str, Harm]]:
    """Every hostile directory: its name, and what is done to a whole checkpoint to make it."""
    for key in SIZES:
        for value in ODD:
            yield f"config {key}={value!r}", edit("config.json", **{key: value})
    for value in ODD:
        yield f"mistral sliding_window={value!r}", edit("config.json", architectures=[MISTRAL], sliding_window=value)
        yield f"qwen3 head_dim={value!r}", edit("config.json", architectures=[QWEN3], head_dim=value)
    for value in (-1, 512, 2**40, [[1]], ["a"], {"a": 1}):
        yield f"config eos_token_id={value!r}", edit("config.json", eos_token_id=value)
    for rope in ({"rope_type": "llama3"}, {"rope_type": {"a": []}}, {"factor": 1e308}, [], {"rope_type": ["x"] * 9}):
        yield f"config rope_scaling={rope!r}", edit("config.json", rope_scaling=rope)
    for key, value in (("rope_theta", 1e-300), ("rope_theta", 1e300), ("rms_norm_eps", 1e300), ("architectures", [7])):
        yield f"config {key}={value!r}", edit("config.json", **{key: value})
    for name in FILES:
        for kind, harm in INSTEAD.items():
            yield f"{name} {kind}", harm(name)
    names = ("../other.safetensors", "below/other.safetensors", "HERE/below/other.safetensors", "/dev/zero", "..", "")
    for part in (*names, "a\0b", "x" * 5000, ".\\part.safetensors", 7, None, ["part.safetensors"]):
        yield f"weight_map {str(part)[:30]!r}", _weight_map(part)
    for length in (0, 7, 2**31, 10**8, 2**63, 2**64 - 1):
        yield f"header length {length}", _header({}, length)
    big = 2**62
    for tensor in (_tensor([big, big], 0, 64), _tensor([4, 4], 0, big), _tensor([16], 64, 0), _tensor([-1], 0, 64)):
        yield f"header {tensor!r}", _header(tensor)
    yield "header deep", _header(b'{"a":' * 100_000)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield "header many", _header({f"t{number}": empty for number in range(20_000)})
    for number in (2**31, 2**32 - 1, 2**32, -1):
        yield f"token id {number}", _tokenizer(_add("<far>", number))
    yield "token long", _tokenizer(_add("<|" + "x" * 100_000 + "|>", 512))
    yield "tokens many", _tokenizer(lambda fields: [_add(f"<|{n}|>", 512 + n)(fields) for n in range(20_000)])
    yield "vocab ids", _tokenizer(lambda fields: fields["model"]["vocab"].update({"zz": 2**32 - 1}))
    yield "merges", _tokenizer(lambda fields: fields["model"]["merges"].append(["nope", "nada"]))
    grow = {"type": "Replace", "pattern": {"String": "h"}, "content": "h" * 10}
    for kind, steps in {
        "little by little": [grow] * 9,
        "at once": [{**grow, "content": "h" * 10**6}],
        "before": [{"type": "Prepend", "prepend": "h" * 10**6}],
    }.items():
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": steps}]}
        yield f"normalizer grows {kind}", _tokenizer(lambda fields, made=normalizer: fields.update(normalizer=made))
    yield "no vocabulary", _tokenizer(lambda fields: fields["model"].update(vocab={}, merges=[]))
    yield "vocab.json for transformers", lambda model_dir: (model_dir / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        for kind in ("pipe", "noise", "deep list", "sparse"):

            def harm(model_dir: Path, name: str = name, kind: str = kind) -> None:
                (model_dir / "tokenizer.json").unlink()
                INSTEAD[kind](name)(model_dir)

            yield f"{name} {kind}", harm
    for source in (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
    ):
        yield f"template {source[:20]}", replace("chat_template.jinja", source)
    for piece in ("{% if a %}", "(", "[", "not ", "-", "{{", "a+", "{% macro f() %}", "a."):
        yield f"template deep {piece!r}", replace("chat_template.jinja", "{{ " * (piece[0] != "{") + piece * 50_000)


def gguf_harms(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Every hostile GGUF file, by what is wrong with it."""

    def put(place: int, layout: str, value: int) -> bytes:
        data = bytearray(whole)
        struct.pack_into(layout, data, place, value)
        return bytes(data)

    def value_of(key: str) -> int:
        return whole.index(key.encode()) + len(key) + 4

    for count in (0, 1, 2**16, 2**32 - 1, 2**63, 2**64 - 1):
        yield f"tensor_count {count}", put(8, "<Q", count)
        yield f"kv_count {count}", put(16, "<Q", count)
        yield f"array length {count}", put(value_of("tokenizer.ggml.tokens") + 4, "<Q", count)
        yield f"number array length {count}", put(value_of("tokenizer.ggml.token_type") + 4, "<Q", count)
        yield f"string length {count}", put(value_of("tokenizer.chat_template"), "<Q", count)
    for key in ("block_count", "embedding_length", "feed_forward_length", "context_length", "attention.head_count"):
        for value in (0, 10**6, 2**32 - 1):
            yield f"{key} {value}", put(value_of(f"llama.{key}"), "<I", value)
    for kind in (9, 13, 2**32 - 1):
        yield f"array of {kind}", put(value_of("tokenizer.ggml.tokens"), "<I", kind)
        yield f"type {kind}", put(value_of("llama.block_count") - 4, "<I", kind)
    dims = whole.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")
    for place, layout, what in ((0, "<I", "dims"), (4, "<Q", "size"), (20, "<I", "kind"), (24, "<Q", "offset")):
        for value in (0, 5, 64, 2**31, 2**63 if layout == "<Q" else 2**32 - 1):
            yield f"tensor {what} {value}", put(dims + place, layout, value)
    for length in (0, 3, 20, 100, 2000, len(whole) // 2, len(whole) - 40):
        yield f"cut at {length}", whole[:length]
    yield (
        "nested arrays",
        whole[:8]
        + struct.pack("<QQ", 0, 1)
        + struct.pack("<Q", 1)
        + b"a"
        + struct.pack("<I", 9)
        + struct.pack("<IQ", 9, 1) * 100_000,
    )
    yield "bytes", whole[:8] + struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 10**7) + bytes(10**7)


def load_directory(model_dir: Path) -> str:
    """Load and use a model as the server does; what came of it, in words."""
    config = EngineConfig(
        model=str(model_dir),
        engine_process="off",
        threads=1,
        max_num_seqs=2,
        num_gpu_blocks_override=33,
        block_size=16,
        scheduler=SchedulerConfig(policy="fcfs"),
    )
    with Engine(config) as engine:
        try:
            prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
            engine.generate([prompt[:100] or "x"], SamplingParams(max_tokens=2))
        except RequestError as error:
            return f"loaded; {error}"
    return "loaded"


def import_file(file: Path) -> str:
    """Import a GGUF file."""
    from tfserve.model.gguf.conversion import import_gguf

    import_gguf(file, file.parent / "imported", progress=False)
    return "loaded"


def outcome(load: Callable[[Path], str], path: Path) -> Outcome:
    """Load in a process of its own, which has a limit of time and memory."""
    start_s = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT_S)
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
        os.close(read)
        try:
            kind, said = "loaded", load(path)
        except (ModelError, ConfigError) as error:
            kind, said = type(error).__name__, str(error)
        except BaseException as error:
            kind, said = "traceback", repr(error)[:200]
        os.write(write, json.dumps([kind, said[:1000]]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    _, status, used = os.wait4(child, 0)
    seconds = time.monotonic() - start_s
    kind, said = json.loads(told) if told else ("killed", f"status {status}")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        kind, said = "too long", ""
    return Outcome(kind, said, used.ru_maxrss >> 10, seconds)


def main(parts: list[str]) -> int:
    """Load them all and tell; the exit code is the number of loads that end badly, at most 99."""
    from tests.model.gguf.tiny_gguf import GgufRecipe, tiny_model, write_gguf

    torch.set_num_threads(1)
    found: list[tuple[str, Outcome]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TFSERVE_CACHE"] = f"{folder}/cache"
        whole = write_tiny_checkpoint(Path(folder) / "whole")
        write_gguf(GgufRecipe(tiny_model("llama")), Path(folder) / "whole.gguf")
        gguf = list(gguf_harms((Path(folder) / "whole.gguf").read_bytes()))
        for name, harm in [("whole", lambda path: None), *directories()]:
            if not parts or any(part in name for part in parts):
                path = Path(shutil.copytree(whole, Path(folder) / "one" / "model"))
                harm(path)
                found.append((name, outcome(load_directory, path)))
                shutil.rmtree(path.parent)
        for name, data in [("whole", (Path(folder) / "whole.gguf").read_bytes()), *gguf]:
            if not parts or any(part in f"gguf {name}" for part in parts):
                path = Path(folder) / "one" / "file.gguf"
                path.parent.mkdir()
                path.write_bytes(data)
                found.append((f"gguf {name}", outcome(import_file, path)))
                shutil.rmtree(path.parent)
    least = min((result.peak_mib for _, result in found), default=0)
    bad = [
        (name, result)
        for name, result in found
        if result.kind not in ("loaded", "ModelError", "ConfigError") or result.peak_mib > least + 600
    ]
    for name, result in bad:
        print(f"{result.kind:10} {result.peak_mib:6} MiB {result.seconds:5.1f} s  {name[:60]}: {result.said[:200]}")
    print(dict(Counter(result.kind for _, result in found)))
    print(f"{len(found)} loaded, {len(bad)} badly; peak {max(r.peak_mib for _, r in found)} MiB, least {least} MiB")
    for name, result in found:
        if parts:
            print(f"  {name[:60]}: {result.kind} {result.peak_mib} MiB {result.seconds:.1f} s {result.said[:300]}")
    return min(len(bad), 99)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
