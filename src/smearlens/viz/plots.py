"""Plots for matplotlib: each draws given numbers onto given `Axes`, labels units, and returns them.

Nothing is computed here beyond placing marks; every interval and null is drawn from what it is
given. Leaves out figures as files (`viz.report`) and interactive pictures (`viz.widgets`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#2f5d9b", "#c8553d", "#3b8a6e", "#8b5fa3", "#b8860b", "#5b6770", "#a23b72")
NULL = "#9aa3ab"


def draw_kernel_profile(
    ax: Any,
    records: Sequence[Mapping[str, Any]],
    *,
    null: float,
    null_high: float | None = None,
    label: str | None = None,
    colour: str = COLOURS[0],
) -> Any:
    """RMS kernel weight by lag with its interval, and what an untrained kernel has.

    Args:
        ax: matplotlib Axes
        records: from `KernelProfile.records()`: lag, rms, low, high
        null: RMS of an untrained kernel
        null_high: its 97.5 % quantile
        label: of the line
        colour: of the line
    """
    lags = [r["lag"] for r in records]
    rms = [r["rms"] for r in records]
    below = [max(0.0, r["rms"] - r["low"]) for r in records]
    above = [max(0.0, r["high"] - r["rms"]) for r in records]
    ax.errorbar(lags, rms, yerr=[below, above], marker="o", color=colour, capsize=3, label=label)
    ax.axhline(null, color=NULL, linestyle="--", linewidth=1)
    ax.annotate(
        "untrained",
        (1, null),
        xycoords=("axes fraction", "data"),
        fontsize=8,
        color=NULL,
        ha="right",
        va="bottom",
    )
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
    for colour, (name, runs) in zip(COLOURS, curves.items(), strict=False):
        steps = [row["step"] for row in runs[0]]
        columns = list(zip(*([row[key] for row in run] for run in runs), strict=True))
        mean = [sum(column) / len(column) for column in columns]
        ax.plot(steps, mean, color=colour, label=name, linewidth=1.6)
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
        groups: group name to {bar name: (mean, low, high)}
        ylabel: name and unit
        level: a reference level to mark, such as chance
        level_name: what it is
    """
    names = list(next(iter(groups.values())))
    width = 0.8 / len(names)
    for index, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        at = [g + (index - (len(names) - 1) / 2) * width for g in range(len(groups))]
        means = [bars[name][0] for bars in groups.values()]
        below = [max(0.0, bars[name][0] - bars[name][1]) for bars in groups.values()]
        above = [max(0.0, bars[name][2] - bars[name][0]) for bars in groups.values()]
        ax.bar(at, means, width * 0.92, color=colour, label=name)
        ax.errorbar(
            at, means, yerr=[below, above], linestyle="", color="#333", capsize=2, linewidth=0.9
        )
    if level is not None:
        ax.axhline(level, color=NULL, linestyle="--", linewidth=1)
        ax.annotate(
            level_name,
            (1, level),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            color=NULL,
            ha="right",
            va="bottom",
        )
    ax.set_xticks(range(len(groups)), list(groups), fontsize=8)
    ax.set(ylabel=ylabel)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax
