"""The report of the main job: one self-contained page, its figures, its tables.

Reads only the study's plain numbers (the contents of `result.json`). Leaves out measuring,
judging, and the pieces every page is made of (`viz.page`).
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smearlens._files import write_atomically
from smearlens.analysis.stats import over_seeds
from smearlens.viz import page, plots
from smearlens.viz.widgets import page_bundle

Study = dict[str, Any]

ORDER = (
    "attention only", "conv k=3", "conv k=5", "smeared keys", "two layers", "two layers, narrow",
    "conv k=3, same padding",
)  # fmt: skip


def write_compare_report(study: Study, out: Path) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.md` of a comparison; returns the page."""
    (out / "figures").mkdir(exist_ok=True)
    (out / "tables").mkdir(exist_ok=True)
    pictures = {name: page.png(partial(draw, study=study)) for name, draw in FIGURES.items()}
    for name, picture in pictures.items():
        write_atomically(out / "figures" / f"{name}.png", picture)
    tables = {name: make(study) for name, make in TABLES.items()}
    for name, rows in tables.items():
        write_atomically(out / "tables" / f"{name}.md", page.markdown(rows))
    write_atomically(out / "report.html", _page(study, pictures, tables))
    return out / "report.html"


# Tables ----------------------------------------------------------------------------------------


def models_table(study: Study) -> list[list[str]]:
    """Every variant on repeats: parameters, accuracy, scores with control, audit."""
    rows = [[
        "model", "parameters", "accuracy", "loss (nats)", "induction score", "control", "chance",
        "best previous-token score", "audit",
    ]]  # fmt: skip
    for name, runs in _variants(study, "repeats"):
        best = [m["scores"]["induction"]["best"] for m in runs]
        previous = [m["scores"]["prev_token"]["best"]["score"] for m in runs]
        passed = all(m["audit"]["passed"] for m in runs)
        rows.append([
            name, f"{runs[0]['n_parameters']:,}", _estimate([m["accuracy"] for m in runs]),
            _estimate([m["loss"] for m in runs]), _estimate([b["score"] for b in best]),
            _estimate([b["control"] for b in best]), f"{best[0]['chance']:.3f}",
            _estimate(previous), "passed" if passed else "FAILED: reads the future",
        ])  # fmt: skip
    return rows


def roles_table(study: Study) -> list[list[str]]:
    """Accuracy after removing the lags of one role, beside a random change of equal size."""
    rows = [["model", "intact", "without Q's lags", "without K's lags", "without V's lags",
             "without any", "K moved as far at random"]]  # fmt: skip
    for name, runs in _variants(study, "repeats"):
        if not runs[0]["smearing"]:
            continue
        without = [m["smearing"]["without_lags"] for m in runs]
        rows.append([
            name, _estimate([m["accuracy"] for m in runs]),
            *(_estimate([w[role]["accuracy"] for w in without]) for role in ("q", "k", "v", "qkv")),
            _estimate([w["k"]["control_accuracy"] for w in without]),
        ])  # fmt: skip
    return rows


def text_table(study: Study) -> list[list[str]]:
    """Tiny Shakespeare: held-out loss at equal parameters, positions, steps and data."""
    rows = [["model", "parameters", "held-out loss (nats per character)", "audit"]]
    for name, runs in _variants(study, "text"):
        passed = all(m["audit"]["passed"] for m in runs)
        rows.append([
            name, f"{runs[0]['n_parameters']:,}", _estimate([m["val_loss"] for m in runs]),
            "passed" if passed else "FAILED: reads the future",
        ])  # fmt: skip
    return rows


