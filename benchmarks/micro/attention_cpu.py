"""Decode attention on the CPU: milliseconds for all layers of one step, ours and the alternatives.

    python -m benchmarks.micro.attention_cpu [batch,context[,spread] ...]

Blocks are scattered at random except for `slab` and `loop`, which read each sequence in one piece. `spread` in [0, 1)
makes lengths unequal: they run from `context * (1 - spread)` to `context`. Each figure is the best of several runs;
with `--threads 1` it is processor time, which can be compared on a busy machine too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tfserve.memory.storage.device_pool import DevicePool
from tfserve.memory.storage.kv_layout import KVLayout, KVOrder
from tfserve.model.attention.base import PagedKV
from tfserve.model.attention.embedding_bag_attention import EmbeddingBagAttention
from tfserve.model.attention.torch_backend import GatherDecode

# SmolLM2-135M
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64
DEFAULT_CASES = ["1,128", "1,1024", "8,128", "8,1024", "16,128", "32,64", "32,128", "32,256", "32,256,0.8", "32,1024"]


class Case:
    """A batch of decodes and the KV it reads."""

    def __init__(self, batch: int, context: int, spread: float, block_size: int) -> None:
        self.batch, self.context, self.block_size = batch, context, block_size
        self.lens = np.linspace(context * (1 - spread), context, batch).round().astype(np.int64).clip(1)
        self.lens[-1] = context
        width = -(-context // block_size)
        self.num_blocks = batch * width + 1
        self.tables = (np.random.default_rng(0).permutation(batch * width) + 1).astype(np.int32).reshape(batch, width)
        self.tables[np.arange(width) >= -(-self.lens // block_size)[:, None]] = 0
        self.q = torch.randn(batch, HEADS, HEAD_DIM)

    def paged(self, order: KVOrder) -> PagedKV:
        layout = KVLayout(order, LAYERS, self.block_size, KV_HEADS, HEAD_DIM, torch.float32)
        pool = DevicePool(layout, self.num_blocks, "cpu")
        pool.storage.normal_()
        return PagedKV(pool.layers())

    def token_major(self) -> list[tuple[Tensor, Tensor]]:
        """K and V as `[batch, kv_heads, context, D]` views of `[tokens, kv_heads, D]`: what slab and loop read."""
        flat = torch.randn(LAYERS, 2, self.batch, self.context, KV_HEADS, HEAD_DIM).transpose(3, 4)
        return [(layer[0], layer[1]) for layer in flat]


def bags(case: Case) -> Callable[[], None]:
    kv = case.paged(KVOrder.LAYER_MAJOR)

    def step() -> None:
        part = EmbeddingBagAttention(case.tables, case.lens, kv)
        for layer in range(LAYERS):
            part.attend(layer, case.q)

    return step


def gather_sdpa(case: Case) -> Callable[[], None]:
    kv = case.paged(KVOrder.BLOCK_MAJOR)

    def step() -> None:
        part = GatherDecode(case.tables, case.lens, kv)
        for layer in range(LAYERS):
            part.attend(layer, case.q)

    return step


def slab_sdpa(case: Case) -> Callable[[], None]:
    layers = case.token_major()
    q = case.q.view(case.batch, KV_HEADS, -1, HEAD_DIM)
    hidden = torch.arange(case.context) >= torch.from_numpy(case.lens)[:, None]
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]

    def step() -> None:
        for k, v in layers:
            scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return step


def loop_sdpa(case: Case) -> Callable[[], None]:
    layers = case.token_major()
    q = case.q.view(case.batch, 1, KV_HEADS, -1, HEAD_DIM)
    lens = case.lens.tolist()

    def step() -> None:
        for k, v in layers:
            for seq, n in enumerate(lens):
                scaled_dot_product_attention(q[seq], k[seq : seq + 1, :, :n], v[seq : seq + 1, :, :n])

    return step


def slab_bmm(case: Case) -> Callable[[], None]:
    layers = case.token_major()
    q = case.q.view(case.batch, KV_HEADS, -1, HEAD_DIM).transpose(0, 1)
    hidden = torch.arange(case.context) >= torch.from_numpy(case.lens)[:, None]
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]
    scores = torch.empty(KV_HEADS, case.batch, q.shape[2], case.context)
    out = torch.empty(q.shape)

    def step() -> None:
        for k, v in layers:
            for head in range(KV_HEADS):
                keys = k[:, head].transpose(1, 2)
                torch.baddbmm(mask, q[head], keys, alpha=HEAD_DIM**-0.5, out=scores[head])
            probs = torch.softmax(scores, -1)
            for head in range(KV_HEADS):
                torch.bmm(probs[head], v[:, head], out=out[head])

    return step


def best_ms(step: Callable[[], None], runs: int) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(runs + 1):
        began = clock()
        step()
        times.append(clock() - began)
    return 1e3 * min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode attention on the CPU, ms per step of all layers")
    parser.add_argument("cases", nargs="*", default=DEFAULT_CASES, help="batch,context or batch,context,spread")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    variants = (bags, gather_sdpa, slab_sdpa, slab_bmm, loop_sdpa)
    print(f"{args.threads} threads, blocks of {args.block_size}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'batch,context':>14} " + " ".join(f"{variant.__name__:>14}" for variant in variants))
    for text in args.cases:
        batch, context, *spread = text.split(",")
        case = Case(int(batch), int(context), float(spread[0]) if spread else 0.0, args.block_size)
        with torch.inference_mode():
            times = [best_ms(variant(case), args.runs) for variant in variants]
        print(f"{text:>14} " + " ".join(f"{ms:14.1f}" for ms in times), flush=True)


if __name__ == "__main__":
    main()
