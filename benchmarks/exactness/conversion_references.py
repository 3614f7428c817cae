"""Token ids and logits of a GGUF file by other implementations.

Run by conversion_check.py, each in an environment of its own: reads {"gguf": path, "inputs": [...]} and prints a list,
both JSON. llama.cpp and tiktoken turn texts into ids; transformers turns ids into logits.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOKEN_CONTROL = 3


def llama_cpp_ids(gguf_file: str, texts: Sequence[str]) -> list[list[int]]:
    """llama.cpp's vocabulary, through the extension module of llama-cpp-cffi (whose package imports too much)."""
    package = importlib.util.find_spec("llama")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("llama-cpp-cffi is not installed here")
    binary = next(Path(package.submodule_search_locations[0]).glob("_llama_cpp_cpu*"))
    spec = importlib.util.spec_from_file_location("_llama_cpp_cpu", binary)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{binary} is no extension module of this Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lib, ffi = module.lib, module.ffi
    params = lib.llama_model_default_params()
    params.vocab_only = True
    vocab = lib.llama_model_get_vocab(lib.llama_model_load_from_file(gguf_file.encode(), params))
    ids = []
    for text in texts:
        data = text.encode()
        room = ffi.new("llama_token[]", len(data) + 8)
        count = lib.llama_tokenize(vocab, data, len(data), room, len(room), False, True)
        ids.append(list(room[0:count]))
    return ids


def tiktoken_ids(gguf_file: str, texts: Sequence[str]) -> list[list[int]]:
    """tiktoken with the file's tokens as ranks; digits are cut apart first, then GPT-2's pattern, as `smollm` means."""
    import gguf
    import regex
    import tiktoken

    reader = gguf.GGUFReader(gguf_file)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
    special = {token: i for i, token in enumerate(tokens) if types[i] == TOKEN_CONTROL}
    ranks = {bytes(byte_of[c] for c in token): i for i, token in enumerate(tokens) if token not in special}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding("file", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    cut = regex.compile("(" + "|".join(map(regex.escape, special)) + r"|\p{N})")
    ids = []
    for text in texts:
        pieces = [piece for piece in cut.split(text) if piece]
        ids.append([i for p in pieces for i in ([special[p]] if p in special else encoding.encode_ordinary(p))])
    return ids


def transformers_logits(gguf_file: str, ids: Sequence[int]) -> list[list[float]]:
    """Logits [len(ids), vocab] of the model as transformers' own GGUF support loads it, fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    with torch.no_grad():
        logits: list[list[float]] = model(torch.tensor([ids])).logits[0].tolist()
    return logits


REFERENCES: dict[str, Callable[..., list[Any]]] = {
    "llama.cpp": llama_cpp_ids,
    "tiktoken": tiktoken_ids,
    "transformers": transformers_logits,
}

if __name__ == "__main__":
    request = json.load(sys.stdin)
    print(json.dumps(REFERENCES[sys.argv[1]](request["gguf"], request["inputs"])))
