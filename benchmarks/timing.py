"""Ratios of running times, measured so that a busy machine hurts both sides alike.

Subject and peer alternate in one process and each round gives one ratio; a row reports their median
with the 10th and 90th percentile. Processor time on one thread decides. The wall clock on all
threads is shown beside it: that is what a user waits for, and means little on a busy machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from statistics import median, quantiles

import torch

Row = dict[str, str | float | bool]


def compare(
    name: str,
    shape: tuple[int, ...],
    subject: Callable[[], object],
    peer: Callable[[], object],
    bar: float,
    *,
    rounds: int = 9,
) -> Row:
    """Time `subject` as a fraction of `peer`, which must stay below `bar`."""
    threads = torch.get_num_threads()
    wall = _ratios(subject, peer, 5, time.perf_counter)
    torch.set_num_threads(1)
    try:
        ratios = _ratios(subject, peer, rounds, time.process_time)
    finally:
        torch.set_num_threads(threads)
    tenths = quantiles(ratios, n=10, method="inclusive")
    found = row(name, shape, median(ratios), bar, low=tenths[0], high=tenths[-1])
    return found | {"wall": median(wall), "threads": threads, "load": os.getloadavg()[0]}


def _ratios(
    subject: Callable[[], object],
    peer: Callable[[], object],
    rounds: int,
    clock: Callable[[], float],
) -> list[float]:
    subject()
    peer()
    repeats = max(1, min(200, int(0.03 / max(1e-6, _time(peer, 1, clock)))))
    pairs = [[_time(run, repeats, clock) for run in (subject, peer)] for _ in range(rounds)]
    return [mine / theirs for mine, theirs in pairs]


def row(
    name: str,
    shape: tuple[int, ...],
    ratio: float,
    bar: float,
    *,
    low: float | None = None,
    high: float | None = None,
) -> Row:
    """A result; something measured once has no spread."""
    low, high = (ratio if edge is None else edge for edge in (low, high))
    ok = ratio <= bar
    return {
        "name": name, "shape": str(shape), "ratio": ratio, "low": low, "high": high, "bar": bar,
        "ok": ok,
    }  # fmt: skip


def report(rows: Iterable[Row]) -> list[Row]:
    """Print rows as they come, and what the machine was doing meanwhile; hand them back."""
    print(f"torch {torch.__version__}, {os.cpu_count()} cores; wall clock: median, threads, load")
    done = []
    for r in rows:
        spread = f"[{r['low']:.3g}, {r['high']:.3g}]" if r["low"] != r["high"] else ""
        wall = f"{r['wall']:.2f} x{r['threads']} @{r['load']:.1f}" if "wall" in r else ""
        verdict = "ok" if r["ok"] else "ABOVE"
        print(
            f"{verdict:5} {r['ratio']:8.3g} {spread:16} bar {r['bar']:<7.3g} {wall:14} "
            f"{r['name']} {r['shape']}",
            flush=True,
        )
        done.append(r)
    return done


def _time(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return clock() - start
