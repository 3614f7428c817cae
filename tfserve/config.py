"""Every setting, with its bounds and its help.

This is the one source for validation, for `tfserve serve --help`, for the tables of docs/operations.md (a test compares
them), and for `msgspec.json.schema(EngineConfig)`. A setting that vLLM also has bears vLLM's name. Command line beats
environment beats YAML file beats default; an unknown name or a bad value is an error that names it.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
from msgspec import Meta

from tfserve.config_file import read_list, read_yaml
from tfserve.errors import ConfigError
from tfserve.misfit import find_misfit, nearest
from tfserve.scheduler_sections import AblationConfig, FcfsConfig, TokenFlowConfig
from tfserve.settings import (
    AboveZero,
    ApiKey,
    Count,
    NotNegative,
    Setting,
    Settings,
    Share,
    about,
    check_key,
    settings_of,
)
from tfserve.types import FASTEST_RATE, SLOWEST_RATE

logger = logging.getLogger(__name__)

Rate = Annotated[float, Meta(ge=SLOWEST_RATE, le=FASTEST_RATE)]
Amount = Annotated[float, Meta(gt=0, lt=2**20)]
AmountOrNone = Annotated[float, Meta(ge=0, lt=2**20)]
NotNegativeInt = Annotated[int, Meta(ge=0)]

Policy = Literal[
    "fcfs",
    "fcfs-chunked",
    "fcfs-reserve",
    "fcfs-greedy",
    "round-robin",
    "earliest-underflow",
    "andes",
    "andes-offload",
    "tokenflow",
]


class SchedulerConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests share the device. Times in seconds, rates in tokens/s; docs/scheduling.md says why.

    What concerns some policies only is in a section: `tokenflow`, `fcfs`, or `ablation`.
    """

    section: ClassVar[str] = "scheduler."

    policy: Annotated[Policy, about("how requests share the device")] = "tokenflow"
    schedule_interval_s: Annotated[AboveZero, about("seconds between full passes; events start one sooner")] = 0.5
    watermark: Annotated[Share, about("share of device blocks kept free")] = 0.02
    default_rate: Annotated[
        Rate, about("tokens/s at which a streamed answer is read that names no consumption_rate")
    ] = 6.0
    max_rate: Annotated[Rate, about("highest consumption_rate over HTTP; higher ones are lowered to it")] = 50.0
    overload: Annotated[
        Literal["queue", "share", "shed"], about("what happens to a new request when the rates exceed the capacity")
    ] = "queue"
    generate_ahead_s: Annotated[
        NotNegative | None, about("stop decoding for a reader with so many seconds unread; null: never")
    ] = None
    tokenflow: TokenFlowConfig = TokenFlowConfig()
    fcfs: FcfsConfig = FcfsConfig()
    ablation: AblationConfig = AblationConfig()

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of bounds, and for settings that contradict each other."""
        super().__post_init__()
        if self.max_rate < self.default_rate:
            message = f"must be at least default_rate ({self.default_rate:g} tokens/s), got {self.max_rate:g}"
            raise self.mistake("max_rate", message)
        if self.overload != "queue" and self.policy != "tokenflow":
            message = (
                f"only policy tokenflow can {self.overload!r}, not {self.policy}; leave it out or choose tokenflow"
            )
            raise self.mistake("overload", message)


_BODIES_IN_FLIGHT = 16
"""Default of `max_inflight_body_bytes`, in bodies of the largest size."""


class ServerConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP side. Times in seconds.

    Without `allowed_hosts`, names are checked on a loopback address and without keys only (http/hosts.py).
    """

    section: ClassVar[str] = "server."

    host: Annotated[str, about('address to listen on; 0.0.0.0: all of IPv4; "::": all, of both families')] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535), about("port to listen on; 0: any free one")] = 8000
    api_keys: Annotated[
        tuple[str | ApiKey, ...], about("keys that clients need: plain ones, or entries with a name")
    ] = ()
    api_keys_file: Annotated[str | None, about("a YAML file with a list of keys, read at the start")] = None
    max_queued_requests: Annotated[
        NotNegativeInt, about("how many requests may wait besides the running ones; then 429")
    ] = 1024
    max_body_bytes: Annotated[Count, about("largest body of a request; then 413")] = 4 * 1024 * 1024
    max_inflight_body_bytes: Annotated[
        int | None, about("bodies of all requests until they are prompts; null: 16 times `server.max_body_bytes`")
    ] = None
    keep_alive_s: Annotated[NotNegative, about("the longest silence of a stream")] = 10.0
    unread_timeout_s: Annotated[
        NotNegative, about("a connection that reads nothing of its answer for so long is closed; 0: never")
    ] = 600.0
    pacing: Annotated[Literal["off", "smooth"], about("smooth: send text at the reader's rate, not in bursts")] = "off"
    control_tokens_in_messages: Annotated[
        Literal["text", "allow"], about("encode a control token in a message as text, or (allow) as the token")
    ] = "text"
    cors_origins: Annotated[
        tuple[str, ...], about('web origins whose pages may call the API from a browser; "*": all')
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...], about('names, without port, that clients may call the server by; "*": all')
    ] = ()
    max_connections: Annotated[
        Count | None, about("connections with an open request; then 503. null: 4096, or more by max_num_seqs")
    ] = None
    log_interval_s: Annotated[NotNegative, about("seconds between lines of statistics in the log; 0: never")] = 10.0
    drain_timeout: Annotated[NotNegative, about("seconds that open requests have to end after SIGTERM")] = 30.0

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of bounds, and for settings that contradict each other."""
        super().__post_init__()
        for key in self.api_keys:
            if isinstance(key, str):
                check_key(key)
        for name in self.allowed_hosts:
            if name != "*" and (not name or any(letter in name for letter in "/:*, ")):
                message = (
                    f"must be names as in models.example.org, without scheme, port or wildcard, or '*'; got {name!r}"
                )
                raise self.mistake("allowed_hosts", message)
        if self.inflight_body_bytes < self.max_body_bytes:
            message = f"must be at least server.max_body_bytes ({self.max_body_bytes}), got {self.inflight_body_bytes}"
            raise self.mistake("max_inflight_body_bytes", message)

    @property
    def inflight_body_bytes(self) -> int:
        """`max_inflight_body_bytes`, resolved."""
        most = self.max_inflight_body_bytes
        return _BODIES_IN_FLIGHT * self.max_body_bytes if most is None else most


class EngineConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: the model, the device, the KV pool and the scheduler (and, for `tfserve serve`, the server).

    `host_kv_gib` None: four times the device's KV, at most a quarter of the free memory on a CPU, half of it or 64 GiB
    on a GPU. Only policies that pause requests have a host tier. `pipeline_depth` 2 launches a step while the previous
    one still runs; the tokens are the same. A section may be a mapping, as in a file: `scheduler={"policy": "fcfs"}`.
    """

    model: Annotated[str, about('directory in Hugging Face format, hub id, or "demo"')]
    served_model_name: Annotated[str | None, about("the name clients send; null: the last part of `model`")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], about("auto: float32 on a CPU, the checkpoint's on a GPU")
    ] = "auto"
    quantization: Annotated[Literal["int8"] | None, about("int8: weights in 8 bits, CPU only")] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], about("auto: cuda if there is one")] = "auto"
    attention_backend: Annotated[
        Literal["auto", "torch", "flash_attn", "torch_varlen"],
        about("auto: torch on a CPU; flash_attn or torch_varlen on a GPU"),
    ] = "auto"
    threads: Annotated[
        Count | None, about("CPU threads; null: all cores that this process may use, by its container's quota too")
    ] = None
    engine_process: Annotated[
        Literal["auto", "on", "off"], about("the engine in a process of its own; auto: on in `tfserve serve`")
    ] = "auto"
    pipeline_depth: Annotated[Literal[1, 2], about("2: plan the next step while one runs")] = 1
    max_model_len: Annotated[
        Annotated[int, Meta(ge=2)] | None, about("longest prompt + answer; null: the model's own, or what the KV holds")
    ] = None
    max_num_seqs: Annotated[Count, about("requests in one step")] = 32
    max_num_batched_tokens: Annotated[Count, about("prompt and new tokens of one step")] = 512
    block_size: Annotated[Count | None, about("tokens of a KV block; null: 32 on a CPU, 256 on a GPU")] = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1), about("share of the GPU's memory to use")] = 0.9
    kv_cache_gib: Annotated[Amount, about("device KV on a CPU")] = 2.0
    host_kv_gib: Annotated[AmountOrNone | None, about("host KV; 0: none; null: by the free memory")] = None
    emulated_bandwidth: Annotated[Amount | None, about("GiB/s; slows copies down, for experiments")] = None
    num_gpu_blocks_override: Annotated[
        Annotated[int, Meta(ge=2)] | None, about("blocks of device KV, whatever the memory")
    ] = None
    enforce_eager: Annotated[bool, about("no CUDA graphs")] = False
    seed: Annotated[int, about("seed of requests without one")] = 0
    tensor_parallel_size: Annotated[Literal[1], about("GPUs per engine; only 1 exists")] = 1
    debug_checks: Annotated[bool, about("check after every step that no block is lost")] = False
    step_trace: Annotated[str | None, about("file for a line per step and request")] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], about("lowest level that is logged; debug: probes and reports")
    ] = "info"
    log_format: Annotated[Literal["text", "json"], about("json: an object per line, on the error stream")] = "text"
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerConfig = ServerConfig()

    def __post_init__(self) -> None:
        """Raise ConfigError for values of another type or out of bounds."""
        for key in ("scheduler", "server"):
            if isinstance(value := getattr(self, key), Mapping):
                given = {name: leaf.given for name, leaf in _by_name({key: value}, "").items()}
                msgspec.structs.force_setattr(self, key, nested(given).get(key, {}))
        super().__post_init__()
        if not self.model:
            raise ConfigError("model", "must name a model directory, a hub id, or 'demo'")


