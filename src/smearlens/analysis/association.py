"""Whether two measures go together: over runs, within a run, within groups.

Runs (seeds) are the independent units. Within one run both series follow the step, so that their
plain correlation says nothing: it is not offered. Leaves out what is measured, and when it changes
(`analysis.phase_change`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from smearlens._explain import explained
from smearlens.analysis.stats import RESAMPLES, as_numbers

ENOUGH = 5  # independent units; with fewer a correlation describes, and shows nothing
PERMUTATIONS = 5000
ROUNDING = 1e-12  # relative to the largest value: below it a difference is none
Kind = Literal["pearson", "spearman"]
Array = np.ndarray


@dataclass(frozen=True)
class Correlation:
    """A correlation with its interval over independent units.

    Attributes:
        kind: "pearson" or "spearman"
        value: in [-1, 1]; NaN if a side is constant
        low, high: percentile bootstrap interval over units; [-1, 1] for fewer than 5
        p_value: share of permutations of the pairing (exact up to 7 units) that correlate at least
            as much; NaN where pairs are not exchangeable
        n: independent units
    """

    kind: Kind
    value: float
    low: float
    high: float
    p_value: float
    n: int

    @property
    def descriptive(self) -> bool:
        """Whether there are too few units for more than a description."""
        return self.n < ENOUGH

    def __str__(self) -> str:
        text = f"{self.kind} {self.value:.2f} [{self.low:.2f}, {self.high:.2f}], n = {self.n}"
        return text + " (descriptive only)" if self.descriptive else text


@dataclass(frozen=True)
class Association:
    """How a metric and a loss go together over runs, by rank and linearly."""

    spearman: Correlation
    pearson: Correlation


@dataclass(frozen=True)
class WithinRun:
    """How two series of one run go together once their common trend is taken out.

    One run: to claim anything, take these over the seeds (`stats.over_seeds`).

    Attributes:
        differences: Pearson correlation of the changes from each checkpoint to the next
        rank_differences: Spearman correlation of the same
        partial: Pearson correlation of what a straight line in log(1 + step) leaves
        n: checkpoints
    """

    differences: float
    rank_differences: float
    partial: float
    n: int


@explained
def association(metric: ArrayLike, loss: ArrayLike, *, level: float | int = 0.95) -> Association:
    """Correlations over runs: one number of each per run, such as at the end of training.

    A percentile bootstrap interval of a correlation is rough for few runs: read the permutation
    p-value beside it. Fewer than 5 runs get [-1, 1], which says nothing, and are marked
    "descriptive only".

    Args:
        metric: one value per run
        loss: one value per run, in the same order
        level: of the intervals

    Raises:
        ValueError: for series of different length, fewer than 3 runs, or values that are not finite
    """
    x, y = _pair(metric, loss, ("metric", "loss"), 3)
    _check_level(level)
    units = np.arange(len(x))

    def of(kind: Kind) -> Correlation:
        def statistic(rows: Array) -> float:
            return _correlation(x[rows], y[rows], kind)

        return _with_interval(kind, statistic, units, level, _permutation_p(x, y, kind))

    return Association(of("spearman"), of("pearson"))


@explained
def association_within_run(metric: ArrayLike, loss: ArrayLike, steps: ArrayLike) -> WithinRun:
    """Correlations of two series over the checkpoints of one run, without their common trend.

    Args:
        metric: one value per checkpoint
        loss: one value per checkpoint
        steps: of the checkpoints, rising

    Raises:
        ValueError: for series of different length or fewer than 4 checkpoints
    """
    x, y = _pair(metric, loss, ("metric", "loss"), 4)
    time = np.log1p(_rising(steps, len(x)))
    dx, dy = (_rounded(np.diff(v), v) for v in (x, y))
    rest_x, rest_y = (_residual(v, time[:, None]) for v in (x, y))
    return WithinRun(
        differences=_correlation(dx, dy, "pearson"),
        rank_differences=_correlation(dx, dy, "spearman"),
        partial=_correlation(rest_x, rest_y, "pearson"),
        n=len(x),
    )


@explained
def partial_correlation(
    x: ArrayLike,
    y: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    given: Sequence[ArrayLike] = (),
    units: Sequence[Hashable] | None = None,
    kind: Kind = "pearson",
    level: float | int = 0.95,
) -> Correlation:
    """Correlation of x and y within groups and given covariates.

    Group means, then a linear fit on the covariates (also taken from their group means), are
    subtracted from both sides; what is left is correlated.

    Args:
        x: one value per observation, such as the entropy along a generated text
        y: another, such as the quality of that text
        groups: of each observation, for example (prompt, temperature)
        given: covariates, each with one value per observation
        units: the independent unit of each observation, for example its seed; resampled whole.
            Default: every observation is one
        kind: "spearman" takes ranks of everything first
        level: of the interval

    Returns:
        the correlation; its p-value is NaN, since observations of one unit are not exchangeable

    Raises:
        ValueError: for lengths that differ, an unknown kind, or a group for each observation
    """
    x, y = _pair(x, y, ("x", "y"), 3)
    _check_level(level)
    if kind not in ("pearson", "spearman"):
        raise ValueError(f"kind must be 'pearson' or 'spearman', got {kind!r}")
    covariates = [_pair(x, c, ("x", "given"), 3)[1] for c in given]
    group = _codes(groups if groups is not None else [0] * len(x), "groups", len(x))
    if group.max() + 1 == len(x):
        raise ValueError("groups has a group for each observation: nothing varies within any")
    unit = _codes(units if units is not None else list(range(len(x))), "units", len(x))
    columns = [_ranks(v) if kind == "spearman" else v for v in (x, y, *covariates)]
    table = np.stack(columns, 1)

    def statistic(rows: Array) -> float:
        centred = _within(table[rows], group[rows])
        centred[:, np.abs(centred).max(0) <= ROUNDING * np.abs(table).max(0)] = 0
        rest_x, rest_y = (_residual(v, centred[:, 2:]) for v in centred[:, :2].T)
        return _correlation(rest_x, rest_y, "pearson")

    return _with_interval(kind, statistic, unit, level, float("nan"))


def _with_interval(
    kind: Kind,
    statistic: Callable[[Array], float],
    units: Array,
    level: float | int,
    p_value: float,
) -> Correlation:
    """`statistic` of all rows, with a bootstrap over whole units; degenerate resamples left out."""
    n = int(units.max()) + 1
    value = statistic(np.arange(len(units)))
    if n < ENOUGH or np.isnan(value):
        return Correlation(kind, value, -1.0, 1.0, p_value, n)
    members = [np.flatnonzero(units == unit) for unit in range(n)]
    draws = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    found = [statistic(np.concatenate([members[unit] for unit in draw])) for draw in draws]
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Correlation(kind, value, float(low), float(high), p_value, n)


def _permutation_p(x: Array, y: Array, kind: Kind) -> float:
    """Two-sided, over all pairings if there are few."""
    from scipy.stats import permutation_test

    if np.isnan(_correlation(x, y, kind)):
        return float("nan")
    if kind == "spearman":
        x, y = _ranks(x), _ranks(y)
    y = y - y.mean()
    result = permutation_test(
        (x - x.mean(),), lambda a, axis: np.abs(a @ y), permutation_type="pairings",
        n_resamples=PERMUTATIONS if len(x) > 7 else np.inf, alternative="greater",
        vectorized=True, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(result.pvalue)


def _correlation(x: Array, y: Array, kind: Kind) -> float:
    """NaN if a side is constant, up to rounding."""
    if kind == "spearman":
        x, y = _ranks(x), _ranks(y)
    dx, dy = x - x.mean(), y - y.mean()
    size = np.linalg.norm(dx) * np.linalg.norm(dy)
    least = ROUNDING * max(np.abs(x).max(), 1e-300) * max(np.abs(y).max(), 1e-300)
    return float(np.clip(dx @ dy / size, -1, 1)) if size > least else float("nan")


def _rounded(made: Array, of: Array) -> Array:
    """What was `made` from numbers `of`, to the digits that survive: rounding makes no ranks."""
    step = ROUNDING * max(np.abs(of).max(), 1e-300)
    return np.round(made / step) * step


def _ranks(x: Array) -> Array:
    from scipy.stats import rankdata

    return rankdata(x)


def _within(table: Array, group: Array) -> Array:
    """Each column minus its mean over the group of the row."""
    counts = np.bincount(group, minlength=group.max() + 1)[:, None]
    sums = np.stack([np.bincount(group, weights=column) for column in table.T], 1)
    return table - (sums / np.maximum(counts, 1))[group]


def _residual(y: Array, on: Array) -> Array:
    """What a linear fit with intercept leaves of y; zeros where only rounding is left."""
    design = np.column_stack([np.ones(len(y)), on])
    rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return np.where(np.abs(rest).max() > ROUNDING * np.abs(y).max(), rest, 0)


def _pair(x: ArrayLike, y: ArrayLike, names: tuple[str, str], least: int) -> tuple[Array, Array]:
    """Both as float arrays of one length."""
    a, b = (as_numbers(name, v) for name, v in zip(names, (x, y), strict=True))
    if a.ndim != 1 or a.shape != b.shape or len(a) < least:
        raise ValueError(
            f"{names[0]} and {names[1]} must be two series of the same length, at least {least}; "
            f"got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            f"{names[0]} and {names[1]} must be finite; leave out the runs without a value"
        )
    return a, b


def _codes(labels: Sequence[Hashable], name: str, length: int) -> Array:
    """0, 1, 2, … for the distinct labels."""
    if len(labels) != length:
        raise ValueError(f"{name} needs one label per observation, got {len(labels)} for {length}")
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(label, len(number)) for label in labels])


def _rising(steps: ArrayLike, length: int) -> Array:
    given = as_numbers("steps", steps)
    rising = given.shape == (length,) and bool((np.diff(given) > 0).all())  # False for nan
    if not rising or not given[0] >= 0 or not np.isfinite(given[-1]):
        raise ValueError(f"steps must be {length} rising numbers from 0 on, got {given.tolist()}")
    return given


def _check_level(level: float | int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}; for 95 % write 0.95")
