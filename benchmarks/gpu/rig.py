"""The objects of the GPU benchmark: a decoder with random weights made on the device, its KV, runner, transfers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import msgspec
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tfserve.config import EngineConfig, SchedulerConfig
from tfserve.engine.core import build
from tfserve.engine.core.clock import RealClock
from tfserve.engine.core.cuda_device import cuda_runner
from tfserve.engine.core.host_memory import HostTierMemory, open_host_tier
from tfserve.memory.storage.device_pool import DevicePool
from tfserve.memory.storage.kv_layout import KVLayout
from tfserve.model.attention import select_backend
from tfserve.model.attention.base import PagedKV
from tfserve.model.decoder import Decoder
from tfserve.model.layers.linear import WeightFormat
from tfserve.model.loading.config import ModelConfig
from tfserve.model.loading.weights import Tensors, fill
from tfserve.model.models.base import Weight, head_weights, layer_weights
from tfserve.model.runner.cuda_stream_runner import CudaStreamRunner
from tfserve.model.runner.runner import ModelRunner
from tfserve.plan import BlockId, InFlight, SeqStep, SlotId, SlotInit, StepId, StepPlan, StepResult
from tfserve.types import SamplingParams


class Shape(msgspec.Struct, frozen=True):
    """A model and its measurements; `prefill_tokens` is the largest step, `burst_kv_tokens` the burst's KV."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: str
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill_tokens: int
    burst_requests: int
    burst_prompt: int
    burst_output: int
    burst_kv_tokens: int
    copy_blocks: int


SHAPES = {
    # The paper's H200 (a): 400 requests of 512 / 2048 tokens; 0.3 of 141 GB less the weights is 200k tokens of KV.
    "llama-3-8b": Shape(
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        dtype="bfloat16",
        batches=(1, 8, 32, 128, 256),
        contexts=(512, 2048, 8192),
        prefill_tokens=32768,
        burst_requests=400,
        burst_prompt=512,
        burst_output=2048,
        burst_kv_tokens=200_000,
        copy_blocks=48,
    ),
    "tiny": Shape(
        hidden=64,
        intermediate=160,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=64,
        vocab=512,
        dtype="float32",
        batches=(1, 4),
        contexts=(32, 64),
        prefill_tokens=256,
        burst_requests=12,
        burst_prompt=24,
        burst_output=48,
        burst_kv_tokens=640,
        copy_blocks=6,
    ),
}


