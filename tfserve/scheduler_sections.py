"""The sections of the scheduler's settings: what concerns some policies only, and switches for ablations."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from tfserve.settings import AboveZero, Count, NotNegative, Settings, Share, about

ShareOrAll = Annotated[float, Meta(ge=0, le=1)]


class TokenFlowConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Policy tokenflow. Sharing between tenants, under every policy, uses `low_buffer_s` and `background_slack_s` too.

    Times in seconds; docs/scheduling.md says why.
    """

    section: ClassVar[str] = "scheduler.tokenflow."

    low_buffer_s: Annotated[NotNegative, about("a reader with fewer seconds unread needs the device")] = 1.0
    buffer_scale_s: Annotated[AboveZero, about("seconds that scale the penalty for a low buffer")] = 1.0
    underflow_weight: Annotated[NotNegative, about("weight of the penalty for a low buffer")] = 1.0
    buffer_conservativeness: Annotated[
        NotNegative, about("unread text of a preempted reader, as a multiple of swap time plus interval")
    ] = 1.5
    min_residency_s: Annotated[NotNegative, about("minimum seconds that a request stays on the device")] = 1.0
    min_swap_gain_s: Annotated[
        NotNegative, about("seconds of unread text that a preempted request must have beyond the one that replaces it")
    ] = 2.0
    starvation_gap_s: Annotated[
        NotNegative, about("a request worse off by so many seconds may displace even one with a low buffer")
    ] = 5.0
    working_set_step: Annotated[Share, about("how fast the number of admitted readers follows its bound")] = 0.1
    background_slack_s: Annotated[
        NotNegative, about("a request without a reader counts as having so many seconds unread")
    ] = 10.0
    min_prefill_share: Annotated[
        float, Meta(gt=0, lt=1), about("minimum share of time for prompts while readers stall")
    ] = 0.6
    stall_budget_per_wait: Annotated[
        NotNegative, about("how long a reader may stall for prompts, as a share of the longest wait for a first token")
    ] = 0.05


class FcfsConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fcfs policies' estimate of how much of its max_tokens a running request will use (SGLang's new_token_ratio).

    tokenflow uses it where it falls back to first come first served.
    """

    section: ClassVar[str] = "scheduler.fcfs."

    reserve_ratio: Annotated[
        ShareOrAll, about("share of its remaining max_tokens that a running request is expected to use")
    ] = 0.7
    reserve_min_ratio: Annotated[ShareOrAll, about("minimum of that share, which decreases from step to step")] = 0.098
    reserve_decay_steps: Annotated[Count, about("steps until the share reaches its minimum")] = 600
    reserve_clip_tokens: Annotated[Count, about("most tokens that one request is charged")] = 4096

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of bounds, and for settings that contradict each other."""
        super().__post_init__()
        if self.reserve_min_ratio > self.reserve_ratio:
            message = f"must be at least reserve_min_ratio ({self.reserve_min_ratio}), got {self.reserve_ratio}"
            raise self.mistake("reserve_ratio", message)


class AblationConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Switches that turn parts of the scheduler off, to measure what each of them is worth."""

    section: ClassVar[str] = "scheduler.ablation."

    offload: Annotated[bool, about("off: a preempted request is computed again")] = True
    write_through: Annotated[bool, about("off: KV goes to the host only when a request is preempted")] = True
    load_evict_overlap: Annotated[bool, about("off: loads wait for stores")] = True
    priority_writes: Annotated[bool, about("off: KV is stored in order of arrival, not fullest buffer first")] = True
