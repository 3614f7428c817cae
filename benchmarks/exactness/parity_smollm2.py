"""Greedy text of the real model equals Hugging Face's: prompts with the chat template, alone and in batches.

    python -m benchmarks.exactness.parity_smollm2 --prompts PROMPTS.jsonl

Where a token differs, the reference's gap between its two best logits at that position must be under 1e-4: then two
correct implementations may choose differently, and what follows cannot be compared. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tfserve.config import EngineConfig
from tfserve.engine.engine import Engine
from tfserve.model.loading.demo import demo_model_dir
from tfserve.types import SamplingParams

MAX_TIE_GAP = 1e-4


@dataclass(frozen=True, slots=True)
class Reference:
    """HF's greedy continuation: its tokens, and the gap between the two best logits where each was chosen."""

    tokens: list[int]
    gaps: list[float]


def read_prompts(model_dir: Path, path: Path, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts as a user's turn in the model's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    texts = [json.loads(row)["prompt"] for row in path.read_text().splitlines()[:count]]
    turns = [[{"role": "user", "content": text}] for text in texts]
    encoded = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in encoded]


@torch.inference_mode()
def reference(model: PreTrainedModel, prompt: list[int], count: int) -> Reference:
    inputs = torch.tensor([prompt])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best_two = [logits[0].topk(2).values for logits in output.logits]
    gaps = [float(best - second) for best, second in best_two]
    return Reference(output.sequences[0, len(prompt) :].tolist(), gaps)


def check(name: str, references: list[Reference], answers: list[list[int]]) -> bool:
    """Print how `answers` compare with the references; False if one differs where the reference was sure."""
    equal = tied = 0
    wrong: list[str] = []
    for number, (expected, tokens) in enumerate(zip(references, answers, strict=True)):
        length = len(expected.tokens)
        pairs = enumerate(zip(expected.tokens, tokens, strict=False))
        place = next((i for i, (theirs, ours) in pairs if theirs != ours), min(length, len(tokens)))
        if place == length == len(tokens):
            equal += 1
        elif place < min(length, len(tokens)) and expected.gaps[place] < MAX_TIE_GAP:
            tied += 1
        else:
            gap = f"{expected.gaps[place]:.2e}" if place < length else "n/a"
            wrong.append(f"  prompt {number}: differs at token {place} of {length} (got {len(tokens)}), HF's gap {gap}")
    print(f"{name}: {equal} of {len(references)} equal, {tied} differ at a tie, {len(wrong)} differ")
    print("\n".join(wrong), end="\n" if wrong else "")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model_dir())
    parser.add_argument("--prompts", type=Path, required=True, help='a .jsonl file whose rows have a "prompt"')
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.count < args.batch:
        parser.error(f"--count must be at least --batch ({args.batch})")

    torch.set_num_threads(args.threads)
    prompts = read_prompts(args.model, args.prompts, args.count)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False).eval()
    # End-of-sequence must stop neither side: every position is compared.
    model.generation_config.eos_token_id = None
    references = [reference(model, prompt, args.tokens) for prompt in tqdm(prompts, "Hugging Face")]
    del model

    params = SamplingParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
    config = EngineConfig(model=str(args.model), dtype="float32", threads=args.threads, max_num_seqs=args.batch)
    with Engine(config) as engine:
        alone = [engine.generate([prompt], params)[0].token_ids for prompt in tqdm(prompts, "alone")]
        # The last batch overlaps the first, so that every batch is full.
        starts = [*range(0, args.count - args.batch, args.batch), args.count - args.batch]
        batched = {start: engine.generate(prompts[start : start + args.batch], params) for start in starts}
    passed = check("alone", references, alone)
    for start, outputs in batched.items():
        name = f"batch of {args.batch}, prompts {start} to {start + args.batch - 1}"
        tokens = [output.token_ids for output in outputs]
        passed = check(name, references[start : start + args.batch], tokens) and passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
