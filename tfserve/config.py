"""Every setting, and how they come together: command line beats YAML file beats default.

Unknown keys and bad values are errors that name the key. The names are vLLM's where the idea is the same.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec

from tfserve.config_file import read_yaml
from tfserve.errors import ConfigError
from tfserve.misfit import find_misfit
from tfserve.settings import ApiKey, Settings, check_key
from tfserve.types import FASTEST_RATE, SLOWEST_RATE


class SchedulerConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests share the device. Times in seconds, rates in tokens/s; docs/scheduling.md says why.

    The `reserve_*` numbers are fcfs's estimate of how much of its remaining max_tokens a running request will use
    (SGLang's new_token_ratio): it starts at `reserve_ratio`, decays over `reserve_decay_steps` steps to
    `reserve_min_ratio`, and rises again after a wrong guess. `reserve_clip_tokens` caps what one request is charged.

    Time sharing: `schedule_interval_s` between full passes (events wake it earlier); a reader with less than
    `critical_s` unread needs the device; `buffer_scale_s` and `gamma` shape the penalty for a buffer that runs low;
    `buffer_conservativeness` times the switching time and an interval must be unread before somebody leaves for a
    newcomer; `min_residency_s` and `swap_gap_s` keep exchanges rare; `relief_s` is how much worse off than a
    resident somebody must be to displace it although it cannot afford it; `background_patience_s` is how many
    unread seconds a request without a rate counts as; `min_prefill_share` of the time goes to prompts even while
    readers run dry; a reader may stall for prompts by `stall_per_wait` of the longest wait for a first token, in
    all, `critical_s` at most; `watermark` is the share of device blocks kept free. `default_rate` is for streamed
    answers that name none; `max_rate` is the highest rate of a request over HTTP, and the highest that reports can show
    under "auto". `overload` says what a new request meets when the rates add up to more than the capacity.
    `generate_ahead_s` stops decoding, under every policy, whoever has more than that unread (None: never). The last
    four switch parts off, for ablations.
    """

    section: ClassVar[str] = "scheduler."

    policy: Literal[
        "fcfs",
        "fcfs-chunked",
        "fcfs-reserve",
        "fcfs-greedy",
        "round-robin",
        "earliest-underflow",
        "andes",
        "andes-offload",
        "tokenflow",
    ] = "tokenflow"
    reserve_ratio: float = 0.7
    reserve_min_ratio: float = 0.098
    reserve_decay_steps: int = 600
    reserve_clip_tokens: int = 4096
    schedule_interval_s: float = 0.5
    critical_s: float = 1.0
    buffer_scale_s: float = 1.0
    gamma: float = 1.0
    buffer_conservativeness: float = 1.5
    min_residency_s: float = 1.0
    swap_gap_s: float = 2.0
    relief_s: float = 5.0
    working_set_step: float = 0.1
    background_patience_s: float = 10.0
    min_prefill_share: float = 0.6
    stall_per_wait: float = 0.05
    watermark: float = 0.02
    default_rate: float = 6.0
    max_rate: float = 50.0
    overload: Literal["queue", "share", "shed"] = "queue"
    generate_ahead_s: float | None = None
    offload: bool = True
    write_through: bool = True
    load_evict_overlap: bool = True
    priority_writes: bool = True


_BODIES_IN_FLIGHT = 16
"""Bodies of the largest size that may be on their way at once, where no bound is set."""


class ServerConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP side. Times in seconds; `keep_alive_s` is the longest a stream stays silent.

    `pacing: smooth` sends text as fast as its reader reads, by `consumption_rate` (but for "auto"), and not as fast as
    it is made.
    `max_body_bytes` bounds one request's body, `max_inflight_body_bytes` those of all requests until they are prompts
    (None: 16 times `max_body_bytes`). A connection that takes nothing of its answer for `unread_timeout_s` is closed
    (0: never).
    `api_keys` are plain keys, or entries with a name; `api_keys_file` is a YAML file with a list of such.
    `control_tokens_in_messages` says what becomes of a control token (`<|im_end|>`) that a message spells out: it stays
    text, or is allowed to be the token, so that a message can end itself and begin another one.
    `cors_origins` are the web origins whose pages may call this server from a browser ("*": all); none by default.
    `allowed_hosts` are the names, without port, that clients may call this server by, beside addresses and localhost
    ("*": all). Without any, names are checked on a loopback address and without keys only (http/hosts.py).
    `max_connections` may have a request under way; None: 4096, or what may run and wait and a quarter more.
    Every `log_interval_s` in which there was something to do a line of numbers is logged (0: never).
    """

    section: ClassVar[str] = "server."

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str | ApiKey, ...] = ()
    api_keys_file: str | None = None
    max_queued_requests: int = 1024
    max_body_bytes: int = 4 * 1024 * 1024
    max_inflight_body_bytes: int | None = None
    keep_alive_s: float = 10.0
    unread_timeout_s: float = 600.0
    pacing: Literal["off", "smooth"] = "off"
    control_tokens_in_messages: Literal["text", "allow"] = "text"
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_connections: int | None = None
    log_interval_s: float = 10.0
    drain_timeout: float = 30.0

    @property
    def inflight_body_bytes(self) -> int:
        """`max_inflight_body_bytes`, resolved."""
        most = self.max_inflight_body_bytes
        return _BODIES_IN_FLIGHT * self.max_body_bytes if most is None else most


class EngineConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: the model, the device, the KV pool and the scheduler (and, for `tfserve serve`, the server).

    `model` is a local directory in Hugging Face format, a hub id, or "demo" (prepared by `tfserve demo-model`).
    `pipeline_depth` is how many steps may be under way: at 2, a step is planned and launched while the one before it
    still runs, so that the device need not wait for Python; tokens are the same.
    None means: `max_model_len` from the checkpoint, `block_size` as the attention backend prefers, `threads` all cores,
    `num_gpu_blocks_override` as many blocks as `kv_cache_gib` (CPU) or `gpu_memory_utilization` (CUDA) allow,
    `host_kv_gib` (where paused requests keep their KV) four times the device's KV, and at most a quarter of the free
    memory on a CPU, half of it or 64 GiB on a GPU; only policies that pause requests have a host tier.
    `emulated_bandwidth`, GiB/s in each direction, slows copies between the tiers down to those of a link that this
    machine does not have: for experiments. `step_trace` is a file to write a JSON line to for every step and finished
    request (engine/core/step_trace.py). `enforce_eager` switches CUDA graphs off. A section may be given as a mapping,
    as a file has it: `scheduler={"policy": "fcfs"}`.
    """

    model: str
    served_model_name: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["int8"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention_backend: Literal["auto", "torch", "flash_attn", "torch_varlen"] = "auto"
    threads: int | None = None
    engine_process: Literal["auto", "on", "off"] = "auto"
    pipeline_depth: Literal[1, 2] = 1
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    block_size: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float = 2.0
    host_kv_gib: float | None = None
    emulated_bandwidth: float | None = None
    num_gpu_blocks_override: int | None = None
    enforce_eager: bool = False
    seed: int = 0
    tensor_parallel_size: int = 1
    debug_checks: bool = False
    step_trace: str | None = None
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerConfig = ServerConfig()

    def __post_init__(self) -> None:
        """Raise ConfigError for values of another type, and for those that no machine could honour."""
        sections = {key: getattr(self, key) for key in _SECTIONS}
        _reject_unknown(sections, EngineConfig, "", "")
        super().__post_init__()
        for key, low in (
            ("threads", 1),
            ("max_model_len", 2),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("block_size", 1),
            ("num_gpu_blocks_override", 2),
        ):
            value = getattr(self, key)
            if value is not None and value < low:
                raise ConfigError(key, f"must be at least {low}, got {value}")
        if not self.model:
            raise ConfigError("model", "must name a model directory, a hub id, or 'demo'")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                "gpu_memory_utilization", f"must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if not 0 < self.kv_cache_gib < 2**20:
            raise ConfigError("kv_cache_gib", f"must be above 0 and a size in GiB, got {self.kv_cache_gib}")
        if self.host_kv_gib is not None and not 0 <= self.host_kv_gib < 2**20:
            raise ConfigError("host_kv_gib", f"must not be negative, and a size in GiB, got {self.host_kv_gib}")
        if self.emulated_bandwidth is not None and not 0 < self.emulated_bandwidth < 2**20:
            raise ConfigError("emulated_bandwidth", f"must be above 0 and in GiB/s, got {self.emulated_bandwidth}")
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                "tensor_parallel_size", f"only 1 is supported: one GPU per engine, got {self.tensor_parallel_size}"
            )
        if not 0 <= self.server.port <= 65535:
            raise ConfigError("server.port", f"must be between 0 and 65535, got {self.server.port}")
        self._check_server()
        self._check_scheduler()
        self._check_rates()

    def _check_server(self) -> None:
        server = self.server
        for key in server.api_keys:
            if isinstance(key, str):
                check_key(key)
        for name in server.allowed_hosts:
            if name != "*" and (not name or any(letter in name for letter in "/:*, ")):
                message = (
                    f"must be names as in models.example.org, without scheme, port or wildcard, or '*'; got {name!r}"
                )
                raise ConfigError("server.allowed_hosts", message)
        if server.max_connections is not None and server.max_connections < 1:
            raise ConfigError("server.max_connections", f"must be at least 1, got {server.max_connections}")
        if server.max_body_bytes < 1:
            raise ConfigError("server.max_body_bytes", f"must be at least 1, got {server.max_body_bytes}")
        if server.inflight_body_bytes < server.max_body_bytes:
            message = (
                f"must be at least server.max_body_bytes ({server.max_body_bytes}), got {server.inflight_body_bytes}"
            )
            raise ConfigError("server.max_inflight_body_bytes", message)
        for key in ("max_queued_requests", "keep_alive_s", "unread_timeout_s", "log_interval_s", "drain_timeout"):
            if not 0 <= getattr(server, key) < math.inf:
                raise ConfigError(f"server.{key}", f"must not be negative, and finite, got {getattr(server, key)}")

    def _check_scheduler(self) -> None:
        sched = self.scheduler
        if not 0 <= sched.reserve_min_ratio <= sched.reserve_ratio <= 1:
            raise ConfigError("scheduler.reserve_ratio", "needs 0 <= reserve_min_ratio <= reserve_ratio <= 1")
        if sched.reserve_decay_steps < 1:
            raise ConfigError("scheduler.reserve_decay_steps", f"must be at least 1, got {sched.reserve_decay_steps}")
        if sched.reserve_clip_tokens < 1:
            raise ConfigError("scheduler.reserve_clip_tokens", f"must be at least 1, got {sched.reserve_clip_tokens}")
        if sched.overload != "queue" and sched.policy != "tokenflow":
            message = (
                f"only policy tokenflow can {sched.overload!r}, not {sched.policy}; leave it out or choose tokenflow"
            )
            raise ConfigError("scheduler.overload", message)
        for key in ("schedule_interval_s", "buffer_scale_s"):
            if not 0 < getattr(sched, key) < math.inf:
                raise ConfigError(f"scheduler.{key}", f"must be above 0 and finite, got {getattr(sched, key)}")
        for key in _NOT_NEGATIVE:
            value = getattr(sched, key)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"scheduler.{key}", f"must not be negative, and finite, got {value}")
        if not 0 < sched.min_prefill_share < 1:
            message = f"must be above 0 and below 1, got {sched.min_prefill_share}"
            raise ConfigError("scheduler.min_prefill_share", message)
        for key in ("working_set_step", "watermark"):
            if not 0 <= getattr(sched, key) < 1:
                raise ConfigError(f"scheduler.{key}", f"must be at least 0 and below 1, got {getattr(sched, key)}")

    def _check_rates(self) -> None:
        sched = self.scheduler
        for key, low, name in (("default_rate", SLOWEST_RATE, ""), ("max_rate", sched.default_rate, " (default_rate)")):
            if not low <= getattr(sched, key) <= FASTEST_RATE:
                message = f"must be {low:g}{name} to {FASTEST_RATE:.0f} tokens/s, got {getattr(sched, key)}"
                raise ConfigError(f"scheduler.{key}", message)


