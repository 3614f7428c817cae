"""Hardware and models as numbers, and a roofline for the time of a step. Nothing here is measured.

step time = max(compute, memory) + overhead. A factor per device says which share of its peak it reaches. The factors
are assumptions; a profile fitted to measured steps (engine/simulation/fitted.py) replaces them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec

from tfserve.engine.simulation.engine import SimMachine
from tfserve.engine.simulation.transfers import SimLinks
from tfserve.plan import StepPlan

_BYTES_PER_VALUE = 2
"""bf16 weights and KV."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One device and its link to the host. Bytes, bytes/s, FLOP/s (dense bf16, fp32 accumulation), seconds.

    `compute_share` and `memory_share` are the shares of the peaks that steps reach. `link_bytes_per_s` is the speed of
    copies in one direction; they take `contention` times as long while the other direction is busy. `step_s` is the
    overhead of a step (launches, sampling, the loop), `row_s` that of each request in it; `reserved_bytes` are for
    activations and graphs.
    """

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: float
    compute_share: float
    memory_share: float
    link_bytes_per_s: float
    copy_latency_s: float = 10e-6
    contention: float = 1.15
    step_s: float = 1.5e-3
    row_s: float = 8e-6
    reserved_bytes: float = 1e9


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a decoder, named as in its Hugging Face config."""

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def linear_parameters(self) -> int:
        """Parameters that every token is multiplied with, the head not included."""
        attention = self.hidden * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Parameters of the output projection."""
        return self.hidden * self.vocab_size

    @property
    def weight_bytes(self) -> int:
        """Bytes on the device, embedding and head not shared."""
        return _BYTES_PER_VALUE * (self.linear_parameters + 2 * self.head_parameters)

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return _BYTES_PER_VALUE * 2 * self.num_layers * self.num_kv_heads * self.head_dim


class Roofline:
    """sim.runner.StepCost of a model on a device."""

    def __init__(self, gpu: Gpu, model: ModelShape) -> None:
        self._gpu = gpu
        self._flops_per_s = gpu.flops * gpu.compute_share
        self._bytes_per_s = gpu.memory_bytes_per_s * gpu.memory_share
        # A multiply and an add per parameter; QK^T and PV: as many per head, dimension and attended pair.
        self._token_flops = 2 * model.linear_parameters
        self._head_flops = 2 * model.head_parameters
        self._pair_flops = 4 * model.num_layers * model.num_heads * model.head_dim
        self._weight_bytes = _BYTES_PER_VALUE * (model.linear_parameters + model.head_parameters)
        self._kv_bytes = model.kv_bytes_per_token

    def __call__(self, n_decode: int, decode_ctx: float, n_prefill: int, prefill_ctx: float) -> float:
        """Seconds of a step; arguments as StepCost's."""
        tokens = n_decode + n_prefill
        compute: float = tokens * self._token_flops + n_decode * self._head_flops
        compute += (decode_ctx + prefill_ctx) * self._pair_flops
        moved = self._weight_bytes + (decode_ctx + tokens) * self._kv_bytes
        work_s = max(compute / self._flops_per_s, moved / self._bytes_per_s)
        return work_s + self._gpu.step_s + n_decode * self._gpu.row_s


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A model served on a device, with `memory_fraction` of its memory and `host_kv_bytes` of the host's.

    The engine's limits are the usual ones for the size of the device. Blocks have 256 tokens (flash-attn's pages) where
    memory allows, and 32 on smaller devices.
    """

    gpu: Gpu
    model: ModelShape
    memory_fraction: float
    host_kv_bytes: float
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int = 32

    @property
    def name(self) -> str:
        """Device and model."""
        return f"{self.gpu.name}, {self.model.name}"

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV that fit on the device, a whole number of blocks."""
        free = self.gpu.memory_bytes * self.memory_fraction - self.model.weight_bytes - self.gpu.reserved_bytes
        return int(free / self.model.kv_bytes_per_token) // self.block_size * self.block_size

    def machine(self, host_s: Callable[[StepPlan], float] | None = None) -> SimMachine:
        """The simulated machine; `host_s` is the CPU time charged before each launch."""
        gpu = self.gpu
        return SimMachine(
            step_s=Roofline(gpu, self.model),
            links=SimLinks(
                store_bytes_per_s=gpu.link_bytes_per_s,
                load_bytes_per_s=gpu.link_bytes_per_s,
                latency_s=gpu.copy_latency_s,
                contention=gpu.contention,
            ),
            kv_bytes_per_token=self.model.kv_bytes_per_token,
            kv_tokens=self.kv_tokens,
            host_kv_tokens=int(self.host_kv_bytes / self.model.kv_bytes_per_token),
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            host_s=host_s,
        )


def _read_profiles() -> dict[str, Profile]:
    """The set-ups of hardware.toml, which names devices and models once each."""
    tables = tomllib.loads((Path(__file__).parent / "data" / "hardware.toml").read_text())
    return {
        name: msgspec.convert(
            profile | {"gpu": tables["gpus"][profile["gpu"]], "model": tables["models"][profile["model"]]}, Profile
        )
        for name, profile in tables["profiles"].items()
    }


PROFILES = _read_profiles()
"""The TokenFlow paper's set-ups, by name: what `benchmarks.paper` simulates, and more."""


def capacity(profile: Profile, mean_prompt: float, mean_output: float) -> float:
    """Most generated tokens/s by the device's roofline with requests of these lengths, prefill time included.

    The batch is as large as memory allows with every request half done.
    """
    step_s = Roofline(profile.gpu, profile.model)
    context = mean_prompt + mean_output / 2
    batch = min(profile.max_num_seqs, profile.kv_tokens / context)
    token_s = step_s(round(batch), batch * context, 0, 0) / batch
    return 1.0 / (token_s + mean_prompt / mean_output / prefill_tokens_per_s(profile, mean_prompt))


def prefill_tokens_per_s(profile: Profile, mean_prompt: float) -> float:
    """Prompt tokens/s in steps of `max_num_batched_tokens`."""
    n = profile.max_num_batched_tokens
    return n / Roofline(profile.gpu, profile.model)(0, 0, n, n * mean_prompt / 2)
