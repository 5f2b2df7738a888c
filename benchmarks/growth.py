"""How time and memory grow with a size: the exponent of a power law, fitted to a few sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean, linear_regression

import torch
from timing import EXPONENT, Row, row

ROUNDS = 5
LEAST_SECONDS = 0.02  # of a measurement; shorter calls are repeated


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """The p of value = c · size^p by least squares on logarithms, and its 95 % interval.

    Raises:
        ValueError: unless there are three different sizes or more, as many values, all positive
    """
    if len(sizes) != len(values) or len(set(sizes)) < 3 or min(*sizes, *values) <= 0:
        raise ValueError(
            "an exponent needs 3 different sizes or more and as many values, all positive; "
            f"got sizes {list(sizes)}, values {list(values)}"
        )
    from scipy.stats import t

    x, y = ([math.log(n) for n in numbers] for numbers in (sizes, values))
    slope, start = linear_regression(x, y)
    squares = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - fmean(x)) ** 2 for a in x)
    free = len(x) - 2
    reach = float(t.ppf(0.975, free)) * math.sqrt(squares / free / spread)
    return slope, slope - reach, slope + reach


def curve(
    name: str,
    axis: str,
    sizes: Sequence[int],
    values: Sequence[float],
    unit: str,
    bar: float | None = None,
) -> Row:
    """A row whose value is the exponent, and what it was fitted to: `values` in `unit`."""
    exponent, low, high = fit_exponent(sizes, values)
    shape = tuple(sizes)
    found = row(f"{name} against {axis}", shape, exponent, bar, low=low, high=high, unit=EXPONENT)
    return found | {"axis": axis, "sizes": list(sizes), "values": list(values), "of": unit}


def seconds(runs: dict[int, Callable[[], object]]) -> list[float]:
    """Processor time of each on one thread: the least of rounds in which they take turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        repeats = {size: _repeats(run) for size, run in runs.items()}
        rounds = [[_seconds(runs[size], repeats[size]) for size in runs] for _ in range(ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    return [min(column) for column in zip(*rounds, strict=True)]


def _repeats(run: Callable[[], object]) -> int:
    run()
    return max(1, math.ceil(LEAST_SECONDS / max(1e-6, _seconds(run, 1))))


def _seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats
