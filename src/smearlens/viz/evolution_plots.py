"""Plots of how a model evolves in training: losses, attention, layer similarity.

Each draws given numbers onto given `Axes`, labels units, marks what nothing in particular would
give, and returns the axes. A line comes as a `Band`: `band` makes one of several seeds. Leaves out
figures as files (`viz.report`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from smearlens.viz.plots import COLOURS, LINES, NULL


@dataclass(frozen=True)
class Band:
    """A line over training with its standard error.

    Attributes:
        steps: updates made
        mean: over seeds
        error: standard error of the mean, 0 for a single seed
        n: seeds
    """

    steps: Sequence[float | int]
    mean: Sequence[float | int]
    error: Sequence[float | int]
    n: int


def band(runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> Band:
    """Mean and standard error over seeds of `key`, from the log rows of each seed.

    >>> band([[{"step": 0, "loss": 4.0}], [{"step": 0, "loss": 3.0}]], "loss")
    Band(steps=[0], mean=[3.5], error=[0.5], n=2)

    Args:
        runs: for each seed its rows, each with "step" and `key`
        key: what to draw

    Raises:
        ValueError: if the seeds were not logged at the same steps
    """
    steps = [row["step"] for row in runs[0]] if runs else []
    if not steps or any([row["step"] for row in run] != steps for run in runs):
        raise ValueError(
            f"runs must be one list of rows per seed, all at the same steps; got lists of "
            f"{[len(run) for run in runs]} rows"
        )
    columns = list(zip(*([row[key] for row in run] for run in runs), strict=True))
    error = [stdev(c) / math.sqrt(len(c)) if len(c) > 1 else 0.0 for c in columns]
    return Band(steps, [fmean(c) for c in columns], error, len(runs))


def draw_losses(ax: Any, bands: Mapping[str, Band], *, ylabel: str, mark_best: bool = False) -> Any:
    """Loss curves of some variants, each with the band of its standard error over seeds.

    Args:
        ax: matplotlib Axes
        bands: variant name to its band
        ylabel: which loss, and its unit
        mark_best: ring the lowest mean of each curve: the best step of a validation loss
    """
    for index, (name, line) in enumerate(bands.items()):
        lap, place = divmod(index, len(COLOURS))
        colour = COLOURS[place]
        _draw(ax, line, colour, f"{name} (n = {line.n})", LINES[lap % len(LINES)])
        if mark_best:
            best = min(range(len(line.mean)), key=lambda i: line.mean[i])
            ax.plot(
                line.steps[best], line.mean[best], marker="o", markersize=6, color=colour,
                markerfacecolor="none", linestyle="",
            )  # fmt: skip
    return _finish(ax, ylabel, bool(bands))


def draw_attention_metrics(
    axes: Any,
    entropy: Mapping[str, Band],
    span: Mapping[str, Band],
    *,
    null_entropy: float | int | None = None,
    null_span: float | int | None = None,
    best_step: float | int | None = None,
    entropy_label: str = "entropy / log n",
    span_label: str = "mean distance (tokens)",
) -> Any:
    """Two panels: how spread the attention of each layer is, and how far back it looks.

    Args:
        axes: two matplotlib Axes, entropy first, as `subplots(2, 1)` gives them
        entropy: layer name to its band
        span: layer name to its band
        null_entropy: of an untrained model, or of uniform attention
        null_span: the same
        best_step: step of the lowest validation loss, to mark: what follows is overfitting
        entropy_label: which entropy, and its unit
        span_label: which span, and its unit
    """
    top, bottom = axes
    panels = ((top, entropy, null_entropy, entropy_label), (bottom, span, null_span, span_label))
    for ax, bands, null, ylabel in panels:
        for colour, (layer, line) in zip(_in_order(len(bands)), bands.items(), strict=True):
            _draw(ax, line, colour, layer)
        if null is not None:
            _null(ax, null, "untrained")
        if best_step is not None:
            ax.axvline(best_step, color=NULL, linestyle=":", linewidth=1)
        _finish(ax, ylabel, bool(bands))
    if best_step is not None:
        _note(top, "best validation loss", (best_step, 0.02), ("data", "axes fraction"), ha="left")
    top.set_xlabel("")
    return axes


def draw_layer_similarity(
    ax: Any,
    pairs: Mapping[str, Band],
    *,
    ylabel: str,
    null: Mapping[str, float | int] | None = None,
    null_name: str = "untrained",
) -> Any:
    """Similarity of every pair of layers over training, one line per pair.

    Args:
        ax: matplotlib Axes
        pairs: name of the pair to its band
        ylabel: which similarity, and its unit
        null: name of the pair to its similarity without training, or on shuffled tokens; drawn as
            the range over pairs, and as a tick of each pair's colour at the right edge
        null_name: what the null is
    """
    colours = dict(zip(pairs, _in_order(len(pairs)), strict=True))
    for name, line in pairs.items():
        _draw(ax, line, colours[name], name)
    if null:
        if missing := sorted(pairs.keys() - null.keys()):
            raise ValueError(f"null lacks {missing}: every similarity is drawn beside its null")
        levels = [null[name] for name in pairs]
        ax.axhspan(min(levels), max(levels), color=NULL, alpha=0.25, linewidth=0)
        _note(ax, null_name, (0.01, max(levels)), ("axes fraction", "data"), ha="left")
        for name, colour in colours.items():
            ax.plot(
                1, null[name], marker="_", markersize=10, color=colour, clip_on=False,
                transform=ax.get_yaxis_transform(),
            )  # fmt: skip
    return _finish(ax, ylabel, bool(pairs))


def _draw(ax: Any, line: Band, colour: Any, label: str, style: str = "-") -> None:
    ax.plot(line.steps, line.mean, style, color=colour, label=label, linewidth=1.5)
    low = [m - e for m, e in zip(line.mean, line.error, strict=True)]
    high = [m + e for m, e in zip(line.mean, line.error, strict=True)]
    ax.fill_between(line.steps, low, high, color=colour, alpha=0.2, linewidth=0)


def _null(ax: Any, level: float | int, name: str) -> None:
    ax.axhline(level, color=NULL, linestyle="--", linewidth=1)
    _note(ax, name, (0.99, level), ("axes fraction", "data"), ha="right")


def _note(ax: Any, text: str, at: tuple, coordinates: tuple[str, str], *, ha: str) -> None:
    ax.annotate(
        text, at, xycoords=coordinates, fontsize=8, color="#5b6770", ha=ha, va="bottom",
        xytext=(2 if ha == "left" else -2, 1), textcoords="offset points",
    )  # fmt: skip


def _finish(ax: Any, ylabel: str, named: bool) -> Any:
    """Labels, and the legend beside the lines, where it hides none."""
    ax.set(xlabel="updates", ylabel=ylabel)
    if named:
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def _in_order(count: int) -> list[Any]:
    """Colours of things in an order, such as layers: dark to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]