_SECTIONS: dict[str, type[Settings]] = {
    "scheduler": SchedulerConfig,
    "scheduler.tokenflow": TokenFlowConfig,
    "scheduler.fcfs": FcfsConfig,
    "scheduler.ablation": AblationConfig,
    "server": ServerConfig,
}

_STRUCTS: list[type[Settings]] = [EngineConfig, *_SECTIONS.values()]

SETTINGS: dict[str, Setting] = {setting.name: setting for struct in _STRUCTS for setting in settings_of(struct)}
"""Every setting under its dotted name, as in "scheduler.policy"."""

RENAMED: dict[str, str] = {
    "scheduler.critical_s": "scheduler.tokenflow.low_buffer_s",
    "scheduler.buffer_scale_s": "scheduler.tokenflow.buffer_scale_s",
    "scheduler.gamma": "scheduler.tokenflow.underflow_weight",
    "scheduler.buffer_conservativeness": "scheduler.tokenflow.buffer_conservativeness",
    "scheduler.min_residency_s": "scheduler.tokenflow.min_residency_s",
    "scheduler.swap_gap_s": "scheduler.tokenflow.min_swap_gain_s",
    "scheduler.relief_s": "scheduler.tokenflow.starvation_gap_s",
    "scheduler.working_set_step": "scheduler.tokenflow.working_set_step",
    "scheduler.background_patience_s": "scheduler.tokenflow.background_slack_s",
    "scheduler.min_prefill_share": "scheduler.tokenflow.min_prefill_share",
    "scheduler.stall_per_wait": "scheduler.tokenflow.stall_budget_per_wait",
    "scheduler.reserve_ratio": "scheduler.fcfs.reserve_ratio",
    "scheduler.reserve_min_ratio": "scheduler.fcfs.reserve_min_ratio",
    "scheduler.reserve_decay_steps": "scheduler.fcfs.reserve_decay_steps",
    "scheduler.reserve_clip_tokens": "scheduler.fcfs.reserve_clip_tokens",
    "scheduler.offload": "scheduler.ablation.offload",
    "scheduler.write_through": "scheduler.ablation.write_through",
    "scheduler.load_evict_overlap": "scheduler.ablation.load_evict_overlap",
    "scheduler.priority_writes": "scheduler.ablation.priority_writes",
}
"""From the dotted names of the last release to today's. An old name is accepted with a warning."""

