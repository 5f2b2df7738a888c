"""What the report of the main job says: its tables, its figures, its head maps.

Reads only the study's plain numbers (the contents of `result.json`). Leaves out measuring,
judging, and how a report is put together (`viz.report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smearlens.viz import plots
from smearlens.viz.report import Part, Study, estimate, mean_and_range, write_report

ORDER = (
    "attention only", "conv k=3", "conv k=5", "smeared keys", "two layers", "two layers, narrow",
    "conv k=3, same padding",
)  # fmt: skip


def write_compare_report(study: Study, out: Path) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.md` of a comparison; returns the page."""
    title = "Does a convolution before attention do what a previous-token head does?"
    return write_report(study, out, _parts(study), title=title)


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
            name, f"{runs[0]['n_parameters']:,}", estimate([m["accuracy"] for m in runs]),
            estimate([m["loss"] for m in runs]), estimate([b["score"] for b in best]),
            estimate([b["control"] for b in best]), f"{best[0]['chance']:.3f}",
            estimate(previous), "passed" if passed else "FAILED: reads the future",
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
            name, estimate([m["accuracy"] for m in runs]),
            *(estimate([w[role]["accuracy"] for w in without]) for role in ("q", "k", "v", "qkv")),
            estimate([w["k"]["control_accuracy"] for w in without]),
        ])  # fmt: skip
    return rows


def text_table(study: Study) -> list[list[str]]:
    """Tiny Shakespeare: held-out loss at nearly equal parameters, equal steps and data."""
    rows = [["model", "parameters", "held-out loss (nats per character)", "audit"]]
    for name, runs in _variants(study, "text"):
        passed = all(m["audit"]["passed"] for m in runs)
        rows.append([
            name, f"{runs[0]['n_parameters']:,}", estimate([m["val_loss"] for m in runs]),
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
        rows.append([f"accuracy at period {period}{trained}", estimate(values)])
    for key, label in (
        ("induction_at_trained_period", "induction score at the trained period"),
        ("control_at_trained_period", "the same with another example's tokens (control)"),
        ("weight_on_trained_lag_when_nothing_repeats", "weight on that lag when nothing repeats"),
    ):
        rows.append([label, estimate([m["positional"][key] for m in runs])])
    return rows


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


def head_maps(study: Study) -> list[Any]:
    """Interactive maps of all heads of the best layer, one widget for each of two models."""
    import numpy as np

    from smearlens.viz.widgets import attention_heads

    parts = []
    for name, runs in _variants(study, "repeats"):
        if name not in ("conv k=3", "two layers"):
            continue
        example = runs[0]["scores"]["example"]
        weights = np.tril(np.asarray(example["patterns"]))
        weights = weights / weights.sum(-1, keepdims=True)  # undo the rounding of result.json
        parts.append(attention_heads(
            weights, [f" {token}" for token in example["tokens"]], mask="causal",
            title=f"{name}: {example['layer']}, one example of repeated random tokens",
        ))  # fmt: skip
    return parts


def draw_kernels(figure: Any, study: Study) -> None:
    """Kernel profile of every convolution, seed by seed, with the null."""
    figure.set_size_inches(10, 3.0)
    chosen = [(n, r) for n, r in _variants(study, "repeats") if "kernel" in r[0]["smearing"]]
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    for ax, (name, runs) in zip(axes, chosen, strict=True):
        for i, run in enumerate(runs):
            kernel, again = run["smearing"]["kernel"], i // len(plots.COLOURS)
            plots.draw_kernel_profile(
                ax, kernel["records"], null=kernel["null_rms"], null_high=kernel["null_high"],
                label=f"seed {run['seed']}", colour=plots.COLOURS[i % len(plots.COLOURS)],
            )  # fmt: skip
            ax.containers[-1].lines[0].set_linestyle(plots.LINES[again % len(plots.LINES)])
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
                "intact": mean_and_range([m["accuracy"] for m in runs]),
                **{
                    f"without {role.upper()}'s lags": mean_and_range(
                        [w[role]["accuracy"] for w in without]
                    )
                    for role in ("q", "k", "v")
                },
                "K moved at random": mean_and_range([w["k"]["control_accuracy"] for w in without]),
            }
    plots.draw_bars(figure.subplots(), groups, ylabel="accuracy on repeats (fraction)")


def _parts(study: Study) -> list[Part]:
    return [
        Part(
            "Does the convolution do what a previous-token head does?",
            "Accuracy counts only tokens that induction can predict. Control: the same head scored "
            "on the tokens of another example; a head that looks a fixed distance back scores as "
            "high there. Learning curves: mean over seeds, band from lowest to highest.",
            name="models", table=models_table(study), draw=partial(draw_accuracy, study=study),
        ),
        Part(
            "Where the best head looks",
            "One example per model, query down, key across; orange squares are the tokens that "
            "followed an earlier occurrence.",
            name="stripes", draw=partial(draw_stripes, study=study), widgets=head_maps(study),
        ),
        Part(
            "Which role carries it",
            "Each role gets the activation it would have if the convolution or smearing passed "
            "only the present token. The control moves the keys as far in a random direction. "
            "Bars: mean, lines: lowest and highest seed.",
            name="roles", table=roles_table(study), draw=partial(draw_roles, study=study),
        ),
        Part(
            "The kernels",
            "Root mean square over channels with bootstrap intervals. The average over channels is "
            "not shown: its sign and size are not identifiable. Grey: untrained kernels.",
            name="kernels", draw=partial(draw_kernels, study=study),
        ),
        Part(
            "A fixed period is no test of induction",
            "One attention layer without convolution, trained on a single period: it looks right "
            "at that period and is exposed by other periods and by text that does not repeat.",
            name="positional", table=positional_table(study),
        ),
        Part("Text", "Tiny Shakespeare, characters, nanoGPT's 90 / 10 split.",
             name="text", table=text_table(study)),
    ]  # fmt: skip


def _variants(study: Study, task: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, runs of every seed) of a task, in the order of the report."""
    found: dict[str, list[dict[str, Any]]] = {}
    for m in study["measures"]:
        if m["task"] == task:
            found.setdefault(m["name"], []).append(m)
    rank = {name: i for i, name in enumerate(ORDER)}
    return sorted(found.items(), key=lambda item: rank.get(item[0], len(rank)))


def _targets(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """(query, key) of what followed each earlier occurrence of the query's token."""
    return [(q, k + 1) for q in range(len(tokens)) for k in range(q) if tokens[k] == tokens[q]]
