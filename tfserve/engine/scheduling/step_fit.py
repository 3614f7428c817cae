"""How step times follow from a step's work: least squares that stays non-negative and bears outliers. Torch-free."""

from __future__ import annotations

import numpy as np

from tfserve.arrays import Floats

_MAX_ROUNDS = 20
"""Rounds of a fit; six coefficients need fewer."""

_OUTLIER = 3.0
"""A step this many typical errors off the fit (a page fault, a neighbour's burst) stops pulling harder."""

_MIN_ERROR = 0.02
"""No fit is expected to be nearer: where decoding fits to a hair, prompts a little off are no outliers."""


def fit_step_time(
    work: Floats, seconds: Floats, prior: Floats, min_scale: Floats, *, prior_strength: Floats | float
) -> Floats:
    """Non-negative coefficients [k] with the least squared relative error, drawn to `prior` where steps tell nothing.

    `work` [n, k] is what each step did and `seconds` [n] what it took, the oldest first. `min_scale` [k] says how
    large a coefficient may be whose prior is next to nothing. `prior_strength`, of all or [k] of
    each, is the weight of the prior beside one step, squared relative error.
    """
    # Relative error: a decode step of 5 ms counts as much as a prefill of 500. Recent half counts double.
    weight = np.where(np.arange(len(seconds)) >= len(seconds) // 2, 2.0, 1.0) / seconds**2
    scale = np.maximum(prior, min_scale)
    beta = _solve(work, seconds, weight, prior, scale, strength=prior_strength)
    error = np.abs(work @ beta - seconds) / seconds
    typical = max(float(np.median(error)), _MIN_ERROR)
    if (error > _OUTLIER * typical).any():
        weight = weight * np.minimum(1.0, _OUTLIER * typical / np.maximum(error, 1e-12))
        beta = _solve(work, seconds, weight, prior, scale, strength=prior_strength)
    return beta


def _solve(x: Floats, y: Floats, weight: Floats, prior: Floats, scale: Floats, *, strength: Floats | float) -> Floats:
    """Ridge towards `prior` in units of `scale`, all coefficients non-negative."""
    # In units of the prior all unknowns are near 1, whatever their dimension.
    xs = x * scale
    gram = (xs * weight[:, None]).T @ xs + np.eye(len(scale)) * strength
    target = (xs * weight[:, None]).T @ y + strength * prior / scale
    best = np.linalg.solve(gram, target)
    if (best < 0).any():
        best = _non_negative(gram, target)
    return best * scale


def _non_negative(gram: Floats, target: Floats) -> Floats:
    """The minimum of x'Gx/2 - t'x over x >= 0, by Lawson and Hanson's active sets."""
    best = np.zeros_like(target)
    free = np.zeros(len(target), np.bool_)
    for _ in range(_MAX_ROUNDS):
        gradient = np.where(free, 0.0, target - gram @ best)
        if gradient.max() <= 1e-9 * np.abs(target).max():
            break
        free[int(gradient.argmax())] = True
        while True:
            step = np.zeros_like(target)
            step[free] = np.linalg.solve(gram[np.ix_(free, free)], target[free])
            negative = free & (step <= 0)
            if not negative.any():
                best = step
                break
            # As far towards the unbounded minimum as all stay non-negative; a coefficient that gets to 0 is fixed.
            share = float((best[negative] / np.maximum(best[negative] - step[negative], 1e-300)).min())
            best = np.maximum(best + share * (step - best), 0.0)
            free &= ~(negative & (best <= 1e-12))
            if not free.any():
                break
    return best