def positional_table(study: Study) -> list[list[str]]:
    """A one-layer model trained on one fixed period, at that period and at others."""
    runs = [m for m in study["measures"] if m["task"] == "fixed"]
    periods = list(runs[0]["positional"]["accuracy_by_period"])
    rows = [["measured on", "value"]]
    for period in periods:
        values = [m["positional"]["accuracy_by_period"][period] for m in runs]
        trained = " (trained on)" if period == periods[0] else ""
        rows.append([f"accuracy at period {period}{trained}", _estimate(values)])
    for key, label in (
        ("induction_at_trained_period", "induction score at the trained period"),
        ("control_at_trained_period", "the same with another example's tokens (control)"),
        ("weight_on_trained_lag_when_nothing_repeats", "weight on that lag when nothing repeats"),
    ):
        rows.append([label, _estimate([m["positional"][key] for m in runs])])
    return rows


TABLES: dict[str, Callable[[Study], list[list[str]]]] = {
    "models": models_table,
    "roles": roles_table,
    "positional": positional_table,
    "text": text_table,
}

# Figures ---------------------------------------------------------------------------------------


def draw_accuracy(figure: Any, study: Study) -> None:
    """Learning curves on repeats and on text."""
    left, right = figure.subplots(1, 2)
    figure.set_size_inches(10, 3.6)
    curves = {name: [m["curve"] for m in runs] for name, runs in _variants(study, "repeats")}
    plots.draw_curves(left, curves, key="accuracy", ylabel="accuracy on repeats (fraction)")
    left.set_ylim(0, 1.02)
    curves = {name: [m["curve"] for m in runs] for name, runs in _variants(study, "text")}
    plots.draw_curves(right, curves, key="loss", ylabel="held-out loss (nats per character)")


def draw_stripes(figure: Any, study: Study) -> None:
    """The best induction head of four models on one example, targets ringed."""
    figure.set_size_inches(10, 3.0)
    names = ("attention only", "conv k=3", "two layers", "conv k=3, same padding")
    chosen = [(n, runs[0]["scores"]) for n, runs in _variants(study, "repeats") if n in names]
    for ax, (name, scores) in zip(figure.subplots(1, len(chosen)), chosen, strict=True):
        best, example = scores["induction"]["best"], scores["example"]
        marks = _targets(example["tokens"])
        plots.draw_pattern(ax, example["patterns"][example["head"]], marks=marks)
        ax.set_title(f"{name}\ninduction {best['score']:.2f}, chance {best['chance']:.2f}",
                     fontsize=9)  # fmt: skip


def head_maps(study: Study) -> str:
    """Interactive maps of all heads of the best layer, two models side by side."""
    import numpy as np

    from smearlens.viz.widgets import attention_heads

    parts = []
    for name, runs in _variants(study, "repeats"):
        if name not in ("conv k=3", "two layers"):
            continue
        example = runs[0]["scores"]["example"]
        weights = np.tril(np.asarray(example["patterns"]))
        weights = weights / weights.sum(-1, keepdims=True)  # undo the rounding of result.json
        widget = attention_heads(
            weights, [f"{token} " for token in example["tokens"]], mask="causal",
            title=f"{name}: {example['layer']}, one example of repeated random tokens",
        )  # fmt: skip
        parts.append(widget.to_html(bundle="page"))
    return "\n".join(parts)


def draw_kernels(figure: Any, study: Study) -> None:
    """Kernel profile of every convolution, seed by seed, with the null."""
    figure.set_size_inches(10, 3.0)
    chosen = [(n, r) for n, r in _variants(study, "repeats") if "kernel" in r[0]["smearing"]]
    for ax, (name, runs) in zip(figure.subplots(1, len(chosen)), chosen, strict=True):
        for colour, run in zip(plots.COLOURS, runs, strict=False):
            kernel = run["smearing"]["kernel"]
            plots.draw_kernel_profile(
                ax, kernel["records"], null=kernel["null_rms"], null_high=kernel["null_high"],
                label=f"seed {run['seed']}", colour=colour,
            )  # fmt: skip
        ax.set_title(name, fontsize=9)
        ax.legend(frameon=False, fontsize=7)


