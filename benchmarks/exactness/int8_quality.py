"""Quality of int8 weights: perplexity and next-token agreement with fp32, teacher-forced on real text.

    python -m benchmarks.exactness.int8_quality --prompts PROMPTS.jsonl --output benchmarks/results/int8_quality.json

Text is tokenised in one piece per file or prompt, joined, and cut into chunks that are each read from their start.
Both models see the same chunks; every position but the first of a chunk is predicted and scored.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from tfserve.bench.report import environment
from tfserve.model.decoder import Decoder
from tfserve.model.loading.config import ModelConfig, load_model_config
from tfserve.model.loading.demo import demo_model_dir
from tfserve.model.loading.loader import load_model

LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
MAX_RISE_PERCENT = 2.0


class DenseCausalAttention:
    """One whole sequence at once: every token attends to itself and to all before it."""

    def __init__(self, config: ModelConfig) -> None:
        self._group = config.num_attention_heads // config.num_key_value_heads

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        """As `LayerAttention.attend`: `[T, heads, D]` and `[T, kv_heads, D]` to `[T, heads * D]`."""
        keys, values = (x.repeat_interleave(self._group, dim=1).transpose(0, 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values, is_causal=True)
        return out.transpose(0, 1).flatten(1)


def read_chunks(model_dir: Path, prompts: Path | None, texts: list[Path], length: int, limit: int) -> list[Tensor]:
    """Chunks of `length` token ids from the texts, then the prompts, up to `limit` tokens in all."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    pieces = [path.read_text() for path in texts]
    if prompts is not None:
        pieces += [json.loads(row)["prompt"] + "\n\n" for row in prompts.read_text().splitlines() if row.strip()]
    token_ids: list[int] = []
    for piece in pieces:
        token_ids += tokenizer.encode(piece).ids
    return [chunk for chunk in torch.split(torch.tensor(token_ids[:limit]), length) if len(chunk) > 1]


@torch.inference_mode()
def score(decoder: Decoder, attention: DenseCausalAttention, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities `[T - 1, vocab]` of what follows each token, and those of the tokens that did, `[T - 1]`."""
    hidden = decoder.forward(chunk, torch.arange(len(chunk)), attention)
    logprobs = decoder.logits(hidden[:-1]).log_softmax(dim=-1)
    return logprobs, logprobs.gather(1, chunk[1:, None]).squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model_dir())
    parser.add_argument("--prompts", type=Path, help='a .jsonl file whose rows have a "prompt"')
    parser.add_argument("--texts", type=Path, nargs="*", default=[LICENSE], help="plain text files (default: LICENSE)")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "int8_quality.json")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    config = load_model_config(args.model)
    exact, rounded = (
        load_model(args.model, config, dtype="float32", device="cpu", quantization=quantization, progress=True)
        for quantization in (None, "int8")
    )
    attention = DenseCausalAttention(config)
    scored = agreed = right_exact = right_rounded = 0
    nll_exact = nll_rounded = divergence = 0.0
    for chunk in tqdm(read_chunks(args.model, args.prompts, args.texts, args.chunk, args.max_tokens), unit="chunk"):
        all_exact, next_exact = score(exact, attention, chunk)
        all_rounded, next_rounded = score(rounded, attention, chunk)
        best_exact, best_rounded = all_exact.argmax(dim=1), all_rounded.argmax(dim=1)
        scored += len(chunk) - 1
        agreed += int((best_exact == best_rounded).sum())
        right_exact += int((best_exact == chunk[1:]).sum())
        right_rounded += int((best_rounded == chunk[1:]).sum())
        nll_exact -= float(next_exact.double().sum())
        nll_rounded -= float(next_rounded.double().sum())
        divergence += float((all_exact.exp() * (all_exact - all_rounded)).sum(dim=1).double().sum())

    perplexity, quantized = math.exp(nll_exact / scored), math.exp(nll_rounded / scored)
    result = {
        "environment": {**environment(), "torch": torch.__version__},
        "tokens_scored": scored,
        "perplexity_fp32": perplexity,
        "perplexity_int8": quantized,
        "perplexity_rise_percent": 100 * (quantized / perplexity - 1),
        "top1_agreement": agreed / scored,
        "top1_accuracy_fp32": right_exact / scored,
        "top1_accuracy_int8": right_rounded / scored,
        "mean_kl_nats": divergence / scored,
    }
    for key, value in result.items():
        if key != "environment":
            print(f"{key:<28}{value:.4f}" if isinstance(value, float) else f"{key:<28}{value}")
    rise = 100 * (quantized / perplexity - 1)
    print(f"int8 {'may' if rise <= MAX_RISE_PERCENT else 'may NOT'} be a default: allowed rise {MAX_RISE_PERCENT} %")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