def model_config(shape: Shape, max_len: int) -> ModelConfig:
    """The shape as a checkpoint's config."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max_len,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        eos_token_ids=(0,),
        dtype=shape.dtype,  # type: ignore[arg-type]
    )


@torch.inference_mode()
def random_decoder(config: ModelConfig, device: str) -> Decoder:
    """A decoder with random weights, made where they are used; activations stay of ordinary size."""
    fmt = WeightFormat.choose(getattr(torch, config.dtype), torch.device(device), None)
    gen = torch.Generator(device).manual_seed(0)

    def rand(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=fmt.dtype, device=device).normal_(std=columns**-0.5, generator=gen)

    def tensors(weights: tuple[Weight, ...]) -> Tensors:
        made: Tensors = {}
        for weight in weights:
            rows = sum(part.rows for part in weight.parts)
            made[f"{weight.module}.weight"] = (
                torch.ones(rows, dtype=fmt.dtype, device=device)
                if weight.columns is None
                else rand(rows, weight.columns)
            )
        return made

    decoder = Decoder(config, fmt)
    decoder.embed_tokens = rand(config.vocab_size, config.hidden_size)
    weights, head = layer_weights(config), head_weights(config)
    for layer in decoder.layers:
        fill(layer, weights, tensors(weights), fmt)
    fill(decoder, head, tensors(head), fmt)
    return decoder


@contextmanager
def as_checkpoint(decoder: Decoder) -> Iterator[Path]:
    """A model directory without weights: while this is open, build_core finds `decoder` behind it."""
    config = decoder.config
    fields = msgspec.to_builtins(config)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        hf = {key: fields[key] for key in _SAME_NAME}
        hf |= {"architectures": [config.architecture], "eos_token_id": 0, "torch_dtype": config.dtype}
        (path / "config.json").write_text(json.dumps(hf))
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(path / "tokenizer.json"))
        with patch.object(build, "load_model", lambda *_, **__: decoder):
            yield path


_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)


@dataclass
class Rig:
    """One model with its KV, driven by plans that the benchmark writes itself."""

    decoder: Decoder
    layout: KVLayout
    pool: DevicePool
    runner: ModelRunner | CudaStreamRunner
    clock: RealClock
    max_num_seqs: int
    backend: str

    def __post_init__(self) -> None:
        self._step = 0
        self._rows: range = range(0)
        # Zeros would hide wrong indexing and run faster than real data.
        self.pool.storage.normal_()
        if self.pool.storage.is_cuda:
            torch.cuda.synchronize()  # the runner reads it on a stream of its own

    @classmethod
    def make(
        cls, decoder: Decoder, device: str, num_blocks: int, *, max_num_seqs: int, max_len: int, eager: bool
    ) -> Rig:
        config = decoder.config
        backend = select_backend("auto", device, config.dtype, config.head_dim)
        layout = KVLayout.for_device(
            device,
            config.dtype,
            num_layers=config.num_hidden_layers,
            block_size=backend.block_size(None),
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        pool = DevicePool(layout, num_blocks, device)
        kv = PagedKV(pool.layers())
        runner: ModelRunner | CudaStreamRunner
        if device == "cuda":
            settings = EngineConfig(model="random", max_num_seqs=max_num_seqs, enforce_eager=eager)
            stream = torch.cuda.Stream()
            runner = cuda_runner(decoder, kv, backend, settings, max_model_len=max_len, stream=stream)
        else:
            runner = ModelRunner(decoder, kv, backend, max_num_seqs=max_num_seqs, max_model_len=max_len)
        return cls(decoder, layout, pool, runner, RealClock(), max_num_seqs, backend.name)

    def host_tier(self, num_blocks: int) -> HostTierMemory:
        """Host memory for so many blocks, and the transfers to and from it."""
        gib = (num_blocks + 0.5) * self.layout.block_bytes / 2**30
        config = EngineConfig(model="random", host_kv_gib=gib, scheduler=SchedulerConfig(policy="tokenflow"))
        runner = self.runner if isinstance(self.runner, CudaStreamRunner) else None
        tier = open_host_tier(config, self.pool, self.clock, runner)
        assert tier is not None
        return tier

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.layout.block_size)

    def assign(self, tables: Sequence[Sequence[int]]) -> None:
        """Give each sequence a row and these blocks; earlier requests leave their rows."""
        released = tuple(SlotId(row) for row in self._rows)
        params = SamplingParams(temperature=0)
        entered = tuple(
            SlotInit(SlotId(i), f"r{i}", params, i, (1,), 1, tuple(BlockId(block) for block in table))
            for i, table in enumerate(tables)
        )
        self._rows = range(len(tables))
        self.launch((), 0, entered, released).result()

    def launch(
        self,
        seqs: tuple[SeqStep, ...],
        n_decode: int,
        entered: tuple[SlotInit, ...] = (),
        released: tuple[SlotId, ...] = (),
    ) -> InFlight:
        self._step += 1
        return self.runner.launch(StepPlan(StepId(self._step), seqs, n_decode, entered, released))

    def decode(self, context: int) -> StepResult:
        """One token for every row, each at this context (its new token included), run to its end."""
        return self.launch_decode(context).result()

    def launch_decode(self, context: int) -> InFlight:
        """The same, launched and not waited for."""
        seqs = tuple(SeqStep(f"r{row}", SlotId(row), context - 1, 1, True, None) for row in self._rows)
        return self.launch(seqs, len(seqs))

    def prefill(self, tokens: int) -> StepResult:
        """A whole prompt of so many tokens for every row."""
        ids = tuple(1 + i * 7919 % (self.decoder.config.vocab_size - 1) for i in range(tokens))
        seqs = tuple(SeqStep(f"r{row}", SlotId(row), 0, tokens, True, ids) for row in self._rows)
        return self.launch(seqs, 0).result()
