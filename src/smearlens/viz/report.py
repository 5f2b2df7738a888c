"""A study's report: one self-contained page, verdicts first, its figures and tables also as files.

Reads only plain numbers. Leaves out what each study has to say (a list of `Part`s, made by the
reports of the studies) and the pieces of a page (`viz.page`).
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smearlens._files import write_atomically
from smearlens.analysis.stats import over_seeds
from smearlens.viz import page
from smearlens.viz.widgets import page_bundle

Study = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A section of a report.

    Attributes:
        title: its heading
        name: of `figures/NAME.png` and `tables/NAME.md`
        text: what is seen and how it was made, one paragraph
        table: rows of cells, the first one the head
        draw: draws the picture onto a matplotlib Figure
        widgets: interactive pictures of `viz.widgets`
    """

    title: str
    text: str = ""
    name: str = field(kw_only=True)
    table: Sequence[Sequence[str]] | None = None
    draw: Callable[[Any], None] | None = None
    widgets: Sequence[Any] = ()


def write_report(study: Study, out: Path, parts: Sequence[Part], *, title: str) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.md` into `out`; returns the page.

    Args:
        study: the contents of `result.json`: command, config, recipe, verdicts, versions
        out: the folder
        parts: the sections after the verdicts, in order
        title: of the page

    Raises:
        ValueError: if two parts have one name
    """
    names = [part.name for part in parts]
    if len(set(names)) != len(names):
        raise ValueError(f"parts must have different names, got {names}")
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class='lead'>{html.escape(_lead(study))}</p>",
    ]
    if study["verdicts"]:
        body += ["<h2>Claims and verdicts</h2>", *map(page.claim_box, study["verdicts"])]
    if any(part.widgets for part in parts):
        body.append(page_bundle())
    for part in parts:
        body += _section(part, out)
    body.append(_again(study))
    write_atomically(out / "report.html", page.frame(f"smearlens: {study['study']}", body))
    return out / "report.html"


def estimate(values: Sequence[float], shape: str = ".3f") -> str:
    """Mean and interval over seeds as the text of a cell, each number in this format.

    >>> estimate([0.25, 0.25, 0.25]), estimate([0.25], "+.2f")
    ('0.250 [0.250, 0.250]', '+0.25 (1 seed)')
    """
    e = over_seeds(values)
    mean, low, high = (format(number, shape) for number in (e.mean, e.low, e.high))
    return f"{mean} [{low}, {high}]" if e.n > 1 else f"{mean} (1 seed)"


def mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lowest and highest seed: a bar of `viz.plots.draw_bars`."""
    return sum(values) / len(values), min(values), max(values)


def _lead(study: Study) -> str:
    seeds = study["config"].get("seeds")
    start = f"{seeds} seeds per model; intervals are 95 % (Student's t over seeds). "
    return (start if seeds else "") + study.get("recipe", "")


def _section(part: Part, out: Path) -> list[str]:
    """The HTML of a part; its picture and table go into files too."""
    found = [f"<h2>{html.escape(part.title)}</h2>"]
    if part.text:
        found.append(f"<p class='soft'>{html.escape(part.text)}</p>")
    if part.draw is not None:
        picture = page.png(part.draw)
        (out / "figures").mkdir(exist_ok=True)
        write_atomically(out / "figures" / f"{part.name}.png", picture)
        found.append(page.picture(picture, part.title))
    if part.table is not None:
        rows = [list(row) for row in part.table]
        (out / "tables").mkdir(exist_ok=True)
        write_atomically(out / "tables" / f"{part.name}.md", page.markdown(rows))
        found.append(page.table(rows))
    return found + [widget.to_html(bundle="page") for widget in part.widgets]


def _again(study: Study) -> str:
    """What is needed to run the study again."""
    keys = ("command", "config", "versions", "cpu_seconds")
    settings = {key: study[key] for key in keys if key in study}
    return (
        "<h2>To run it again</h2>"
        f"<pre>{html.escape(study['command'] or 'run from Python')}</pre>"
        f"<pre>{html.escape(json.dumps(settings, indent=1))}</pre>"
    )
