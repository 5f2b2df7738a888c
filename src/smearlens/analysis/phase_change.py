"""When a series over training changes, and whether it does: two segments against a smooth curve.

Leaves out what the series is, and how two series go together (`analysis.association`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from smearlens._explain import explained
from smearlens.analysis.stats import as_numbers, over_seeds

LEAST = 3  # checkpoints in a segment
DEGREE = 5  # of the most flexible polynomial
EVIDENCE = 10.0  # difference in BIC: "very strong" (Kass and Raftery 1995)
Array = np.ndarray


@dataclass(frozen=True)
class PhaseChange:
    """Where a series changes most, and whether a single smooth curve would do as well.

    Attributes:
        step: of the change, the middle (geometric, over seeds) of the checkpoints around it
        low, high: checkpoints between which it lies: the 95 % interval of the mean over seeds,
            widened to checkpoints. With one seed only the two checkpoints around the change
        jump: mean over seeds of the second segment minus the first, at the change
        delta_bic: for each seed the BIC of the best smooth curve minus that of two segments;
            above 0 the change is the better account
        n: seeds
    """

    step: float
    low: float
    high: float
    jump: float
    delta_bic: tuple[float, ...]
    n: int

    @property
    def found(self) -> bool:
        """Whether two segments beat a smooth curve by 10 in BIC, at the median of the seeds."""
        return float(np.median(self.delta_bic)) > EVIDENCE

    def __str__(self) -> str:
        evidence = f"ΔBIC {np.median(self.delta_bic):.1f}, n = {self.n}"
        if not self.found:
            return f"no change beyond a smooth curve ({evidence})"
        return f"change at step {self.step:.0f} [{self.low:.0f}, {self.high:.0f}] ({evidence})"


@explained
def phase_change(series: ArrayLike, steps: ArrayLike) -> PhaseChange:
    """Fit two straight segments against log(1 + step), free to jump, and one smooth curve.

    The smooth curve is the best, by BIC, of polynomials in log(1 + step) up to degree 5 and of
    decays to a plateau, exponential or by a power of the step. A change lies between two
    checkpoints, and no number here is finer than that.

    Args:
        series: one value per checkpoint, or [seed checkpoint]
        steps: of the checkpoints, rising from 0 or above

    Raises:
        ValueError: for fewer than 8 checkpoints, shapes that do not fit, or values not finite
    """
    values = np.atleast_2d(as_numbers("series", series))
    time = as_numbers("steps", steps)
    least = DEGREE + LEAST
    if values.ndim != 2 or time.ndim != 1 or values.shape[1] != len(time) or len(time) < least:
        raise ValueError(
            f"series must be [checkpoint] or [seed checkpoint] with at least {least} checkpoints "
            f"and a step for each, got {np.shape(series)} and {np.shape(steps)}"
        )
    rising = (np.diff(time) > 0).all() and time[0] >= 0 and np.isfinite(time).all()
    if not rising or not np.isfinite(values).all():
        raise ValueError("steps must rise from 0 or above, and series must be finite")
    smooth = list(_smooth_designs(time))
    fits = [_fit(y, np.log1p(time), smooth) for y in values]
    breaks = [fit[0] for fit in fits]
    low, high = _interval(breaks, np.log1p(time))
    middle = np.mean([_middle(np.log1p(time), b) for b in breaks])
    return PhaseChange(
        float(np.expm1(middle)), float(time[low]), float(time[high]),
        float(np.mean([jump for _, jump, _ in fits])),
        tuple(delta for _, _, delta in fits), len(values),
    )  # fmt: skip


def _fit(y: Array, x: Array, smooth: list[tuple[Array, int]]) -> tuple[int, float, float]:
    """First checkpoint of the second segment, the jump to it, and what it gains in BIC."""
    floor = len(y) * (1e-9 * max(np.ptp(y), np.abs(y).max(), 1e-100)) ** 2  # rounding
    line = np.column_stack([np.ones(len(x)), x])

    def halves(b: int) -> tuple[float, float]:
        (first, before), (second, after) = (
            _least_squares(line[s], y[s]) for s in (slice(b), slice(b, None))
        )
        there = np.array([1, _middle(x, b)])
        return before + after, float(there @ (second - first))

    found = {b: halves(b) for b in range(LEAST, len(y) - LEAST + 1)}
    best = min(found, key=lambda b: found[b][0])
    apart = _bic(max(found[best][0], floor), len(y), 5)
    together = min(
        _bic(max(_least_squares(design, y)[1], floor), len(y), k) for design, k in smooth
    )
    return best, found[best][1], together - apart


def _smooth_designs(steps: Array) -> Iterator[tuple[Array, int]]:
    """Curves that are linear in their coefficients, with the number of free parameters."""
    x = np.log1p(steps)
    x = (x - x.mean()) / np.ptp(x)
    for degree in range(1, DEGREE + 1):
        yield np.vander(x, degree + 1), degree + 1
    ones, last = np.ones(len(x)), steps[-1]
    for scale in np.geomspace(max(steps[1], last / 1e4) / 2, 2 * last, 40):
        yield np.column_stack([ones, np.exp(-steps / scale)]), 3
        for power in (0.5, 1.0, 2.0):
            yield np.column_stack([ones, (1 + steps / scale) ** -power]), 4


def _least_squares(design: Array, y: Array) -> tuple[Array, float]:
    """Coefficients, and the sum of the squared residuals."""
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    return coefficients, float(np.square(y - design @ coefficients).sum())


def _bic(rss: float, n: int, parameters: int) -> float:
    """Of a fit with normal errors of unknown size, up to a constant."""
    return n * np.log(rss / n) + parameters * np.log(n)


def _middle(x: Array, first: int) -> float:
    """Half way between the checkpoints around the change."""
    return float(x[first - 1] + x[first]) / 2


def _interval(breaks: list[int], x: Array) -> tuple[int, int]:
    """Checkpoints around the interval of the mean change over seeds."""
    if len(breaks) == 1:
        return breaks[0] - 1, breaks[0]
    over = over_seeds([_middle(x, b) for b in breaks])
    low = int(np.searchsorted(x, over.low, side="right")) - 1
    high = int(np.searchsorted(x, over.high, side="left"))
    return max(low, 0), min(high, len(x) - 1)