_SWITCHES = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
"""Words for true and false, for a boolean setting; for other settings they are text."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 200, 200


def load_config(
    path: Path | None, overrides: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> EngineConfig:
    """Build a config from a YAML file (or none), environment variables, and overrides by their dotted names.

    Values may be strings, as on a command line; the items of a list are separated by commas, or are a YAML list.
    Raises ConfigError naming the key and its file or variable.
    """
    found = _by_name(read_yaml(path), str(path)) if path else {}
    for values, place in ((environment or {}, "the environment variable "), (overrides, "")):
        for name, value in _by_name(values, "").items():
            source = place and place + variable_of(name)
            is_list = name in SETTINGS and SETTINGS[name].is_list and isinstance(value.given, str)
            found[name] = _Value(read_list(value.given, source or name) if is_list else value.given, source)
    return _build(found)


def config_from(tree: Mapping[str, Any], source: str = "") -> EngineConfig:
    """Build a config from plain data. Raises ConfigError naming the key; `source` is the origin of the data."""
    return _build(_by_name(tree, source), source)


def nearest_setting(word: str) -> str | None:
    """The setting, by today's name, whose name of today or of the last release is most similar to a word."""
    near = nearest(word, (*SETTINGS, *RENAMED))
    return None if near is None else RENAMED.get(near, near)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted names as a tree. A section whose value is no mapping stays as it is."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, leaf = name.split(".")
        node: Any = tree
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else node
        if isinstance(node, dict):
            node[leaf] = value
    return tree


