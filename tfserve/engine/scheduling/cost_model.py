"""CostModel: how long steps and copies take, learnt from measured ones. Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from tfserve.arrays import Floats
from tfserve.engine.scheduling.step_fit import fit_step_time
from tfserve.plan import Ack, Direction

_WINDOW = 256
"""Steps remembered: seconds of decoding, so that the model follows a machine that slows down."""

_PROMPT_WINDOW = 64
"""Steps with prompts are remembered longer: minutes of decoding must not make the model forget what they cost."""

_REFIT_STEPS = 16
_COPIES = 64
_OPEN = 1e-5
"""Strength of a prior that is a guess: it decides only what steps leave open."""

_CALIBRATED = np.array([1e-2, 1e-2, _OPEN, 1e-2, _OPEN, 1e-2])
"""Strength of a prior that was measured: a handful of noisy steps must not overrule it. It knows no long contexts."""

_MIN_STEP_S = 1e-6
"""No step is predicted to take less."""


class StepSample(msgspec.Struct, frozen=True):
    """One step and its `seconds`.

    `decode_ctx` is the sum of the decodes' context lengths; `prefill_ctx` counts attended pairs of the prefill chunks:
    the sum over chunks of n * (start + n / 2).
    """

    n_decode: int
    decode_ctx: float
    n_prefill: int
    prefill_ctx: float
    seconds: float

    def features(self) -> tuple[float, float, float, float, float, float]:
        """What the step time is linear in."""
        has_prompts = float(self.n_prefill > 0)
        return (1.0, self.n_decode, self.decode_ctx, self.n_prefill, self.prefill_ctx, has_prompts)


class StepCoefficients(msgspec.Struct, frozen=True):
    """Seconds: per step, per decoding request, per token of its context, per prompt token, per attended pair.

    `prompts` is what a step takes more for having any: next to nothing on a GPU, much where small products are slow.
    """

    step: float = 5e-3
    decode: float = 5e-5
    decode_ctx: float = 2e-8
    prefill: float = 5e-5
    prefill_ctx: float = 1e-9
    prompts: float = 0.0


_PROMPTS = 5
"""Index of the last coefficient."""

_MIN_SCALE = np.array([5e-4, 5e-6, 2e-9, 5e-6, 1e-10, 5e-3])
"""Coefficients of less than this are next to nothing."""


class CostModel:
    """Predicts step times and copy times. It starts from `prior` and follows the last steps and copies.

    `store_bps` and `load_bps` are bytes/s to start from; `max_num_seqs` bounds the batch of `capacity_tokens_per_s`.
    Calibration is `observe_step` on a few steps before the first request.
    """

    def __init__(
        self,
        *,
        kv_bytes_per_token: int,
        max_num_seqs: int,
        prior: StepCoefficients | None = None,
        store_bps: float = 5e9,
        load_bps: float = 5e9,
    ) -> None:
        prior = prior or StepCoefficients()
        self.kv_bytes_per_token = kv_bytes_per_token
        self._max_num_seqs = max_num_seqs
        self._prior = np.array(msgspec.structs.astuple(prior), np.float64)
        self._strength: Floats | float = _OPEN
        self._beta = self._prior.copy()
        self._steps: deque[StepSample] = deque(maxlen=_WINDOW)
        self._prompts: deque[tuple[int, StepSample]] = deque(maxlen=_PROMPT_WINDOW)
        self._num_steps = 0
        self._links = {Direction.STORE: _Link(store_bps), Direction.LOAD: _Link(load_bps)}

    @property
    def prefill_s_per_token(self) -> float:
        """Seconds that one more prompt token adds to a step, attention over a long context not included."""
        return float(self._beta[3])

    @property
    def prompts_s(self) -> float:
        """Seconds that a step takes more for having prompt tokens at all."""
        return float(self._beta[_PROMPTS])

    @property
    def coefficients(self) -> StepCoefficients:
        """The model of step times as learnt so far."""
        return StepCoefficients(*(float(value) for value in self._beta))

    def bandwidth(self, direction: Direction) -> float:
        """Bytes/s of the copies that ended last."""
        return self._links[direction].bytes_per_s

    def step_s(self, n_decode: float, decode_ctx: float, n_prefill: float = 0, prefill_ctx: float = 0) -> float:
        """Predicted seconds of a step; arguments as StepSample's."""
        work = (1.0, n_decode, decode_ctx, n_prefill, prefill_ctx, float(n_prefill > 0))
        return max(float(self._beta @ work), _MIN_STEP_S)

    def recompute_s(self, num_tokens: npt.ArrayLike) -> Floats:
        """Seconds that computing this many tokens from nothing adds to the steps it joins; elementwise."""
        n = np.asarray(num_tokens, np.float64)
        seconds: Floats = n * (self._beta[3] + self._beta[4] * n / 2)
        return seconds

    def copy_s(self, direction: Direction, num_tokens: npt.ArrayLike) -> Floats:
        """Seconds that the link needs for this many tokens of KV, queueing not included; elementwise."""
        n = np.asarray(num_tokens, np.float64)
        return n * (self.kv_bytes_per_token / self.bandwidth(direction))

    def switch_s(
        self, evict_tokens: npt.ArrayLike, load_tokens: npt.ArrayLike, num_tokens: npt.ArrayLike
    ) -> tuple[Floats, Floats]:
        """Seconds of a round trip by transfer and by recompute, elementwise.

        By transfer: what is not yet on the host goes out, `load_tokens` come in, each behind its queue. By recompute:
        all `num_tokens` anew.
        """
        out = self.queue_s(Direction.STORE) + self.copy_s(Direction.STORE, evict_tokens)
        back = self.queue_s(Direction.LOAD) + self.copy_s(Direction.LOAD, load_tokens)
        return out + back, self.recompute_s(num_tokens)

    def queue_s(self, direction: Direction) -> float:
        """Seconds until a copy submitted now would start."""
        link = self._links[direction]
        return link.queued_bytes / link.bytes_per_s

    def capacity_tokens_per_s(self, mean_ctx: float, kv_tokens: float, prefill_per_output: float = 0.0) -> float:
        """Capacity in generated tokens/s: the best over batches of `mean_ctx` tokens each that fit in `kv_tokens`.

        `prefill_per_output` prompt (or recomputed) tokens are computed for every token generated, and take their share.
        """
        # With non-negative coefficients a larger batch never generates less per second.
        batch = max(1.0, min(self._max_num_seqs, kv_tokens / max(mean_ctx, 1.0)))
        token_s = self.step_s(batch, batch * mean_ctx) / batch
        return 1.0 / (token_s + prefill_per_output * self.prefill_s_per_token)

    def observe_step(self, sample: StepSample) -> None:
        """Learn from a finished step."""
        if sample.seconds <= 0:
            return
        self._steps.append(sample)
        if sample.n_prefill:
            self._prompts.append((self._num_steps, sample))
        self._num_steps += 1
        # The first steps say most; later ones change little each.
        if self._num_steps < _REFIT_STEPS or self._num_steps % _REFIT_STEPS == 0:
            first = self._num_steps - len(self._steps)
            older = [prompt for number, prompt in self._prompts if number < first]
            self._beta = _fit([*older, *self._steps], self._prior, self._strength)

    def calibrate(self, samples: Iterable[StepSample]) -> None:
        """Make these steps the prior, for what the running window leaves open, and forget the window."""
        self._prior = _fit(list(samples), self._prior, _OPEN)
        # What came out as next to nothing may be noise, and at its scale the truth would be far away. But for having
        # prompts a GPU does take next to nothing.
        open_ = (self._prior <= _MIN_SCALE) & (np.arange(len(self._prior)) != _PROMPTS)
        self._strength = np.where(open_, _OPEN, _CALIBRATED)
        self._beta = self._prior.copy()
        self._steps.clear()
        self._prompts.clear()

    def observe_submit(self, direction: Direction, nbytes: int) -> None:
        """Copies of this many bytes joined the queue."""
        self._links[direction].queued_bytes += nbytes

    def observe_cancel(self, direction: Direction, nbytes: int) -> None:
        """Copies of this many bytes left the queue without having run."""
        self._links[direction].leave(nbytes)

    def observe_copy(self, direction: Direction, ack: Ack) -> None:
        """A copy ended: it leaves the queue, and shows the link's bandwidth if it went well."""
        link = self._links[direction]
        link.leave(ack.nbytes)
        if ack.ok and ack.end_s > ack.start_s:
            link.measure(ack.nbytes, ack.end_s - ack.start_s)


class _Link:
    """One direction: bytes waiting, and the bandwidth over the last copies."""

    def __init__(self, bytes_per_s: float) -> None:
        self.queued_bytes = 0
        self.bytes_per_s = bytes_per_s
        self._copies: deque[tuple[int, float]] = deque()
        self._bytes, self._seconds = 0, 0.0

    def leave(self, nbytes: int) -> None:
        self.queued_bytes = max(0, self.queued_bytes - nbytes)

    def measure(self, nbytes: int, seconds: float) -> None:
        self._copies.append((nbytes, seconds))
        self._bytes += nbytes
        self._seconds += seconds
        if len(self._copies) > _COPIES:
            oldest_bytes, oldest_s = self._copies.popleft()
            self._bytes -= oldest_bytes
            self._seconds -= oldest_s
        self.bytes_per_s = self._bytes / self._seconds


def _fit(steps: Sequence[StepSample], prior: Floats, strength: Floats | float) -> Floats:
    """Coefficients of `steps`, the oldest first; see fit_step_time."""
    work = np.array([sample.features() for sample in steps])
    return fit_step_time(
        work, np.array([sample.seconds for sample in steps]), prior, _MIN_SCALE, prior_strength=strength
    )
