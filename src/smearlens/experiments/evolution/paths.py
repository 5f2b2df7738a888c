"""Where training goes: joint principal components of the losses of single held-out characters.

One fixed random character of each held-out window is a coordinate; the components are fitted over
all seeds and looks of a data set at once (`analysis.loss_paths`). Leaves out the other tables and
figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from smearlens.analysis.loss_paths import loss_paths
from smearlens.experiments.evolution.logs import TRACKED, Numbers, by_data_set, rows_of
from smearlens.viz.plots import COLOURS, NULL

RANDOM_WALK = (0.61, 0.15)  # shares of a random walk in many dimensions, as `loss_paths` says


def token_paths(found: Sequence[Numbers], folders: Sequence[Path]) -> dict[str, Numbers]:
    """The paths of all seeds by data set, from the logs of tracked runs.

    Returns:
        for each data set: "steps" of the looks, "explained" shares of two components, "n_tokens",
        and "paths", by seed a list of points in nats
    """
    where = {(m["task"], m["seed"]): f for m, f in zip(found, folders, strict=True)}
    result = {}
    for name, runs in by_data_set([m for m in found if m["name"] == TRACKED]).items():
        looks = {m["seed"]: rows_of(where[name, m["seed"]], "tracking") for m in runs}
        fitted = loss_paths({str(seed): _losses(rows) for seed, rows in looks.items()})
        result[name] = {
            "steps": [row["step"] for row in looks[runs[0]["seed"]]],
            "explained": [round(share, 4) for share in fitted.explained.tolist()],
            "n_tokens": len(fitted.mean),
            "paths": {
                seed: [[round(x, 3) for x in point] for point in path.tolist()]
                for seed, path in fitted.paths.items()
            },
        }
    return result


def _losses(rows: Sequence[Numbers]) -> torch.Tensor:
    names = [name for name in rows[0] if name.startswith("token_loss/")]
    return torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)


def paths_table(paths: Mapping[str, Numbers]) -> list[list[str]]:
    """Shares of the components, and where paths turn."""
    rows = [[
        "data set", "characters", "first component", "second component", "random walk",
        "updates at the turn: median of the seeds (range)",
    ]]  # fmt: skip
    for name, found in paths.items():
        turns = [found["steps"][turn(path)] for path in found["paths"].values()]
        rows.append([
            name, str(found["n_tokens"]), *(f"{share:.2f}" for share in found["explained"]),
            " and ".join(map(str, RANDOM_WALK)),
            f"{statistics.median(turns):.0f} ({min(turns)} to {max(turns)})",
        ])  # fmt: skip
    return rows


def turn(path: Sequence[Sequence[float | int]]) -> int:
    """The look furthest from the straight line between the first and the last point."""
    points = torch.tensor(path, dtype=torch.float64)
    along = points[-1] - points[0]
    away = points - points[0]
    return int((away[:, 0] * along[1] - away[:, 1] * along[0]).abs().argmax())


def draw_paths(figure: Any, paths: Mapping[str, Numbers], names: Mapping[str, str]) -> None:
    """A panel for each data set, a line for each seed, marks at 0, 4, 16, 64 … updates."""
    figure.set_size_inches(4.2 * len(paths), 3.8)
    axes = figure.subplots(1, len(paths), squeeze=False)[0]
    for ax, (data_set, found) in zip(axes, paths.items(), strict=True):
        marks = _marks(found["steps"])
        for i, (seed, path) in enumerate(found["paths"].items()):
            x, y = zip(*path, strict=True)
            colour = COLOURS[i % len(COLOURS)]
            ax.plot(x, y, color=colour, linewidth=1.2, label=f"seed {seed}")
            ax.plot(
                [x[m] for m in marks], [y[m] for m in marks], "o", color=colour, markersize=3
            )  # fmt: skip
        first = next(iter(found["paths"].values()))
        for m in marks:
            ax.annotate(
                f"{found['steps'][m]:,}", first[m], fontsize=7, color="#5b6770",
                xytext=(4, 4), textcoords="offset points",
            )  # fmt: skip
        for line in (ax.axhline, ax.axvline):
            line(0, color=NULL, linewidth=0.6, zorder=0)
        one, two = found["explained"]
        ax.set(
            title=names[data_set], xlabel=f"first component (nats, {one:.0%} of the variance)",
            ylabel=f"second component (nats, {two:.0%})",
        )  # fmt: skip
    axes[0].legend(frameon=False, fontsize=7)


def _marks(steps: Sequence[int]) -> list[int]:
    """Looks nearest to 0, 4, 16, 64 … updates, and the last one."""
    wanted, power = [0, steps[-1]], 4
    while power < steps[-1] / 2:
        wanted.append(power)
        power *= 4
    return sorted({min(range(len(steps)), key=lambda i: abs(steps[i] - w)) for w in wanted})