def draw_roles(figure: Any, study: Study) -> None:
    """Accuracy without the lags of each role."""
    figure.set_size_inches(10, 3.2)
    groups = {}
    for name, runs in _variants(study, "repeats"):
        if runs[0]["smearing"] and runs[0]["audit"]["passed"]:
            without = [m["smearing"]["without_lags"] for m in runs]
            groups[name] = {
                "intact": _bar([m["accuracy"] for m in runs]),
                **{
                    f"without {role.upper()}'s lags": _bar([w[role]["accuracy"] for w in without])
                    for role in ("q", "k", "v")
                },
                "K moved at random": _bar([w["k"]["control_accuracy"] for w in without]),
            }
    plots.draw_bars(figure.subplots(), groups, ylabel="accuracy on repeats (fraction)")


FIGURES: dict[str, Callable[..., None]] = {
    "learning": draw_accuracy,
    "stripes": draw_stripes,
    "roles": draw_roles,
    "kernels": draw_kernels,
}

SECTIONS = (
    ("Does the convolution do what a previous-token head does?", "models", "learning",
     "Accuracy counts only tokens that induction can predict. Control: the same head scored on the "
     "tokens of another example; a head that looks a fixed distance back scores as high there."),
    ("Where the best head looks", None, "stripes",
     "One example per model, query down, key across; orange squares are the tokens that followed "
     "an earlier occurrence."),
    ("Which role carries it", "roles", "roles",
     "Each role gets the activation it would have if the convolution or smearing passed only the "
     "present token. The control moves the keys as far in a random direction."),
    ("The kernels", None, "kernels",
     "Root mean square over channels with bootstrap intervals. The average over channels is not "
     "shown: its sign and size are not identifiable. Grey: untrained kernels."),
    ("A fixed period is no test of induction", "positional", None,
     "One attention layer without convolution, trained on a single period: it looks right at that "
     "period and is exposed by the control, by other periods, and by text that does not repeat."),
    ("Text", "text", None, "Tiny Shakespeare, characters, nanoGPT's 90 / 10 split."),
)  # fmt: skip


def _page(study: Study, pictures: dict[str, bytes], tables: dict[str, list[list[str]]]) -> str:
    parts = [
        "<h1>Does a convolution before attention do what a previous-token head does?</h1>",
        f"<p class='lead'>{study['config']['seeds']} seeds per model; intervals are 95 % "
        f"(Student's t over seeds). {html.escape(study['recipe'])}.</p>",
        "<h2>Claims and verdicts</h2>",
        *(page.claim_box(verdict) for verdict in study["verdicts"]),
    ]
    for title, table, picture, text in SECTIONS:
        parts.append(f"<h2>{html.escape(title)}</h2><p class='soft'>{html.escape(text)}</p>")
        if picture is not None:
            parts.append(page.picture(pictures[picture], title))
        if table is not None:
            parts.append(page.table(tables[table]))
        if picture == "stripes":
            parts += [page_bundle(), head_maps(study)]
    settings = {key: study[key] for key in ("command", "config", "versions", "seconds_in_cells")}
    parts.append(
        "<h2>To run it again</h2>"
        f"<pre>{html.escape(study['command'] or 'smearlens compare')}</pre>"
        f"<pre>{html.escape(json.dumps(settings, indent=1))}</pre>"
    )
    return page.frame("smearlens: smeared keys", parts)


def _variants(study: Study, task: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, runs of every seed) of a task, in the order of the report."""
    found: dict[str, list[dict[str, Any]]] = {}
    for m in study["measures"]:
        if m["task"] == task:
            found.setdefault(m["name"], []).append(m)
    rank = {name: i for i, name in enumerate(ORDER)}
    return sorted(found.items(), key=lambda item: rank.get(item[0], len(rank)))


def _estimate(values: Sequence[float]) -> str:
    e = over_seeds(values)
    return f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" if e.n > 1 else f"{e.mean:.3f} (1 seed)"


def _bar(values: Sequence[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)


def _targets(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """(query, key) of what followed each earlier occurrence of the query's token."""
    return [(q, k + 1) for q in range(len(tokens)) for k in range(q) if tokens[k] == tokens[q]]