_NOT_NEGATIVE = (
    "critical_s",
    "gamma",
    "buffer_conservativeness",
    "min_residency_s",
    "swap_gap_s",
    "relief_s",
    "stall_per_wait",
    "background_patience_s",
    "generate_ahead_s",
)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 200, 200

_LISTS = frozenset({"server.api_keys", "server.cors_origins", "server.allowed_hosts"})

_SECTIONS: dict[str, type[Settings]] = {"scheduler": SchedulerConfig, "server": ServerConfig}

_SWITCHES = {"on": True, "yes": True, "off": False, "no": False}
"""How people write true and false where nothing else can be meant; elsewhere these words are text."""


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> EngineConfig:
    """Build a config from a YAML file (or none) and overrides whose keys may be dotted, as "scheduler.policy".

    Override values may be strings, as a command line gives them; those of a list are separated by commas. Raises
    ConfigError naming the key.
    """
    tree = read_yaml(path) if path else {}
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(dotted, f"{parent!r} is not a section")
        node[leaf] = value.split(",") if dotted in _LISTS and isinstance(value, str) else value
    return config_from(tree, source=str(path) if path else "")


def config_from(tree: Mapping[str, Any], source: str = "") -> EngineConfig:
    """Build a config from plain data. Raises ConfigError naming the key; `source` tells where the data came from."""
    if "model" not in tree:
        raise ConfigError("model", "is required: a model directory, a hub id, or 'demo'" + _origin(source))
    _reject_unknown(tree, EngineConfig, "", source)
    tree = _read_switches(tree, EngineConfig)
    try:
        return msgspec.convert(tree, EngineConfig, strict=False)
    except msgspec.ValidationError:
        raise _misfit_error(tree, source) from None


