"""Speed of Hugging Face transformers' `generate` on this machine, and the bound by its matrix products.

    python -m benchmarks.compare.transformers_loop --bounds --output benchmarks/results/hf.json

Greedy, fp32, prompts of 64 tokens, 64 new tokens each (no end-of-sequence, so neither side stops early). The bound is
the time of all linear layers and the head of the same run and of nothing else: one prefill of every prompt and a
decode step for each further token, with merged QKV and gate-up weights.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tfserve.bench.report import environment
from tfserve.bench.workload import random_prompt
from tfserve.model.loading.demo import demo_model_dir

PREFILL_ROWS = 512
"""Long prompts are computed in chunks of this many tokens; the products' time per row is flat from there on."""

Product = Callable[[Tensor], Tensor]


def read_token_ids(model_dir: Path, prompts: Path | None, count: int, length: int) -> list[list[int]]:
    """`count` prompts of exactly `length` token ids, from a JSON-lines file with "prompt" or from random words."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    rng = random.Random(0)
    if prompts is None:
        texts = [random_prompt(length * 2, rng) for _ in range(count)]
    else:
        texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    token_ids = [tokenizer(text)["input_ids"][:length] for text in texts[:count]]
    short = [len(ids) for ids in token_ids if len(ids) < length]
    if short or len(token_ids) < count:
        raise SystemExit(f"need {count} prompts of {length} tokens, got {len(token_ids)} with {len(short)} shorter")
    return token_ids


def generate_rate(model: PreTrainedModel, token_ids: list[list[int]], new_tokens: int) -> float:
    """Output tokens per second of one `generate`, its prefill included."""
    inputs = torch.tensor(token_ids)
    begin = time.perf_counter()
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    elapsed = time.perf_counter() - begin
    made = int(output.shape[1] - inputs.shape[1])
    if made != new_tokens:
        raise SystemExit(f"generate stopped after {made} of {new_tokens} tokens: its rate would not compare")
    return len(token_ids) * made / elapsed


def weights_of(model: PreTrainedModel) -> tuple[list[Tensor], Tensor]:
    """All linear weights of the layers, merged as a server would, and the head's."""
    merged: list[Tensor] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        merged.append(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]))
        merged.append(attention.o_proj.weight)
        merged.append(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        merged.append(mlp.down_proj.weight)
    return [weight.detach() for weight in merged], model.lm_head.weight.detach()


def plain(weight: Tensor) -> Product:
    """Plain `F.linear`."""
    return lambda x: torch.nn.functional.linear(x, weight)


def packed(weight: Tensor) -> Product:
    """oneDNN with the weight in its own layout."""
    ready = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, ready, None, "none", [], "")


def int8(weight: Tensor) -> Product:
    """Dynamically quantised inputs times int8 weights with one scale per output channel."""
    scales = weight.abs().amax(dim=1).clamp(min=1e-8).double() / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        ready = torch.ops.quantized.linear_prepack(quantized, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, ready)


FORMATS = {"fp32 F.linear": plain, "fp32 packed": packed, "int8 dynamic": int8}


def seconds(products: list[tuple[Product, int]], rows: int, repeats: int = 5) -> float:
    """Median time of running all products once over `rows` rows."""
    inputs = {width: torch.randn(rows, width) for _, width in products}
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for product, width in products:
            product(inputs[width])
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def measure_bounds(model: PreTrainedModel, streams: list[int], prompt: int, new: int) -> dict[str, Any]:
    """For each weight format and number of streams: step times in seconds and the tokens/s they allow."""
    weights, head = weights_of(model)
    result: dict[str, Any] = {}
    for name, build in FORMATS.items():
        layers = [(build(weight), weight.shape[1]) for weight in weights]
        last = [(build(head), head.shape[1])]
        chunk_s = seconds(layers, PREFILL_ROWS)
        result[name] = {}
        for count in streams:
            step_s, head_s = seconds(layers, count), seconds(last, count)
            rows = count * prompt
            prefill_s = seconds(layers, rows) if rows < PREFILL_ROWS else chunk_s * rows / PREFILL_ROWS
            total_s = prefill_s + head_s + (new - 1) * (step_s + head_s)
            result[name][str(count)] = {
                "layers_s": step_s,
                "head_s": head_s,
                "prefill_s": prefill_s,
                "tokens_per_s": count * new / total_s,
            }
    return result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model_dir())
    parser.add_argument("--prompts", type=Path, help='a .jsonl file with "prompt" (default: random words)')
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--bounds", action="store_true", help="also measure the matrix-product bound, 1 to 32 streams")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    token_ids = read_token_ids(args.model, args.prompts, max(args.batches), args.input_len)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False).eval()
    model.generation_config.eos_token_id = None
    generate_rate(model, token_ids[:1], 4)
    result: dict[str, Any] = {
        "environment": {**environment(), "torch": torch.__version__, "threads": args.threads},
        "generate_tokens_per_s": {
            str(batch): [generate_rate(model, token_ids[:batch], args.output_len) for _ in range(args.repeats)]
            for batch in args.batches
        },
    }
    for batch, rates in result["generate_tokens_per_s"].items():
        print(f"HF generate, batch {batch}: {statistics.median(rates):.1f} tokens/s")
    if args.bounds:
        result["bounds"] = measure_bounds(model, [1, 16, 32], args.input_len, args.output_len)
        for name, by_streams in result["bounds"].items():
            shown = ", ".join(f"{count}: {bound['tokens_per_s']:.0f}" for count, bound in by_streams.items())
            print(f"matrix-product bound, {name}, tokens/s by streams: {shown}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
