"""Plots for matplotlib: each draws given numbers onto given `Axes`, labels units, and returns them.

Nothing is computed here beyond placing marks; every interval and null is drawn from what it is
given. Leaves out figures as files (`viz.report`) and interactive pictures (`viz.widgets`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smearlens.analysis.kernels import KernelProfile

COLOURS = ("#2f5d9b", "#c8553d", "#3b8a6e", "#8b5fa3", "#b8860b", "#5b6770", "#a23b72")
NULL = "#9aa3ab"
LINES = ("-", "--", ":", "-.")  # the first seven lines differ in colour, the next seven in this too
HATCHES = ("", "///", "...", "xxx")  # of bars, the same


def draw_kernel_profile(
    ax: Any,
    records: KernelProfile | Sequence[Mapping[str, Any]],
    *,
    null: float | int | None = None,
    null_high: float | int | None = None,
    label: str | None = None,
    colour: str = COLOURS[0],
) -> Any:
    """RMS kernel weight by lag with its interval, and what an untrained kernel has.

    Args:
        ax: matplotlib Axes
        records: a `KernelProfile`, or rows as its `records()` gives them: lag, rms, low, high
        null: RMS of an untrained kernel; a `KernelProfile` knows it
        null_high: its 97.5 % quantile; the same
        label: of the line
        colour: of the line

    Raises:
        ValueError: for rows without `null`: every profile is drawn beside its null
    """
    if isinstance(records, KernelProfile):
        null = records.null_rms if null is None else null
        null_high = records.null_high if null_high is None else null_high
        records = records.records()
    if null is None:
        raise ValueError("null is missing: pass that of the profile, null=profile.null_rms")
    lags = [r["lag"] for r in records]
    rms = [r["rms"] for r in records]
    below = [max(0.0, r["rms"] - r["low"]) for r in records]
    above = [max(0.0, r["high"] - r["rms"]) for r in records]
    ax.errorbar(lags, rms, yerr=[below, above], marker="o", color=colour, capsize=3, label=label)
    _mark_level(ax, null, "untrained")
    if null_high is not None:
        ax.axhspan(null, null_high, color=NULL, alpha=0.15, linewidth=0)
    if min(lags) < 0:
        ax.axvspan(min(lags) - 0.5, -0.5, color=COLOURS[1], alpha=0.12, linewidth=0)
        ax.annotate(
            "future",
            (min(lags) - 0.4, 0.97),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color=COLOURS[1],
            va="top",
        )
    ax.set(xlabel="lag (tokens; 1 = previous token)", ylabel="RMS weight", ylim=(0, None))
    ax.set_xticks(lags)
    return ax


def draw_pattern(
    ax: Any,
    pattern: Sequence[Sequence[float]],
    *,
    title: str = "",
    marks: Sequence[tuple[int, int]] = (),
) -> Any:
    """One attention pattern as a picture, query down, key across.

    Args:
        ax: matplotlib Axes
        pattern: weights [query key]
        title: of the picture
        marks: (query, key) pairs to ring, such as the positions an induction head should look at
    """
    ax.imshow(pattern, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    if marks:
        query, key = zip(*marks, strict=True)
        ax.plot(
            key,
            query,
            linestyle="",
            marker="s",
            markersize=3.2,
            markerfacecolor="none",
            markeredgecolor=COLOURS[1],
            markeredgewidth=0.6,
        )
    ax.set(xlabel="key (position)", ylabel="query (position)", title=title)
    return ax


def draw_curves(
    ax: Any,
    curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    *,
    key: str,
    ylabel: str,
    best_possible: float | None = None,
) -> Any:
    """Learning curves: mean over seeds as a line, the seeds' range as a band.

    Args:
        ax: matplotlib Axes
        curves: variant name to one list of {"step", key} per seed
        key: what to draw
        ylabel: its name and unit
        best_possible: a level to mark, such as an entropy floor
    """
    for index, (name, runs) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        steps = [row["step"] for row in runs[0]]
        columns = list(zip(*([row[key] for row in run] for run in runs), strict=True))
        mean = [sum(column) / len(column) for column in columns]
        ax.plot(steps, mean, _round(LINES, index), color=colour, label=name, linewidth=1.6)
        ax.fill_between(
            steps,
            [min(c) for c in columns],
            [max(c) for c in columns],
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
    if best_possible is not None:
        ax.axhline(best_possible, color=NULL, linestyle="--", linewidth=1)
    ax.set(xlabel="updates", ylabel=ylabel)
    ax.legend(frameon=False, fontsize=8)
    return ax


def draw_bars(
    ax: Any,
    groups: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    ylabel: str,
    level: float | None = None,
    level_name: str = "",
) -> Any:
    """Grouped bars with intervals.

    Args:
        ax: matplotlib Axes
        groups: group name to {bar name: (mean, low, high)}; a group may lack a bar
        ylabel: name and unit
        level: a reference level to mark, such as chance
        level_name: what it is

    Raises:
        ValueError: if there is no bar
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    if not names:
        raise ValueError(f"groups must hold at least one bar, got {dict(groups)}")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        shown = [(g, bars[name]) for g, bars in enumerate(groups.values()) if name in bars]
        at = [g + (index - (len(names) - 1) / 2) * width for g, _ in shown]
        means = [mean for _, (mean, _, _) in shown]
        below = [max(0.0, mean - low) for _, (mean, low, _) in shown]
        above = [max(0.0, high - mean) for _, (mean, _, high) in shown]
        hatch = _round(HATCHES, index)
        look = {"hatch": hatch, "edgecolor": "white", "linewidth": 0} if hatch else {}
        colour = COLOURS[index % len(COLOURS)]
        ax.bar(at, means, width * 0.92, color=colour, label=name, **look)
        ax.errorbar(
            at, means, yerr=[below, above], linestyle="", color="#333", capsize=2, linewidth=0.9
        )
    if level is not None:
        _mark_level(ax, level, level_name)
    ax.set_xticks(range(len(groups)), list(groups), fontsize=8)
    ax.set(ylabel=ylabel)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _round(kinds: Sequence[str], index: int) -> str:
    """The kind of line or hatch of entry `index`: another each time the colours start anew."""
    return kinds[index // len(COLOURS) % len(kinds)]


def _mark_level(ax: Any, level: float | int, name: str) -> None:
    ax.axhline(level, color=NULL, linestyle="--", linewidth=1)
    ax.annotate(  # beside the axes: within them it would lie on the last point or bar
        name, (1.01, level), xycoords=("axes fraction", "data"), fontsize=8, color=NULL,
        ha="left", va="center", annotation_clip=False,
    )  # fmt: skip
