"""Ratios of running times, measured so that a busy machine hurts both sides alike.

Subject and peer alternate in one process and each round gives one ratio; a row reports their median
with the 10th and 90th percentile. Processor time on one thread decides. The wall clock on all
threads is shown beside it: that is what a user waits for. While others keep the cores busy it says
nothing, and is left out.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from statistics import median, quantiles

import torch

Row = dict[str, str | float | bool | list[float] | None]

TIME, MEMORY, MB, ERROR, EXPONENT = "time", "memory", "MB", "difference", "exponent"  # units
BUDGET = 1.5  # seconds of processor time after which a comparison has rounds enough
LEAST = 3  # rounds, however long they take


def compare(
    name: str,
    shape: tuple[int, ...],
    subject: Callable[[], object],
    peer: Callable[[], object],
    bar: float | None = 1.0,
    *,
    rounds: int = 7,
    budget: float = BUDGET,
    why: str = "",
) -> Row:
    """Time `subject` as a fraction of `peer`, which must stay below `bar`, if there is one.

    `why` says what makes the subject the slower side, where it is.
    """
    threads = torch.get_num_threads()
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    wall = []
    if load < cores + 1:  # one of them may be this process
        wall = _ratios(subject, peer, 5, time.perf_counter, least=1, budget=budget / 4)
    torch.set_num_threads(1)
    try:
        ratios = _ratios(subject, peer, rounds, time.process_time, least=LEAST, budget=budget)
    finally:
        torch.set_num_threads(threads)
    found = row(name, shape, median(ratios), bar, **tenths(ratios), why=why)
    waited = {"wall": median(wall), "threads": threads} if wall else {}
    return found | waited | {"load": load}


def tenths(ratios: list[float]) -> dict[str, float]:
    """The 10th and the 90th percentile, as `row` takes them."""
    if len(ratios) < 2:
        return {"low": ratios[0], "high": ratios[0]}
    cuts = quantiles(ratios, n=10, method="inclusive")
    return {"low": cuts[0], "high": cuts[-1]}


def _ratios(
    subject: Callable[[], object],
    peer: Callable[[], object],
    rounds: int,
    clock: Callable[[], float],
    *,
    least: int,
    budget: float,
) -> list[float]:
    subject()
    once = _time(peer, 1, clock)
    if once < 0.03:  # the first call also paid for what it loaded
        once = _time(peer, 1, clock)
    repeats = max(1, min(200, int(0.03 / max(1e-6, once))))
    ratios: list[float] = []
    start = time.process_time()
    while len(ratios) < rounds:
        if len(ratios) >= least and time.process_time() - start > budget:
            break
        mine, theirs = (_time(run, repeats, clock) for run in (subject, peer))
        ratios.append(mine / theirs)
    return ratios


def row(
    name: str,
    shape: tuple[int, ...],
    value: float,
    bar: float | None,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = TIME,
    why: str = "",
) -> Row:
    """A result; something measured once has no spread."""
    low, high = (value if edge is None else edge for edge in (low, high))
    ok = math.isfinite(value) and (bar is None or value <= bar)
    return {
        "name": name, "shape": str(shape), "value": value, "low": low, "high": high, "bar": bar,
        "ok": ok, "unit": unit, "why": why,
    }  # fmt: skip


def report(rows: Iterable[Row]) -> list[Row]:
    """Print rows as they come, and what the machine was doing meanwhile; hand them back."""
    print(f"torch {torch.__version__}, {os.cpu_count()} cores; wall clock: median, threads, load")
    done = []
    for r in rows:
        spread = f"[{r['low']:.3g}, {r['high']:.3g}]" if r["low"] != r["high"] else ""
        wall = f"{r['wall']:.2f} x{r['threads']} @{r['load']:.1f}" if "wall" in r else ""
        bar = "no bar" if r["bar"] is None else f"bar {r['bar']:.3g}"
        print(
            f"{'ok' if r['ok'] else 'ABOVE':5} {r['value']:8.3g} {spread:16} {bar:11} {wall:14} "
            f"{r['name']} {r['shape']} ({r['unit']})",
            flush=True,
        )
        done.append(r)
    return done


def _time(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return clock() - start