def _misfit_error(tree: Mapping[str, Any], source: str) -> ConfigError:
    """What is wrong with the values of `tree`, which has known keys only. Keys of the API are not shown."""
    misfit = find_misfit(tree, EngineConfig, strict=False)
    if misfit is None:
        return ConfigError("", f"a setting has a value of the wrong type{_origin(source)}")
    # What aliases repeat in a file, grows beyond the memory when it is written out.
    shown = "" if misfit.path.partition("[")[0] == "server.api_keys" else f", got {_SHORT.repr(misfit.value)}"
    return ConfigError(misfit.path, f"{misfit.rule}{shown}{_origin(source)}")


def _reject_unknown(tree: Mapping[str, Any], struct: type[msgspec.Struct], prefix: str, source: str) -> None:
    """Name an unknown key and the nearest known one, which msgspec's own message does not."""
    import difflib

    known = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{prefix}{key}", f"is not a setting; {hint}{_origin(source)}")
        section = known[key]
        if isinstance(section, type) and issubclass(section, msgspec.Struct) and isinstance(value, Mapping):
            _reject_unknown(value, section, f"{prefix}{key}.", source)


def _read_switches(tree: Mapping[str, Any], struct: type[msgspec.Struct]) -> dict[str, Any]:
    """The tree with "on", "off", "yes" and "no" as booleans where a setting is one."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(struct)}
    read: dict[str, Any] = {}
    for key, value in tree.items():
        if kinds[key] is bool and isinstance(value, str):
            read[key] = _SWITCHES.get(value.lower(), value)
        elif key in _SECTIONS and isinstance(value, Mapping):
            read[key] = _read_switches(value, _SECTIONS[key])
        else:
            read[key] = value
    return read


def _origin(source: str) -> str:
    return f" (in {source})" if source else ""
