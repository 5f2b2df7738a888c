"""Intervals and tests over examples and seeds, on top of scipy.stats (loaded when called).

Leaves out what is measured; every function takes numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval and the number of independent runs behind it."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


def bootstrap_interval(
    values: Float[Tensor, "example head"], level: float = 0.95
) -> Float[Tensor, "head 2"]:
    """Percentile bootstrap interval of the mean over examples, NaN examples left out.

    Args:
        values: one number per example and head
        level: of the interval, in (0, 1)

    Returns:
        lower and upper end per head; NaN with fewer than two valid examples
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}; for 95 % write 0.95")
    from scipy.stats import bootstrap

    ends = torch.full((values.shape[1], 2), torch.nan, dtype=torch.float64)
    columns = values.detach().double().cpu().numpy().T
    for head, column in enumerate(columns):
        sample = column[np.isfinite(column)]
        if len(sample) < 2:
            continue
        with warnings.catch_warnings():  # equal examples: a point interval, which is right
            warnings.simplefilter("ignore")
            result = bootstrap(
                (sample,), np.mean, confidence_level=level, n_resamples=RESAMPLES,
                method="percentile", vectorized=True, rng=np.random.default_rng(0),
            )  # fmt: skip
        ends[head, 0], ends[head, 1] = result.confidence_interval
    return ends


def over_seeds(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean over independent runs with Student's t interval; infinite with a single run."""
    from scipy.stats import t

    data = np.asarray(values, dtype=float)
    n, mean = len(data), float(data.mean())
    if n < 2:
        return Estimate(mean, -float("inf"), float("inf"), n)
    half = float(t.ppf((1 + level) / 2, n - 1) * data.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def paired_over_seeds(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Estimate:
    """`over_seeds` of the differences a - b, run by run."""
    if len(a) != len(b):
        raise ValueError(f"paired values must be equally many, got {len(a)} and {len(b)}")
    return over_seeds([x - y for x, y in zip(a, b, strict=True)], level)


def proportion_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson (exact binomial) interval of a proportion."""
    from scipy.stats import binomtest

    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials, got {successes} of {trials}")
    ends = binomtest(successes, trials).proportion_ci(level, method="exact")
    return float(ends.low), float(ends.high)
