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
from numpy.typing import ArrayLike
from torch import Tensor

from smearlens._explain import explained

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

    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
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


def as_numbers(name: str, values: ArrayLike) -> np.ndarray:
    """Argument `name` as float64."""
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers, got {values!r:.60} ({error})") from error


@explained
def proportion_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson (exact binomial) interval of a proportion."""
    from scipy.stats import binomtest

    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials, got {successes} of {trials}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    ends = binomtest(successes, trials).proportion_ci(level, method="exact")
    return float(ends.low), float(ends.high)


@dataclass(frozen=True)
class PairedTest:
    """Two sets of yes-or-no outcomes on the same examples, and whether they differ.

    Attributes:
        only_a: examples that only the first gets right
        only_b: examples that only the second gets right
        n: examples
        p: probability of a split at least as uneven between the two, if both were equally good
    """

    only_a: int
    only_b: int
    n: int
    p: float

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second, in [-1, 1]."""
        return (self.only_a - self.only_b) / self.n


@explained
def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> PairedTest:
    """McNemar's exact test: two-sided binomial test of the examples on which a and b disagree.

    >>> mcnemar([True] * 6 + [False, True], [False] * 5 + [True, True, True]).p  # 5 against 1
    0.21875

    Args:
        a: whether the first is right, example by example
        b: whether the second is right on the same examples

    Raises:
        ValueError: for no examples, lists of different lengths, or what is neither right nor wrong

    Source:
        McNemar 1947; the exact form is the sign test of the discordant pairs
    """
    from scipy.stats import binomtest

    if len(a) != len(b) or not len(a):
        raise ValueError(
            f"a and b must hold outcomes on the same examples, got {len(a)} and {len(b)}"
        )
    if wrong := [x for x in (*a, *b) if x not in (0, 1)]:
        raise ValueError(f"a and b must hold True (right) and False, got {wrong[0]!r}")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    discordant = only_a + only_b
    p = float(binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0
    return PairedTest(only_a, only_b, len(a), p)


@explained
def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that may be compared with one level, in given order.

    The i-th smallest of m becomes max over j <= i of (m - j + 1) p_(j), at most 1.

    >>> holm([0.0625, 0.015625, 0.25])
    [0.125, 0.046875, 0.25]

    Args:
        p_values: of all comparisons of a table

    Raises:
        ValueError: for a value outside [0, 1]

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure"
    """
    if wrong := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p_values must be in [0, 1], got {wrong[0]}")
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = least
    return corrected