def variable_of(name: str) -> str:
    """The environment variable that sets a setting: TFSERVE_SERVER__PORT for "server.port"."""
    return "TFSERVE_" + name.replace(".", "__").upper()


class _Value(NamedTuple):
    """The value of a setting and its origin."""

    given: Any
    source: str


def _by_name(tree: Mapping[str, Any], source: str) -> dict[str, _Value]:
    """The values of one source by today's dotted names. Raises ConfigError for an unknown or repeated name."""
    found: dict[str, _Value] = {}
    for given, value in _leaves(tree):
        name = RENAMED.get(given, given)
        if name not in SETTINGS and name not in _SECTIONS:
            near = nearest_setting(given)
            hint = f"did you mean {near}?" if near else f"known keys: {', '.join(_siblings(given))}"
            raise ConfigError(given, f"is not a setting; {hint}{_origin(source)}")
        if name in found:
            raise ConfigError(name, f"is given twice, as {given} too; keep one of them{_origin(source)}")
        if name != given:
            logger.warning(
                "%s is called %s now; its old name goes with the next release%s", given, name, _origin(source)
            )
        found[name] = _Value(value, source)
    return found


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, given in tree.items():
        name = f"{prefix}{key}"
        value = msgspec.structs.asdict(given) if name in _SECTIONS and isinstance(given, Settings) else given
        if name in _SECTIONS and isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _siblings(name: str) -> list[str]:
    """The names of the settings in the same section as `name`."""
    section = max((known for known in _SECTIONS if name.startswith(f"{known}.")), key=len, default="")
    return sorted(known for known in (*SETTINGS, *_SECTIONS) if known.rpartition(".")[0] == section)


def _build(found: Mapping[str, _Value], source: str = "") -> EngineConfig:
    if "model" not in found:
        raise ConfigError("model", "is required: a model directory, a hub id, or 'demo'" + _origin(source))
    tree = nested({name: _read(value, name) for name, value in found.items()})
    try:
        return msgspec.convert(tree, EngineConfig, strict=False)
    except msgspec.ValidationError:
        raise _misfit_error(tree, found, source) from None


def _read(value: _Value, name: str) -> Any:
    """The value; true and false become the setting's own word for them, such as on or off."""
    setting, given = SETTINGS.get(name), value.given
    if setting is None:
        return given
    word = _SWITCHES.get(str(given).lower()) if isinstance(given, str | bool) else None
    if word is not None and setting.kind is bool:
        return word
    state = "on" if word else "off"
    return state if word is not None and state in setting.choices else given


def _misfit_error(tree: Mapping[str, Any], found: Mapping[str, _Value], source: str) -> ConfigError:
    """What is wrong with the values of `tree`, which has known keys only. API keys are never shown."""
    misfit = find_misfit(tree, EngineConfig, strict=False)
    if misfit is None:
        return ConfigError("", f"a setting has a value of the wrong type{_origin(source)}")
    name = misfit.path.partition("[")[0]
    # YAML aliases can repeat a value so often that its text exceeds the memory.
    shown = "" if name == "server.api_keys" else f", got {_SHORT.repr(misfit.value)}{misfit.hint}"
    origin = _origin(found[name].source if name in found else source)
    return ConfigError(misfit.path, f"{misfit.rule}{shown}{origin}")


def _origin(source: str) -> str:
    return f" (in {source})" if source else ""
