"""What the report on induction in Mamba says: its tables and figures.

Reads only the study's plain numbers (the contents of `result.json`). Leaves out measuring and
judging (`mamba_induction`), and how a report is put together (`viz.report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smearlens.analysis.stats import over_seeds
from smearlens.experiments.state_space.mamba_induction import LEARNED
from smearlens.viz import plots
from smearlens.viz.report import Part, Study, estimate, mean_and_range, write_report

ROLE_NAMES = {
    "u": "u (value)", "B": "B (key)", "C": "C (question)", "delta": "Δ",
    "u+B+C+delta": "all four",
}  # fmt: skip


def write_induction_report(study: Study, out: Path) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.md` of the study; returns the page."""
    title = "How does Mamba do induction: through its short convolution, or through its state?"
    return write_report(study, out, _parts(study), title=title)


# Tables ----------------------------------------------------------------------------------------


def models_table(study: Study) -> list[list[str]]:
    """Every variant: parameters, accuracy, how many runs learned, loss, negative decays."""
    rows = [["model", "parameters", "accuracy", f"runs above {LEARNED}", "loss (nats)",
             "negative Ā"]]  # fmt: skip
    for name, runs in _variants(study).items():
        learned = sum(m["accuracy"] > LEARNED for m in runs)
        rows.append([
            name, f"{runs[0]['n_parameters']:,}", estimate([m["accuracy"] for m in runs]),
            f"{learned} of {len(runs)}", estimate([m["loss"] for m in runs]),
            f"{over_seeds([m['negative_decays'] for m in runs]).mean:.2%}",
        ])  # fmt: skip
    return rows


def roles_table(study: Study) -> list[list[str]]:
    """Accuracy after each role lost what lags bring it."""
    rows = [["model", "intact", *(f"without the lags of {r}" for r in ROLE_NAMES.values())]]
    for name, runs in _smearing(study).items():
        rows.append([
            name, estimate([m["accuracy"] for m in runs]),
            *(estimate([m["without_lags"][role] for m in runs]) for role in ROLE_NAMES),
        ])  # fmt: skip
    return rows


def exchange_table(study: Study) -> list[list[str]]:
    """How often a model answers by the other example's order, role by role, and by its own."""
    rows = [["model", "answer", *ROLE_NAMES.values()]]
    for name, runs in _smearing(study).items():
        rows += [
            [name, f"by {label} order",
             *(estimate([m["exchanged_lags"][role][whose] for m in runs]) for role in ROLE_NAMES)]
            for whose, label in (("other", "the other example's"), ("own", "its own"))
        ]  # fmt: skip
    return rows


def rules_table(study: Study) -> list[list[str]]:
    """The discretisations with kernel 4: accuracy, negative decays, difference seed by seed."""
    rows = [["discretisation", "accuracy", "negative Ā", "minus mamba", "minus zoh"]]
    rules = _rules(study)
    for rule, runs in rules.items():
        differences = [
            "" if rule == base else _difference(runs, rules[base]) for base in ("mamba", "zoh")
        ]
        rows.append([
            rule, estimate([m["accuracy"] for m in runs]),
            estimate([m["negative_decays"] for m in runs]), *differences,
        ])  # fmt: skip
    return rows


def _difference(runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> str:
    pairs = zip(runs, base, strict=True)
    return estimate([m["accuracy"] - b["accuracy"] for m, b in pairs], "+.3f")


# Figures ---------------------------------------------------------------------------------------


def draw_accuracy(figure: Any, study: Study) -> None:
    """Accuracy of every variant, a bar with the range of its seeds."""
    figure.set_size_inches(10, 3.2)
    groups = {
        name.replace(", ", "\n"): {"accuracy": mean_and_range([m["accuracy"] for m in runs])}
        for name, runs in _variants(study).items()
    }
    ax = figure.subplots()
    plots.draw_bars(ax, groups, ylabel="accuracy on repeats (fraction)")
    ax.get_legend().remove()


def draw_curves(figure: Any, study: Study) -> None:
    """Learning curves: without and with a convolution, and the discretisations."""
    figure.set_size_inches(10, 3.6)
    variants = _variants(study)
    sides = [
        {name: runs for name, runs in variants.items() if name.count(",") == name.count("layers")},
        _rules(study),
    ]
    for ax, chosen in zip(figure.subplots(1, 2, sharey=True), sides, strict=True):
        curves = {name: [m["curve"] for m in runs] for name, runs in chosen.items()}
        plots.draw_curves(ax, curves, key="accuracy", ylabel="accuracy on repeats (fraction)")
        ax.set_ylim(0, 1.02)


def draw_roles(figure: Any, study: Study) -> None:
    """Accuracy without the lags of each role, one group per model."""
    figure.set_size_inches(10, 3.2)
    groups = {
        name.replace(", ", "\n"): {
            "intact": mean_and_range([m["accuracy"] for m in runs]),
            **{
                f"without {label}": mean_and_range([m["without_lags"][role] for m in runs])
                for role, label in ROLE_NAMES.items()
            },
        }
        for name, runs in _smearing(study).items()
    }
    plots.draw_bars(figure.subplots(), groups, ylabel="accuracy on repeats (fraction)")


def draw_exchange(figure: Any, study: Study) -> None:
    """Answers by the other example's order when a role has its lags from there."""
    figure.set_size_inches(10, 3.2)
    for ax, whose in zip(figure.subplots(1, 2, sharey=True), ("other", "own"), strict=True):
        groups = {
            name: {
                label: mean_and_range([m["exchanged_lags"][role][whose] for m in runs])
                for role, label in ROLE_NAMES.items()
            }
            for name, runs in _smearing(study).items()
            if "," not in name
        }
        plots.draw_bars(ax, groups, ylabel=f"answers by {whose} order (fraction)")
        if whose == "other":
            ax.get_legend().remove()


def draw_rules(figure: Any, study: Study) -> None:
    """Accuracy and share of negative decays of the discretisations, seed by seed."""
    figure.set_size_inches(10, 3.0)
    left, right = figure.subplots(1, 2)
    rules = _rules(study)
    for i, of_seed in enumerate(zip(*rules.values(), strict=True)):
        left.plot(
            list(rules), [m["accuracy"] for m in of_seed], marker="o",
            color=plots.COLOURS[i % len(plots.COLOURS)], label=f"seed {of_seed[0]['seed']}",
            linestyle=plots.LINES[i // len(plots.COLOURS) % len(plots.LINES)],
        )  # fmt: skip
    left.set(ylabel="accuracy on repeats (fraction)")
    left.legend(frameon=False, fontsize=8)
    shares = {
        rule: {"share": mean_and_range([m["negative_decays"] for m in runs])}
        for rule, runs in rules.items()
    }
    plots.draw_bars(right, shares, ylabel="share of negative Ā")
    right.get_legend().remove()


def _parts(study: Study) -> list[Part]:
    return [
        Part(
            "Which models learn it",
            "Accuracy counts only tokens that induction can predict. The bars' lines span the "
            "seeds. Without the previous token a model can still do better than chance: in a "
            "repeat the next token is the one seen longest ago.",
            name="models", table=models_table(study), draw=partial(draw_accuracy, study=study),
        ),
        Part(
            "Learning curves",
            "Mean over seeds, the band is their range. Left: kernel sizes, and two layers without "
            "a convolution. Right: discretisations with kernel 4.",
            name="curves", draw=partial(draw_curves, study=study),
        ),
        Part(
            "Which role carries it: lags removed",
            "Each role gets the activation it would have if the convolution passed only the "
            "present token; the others keep theirs. Bars: mean, lines: lowest and highest seed.",
            name="roles", table=roles_table(study), draw=partial(draw_roles, study=study),
        ),
        Part(
            "Which role carries it: lags exchanged",
            "The other example has the same tokens, each block in another order. A role gets what "
            "the lags bring it there. If it finds a token by what stood before it, the model now "
            "answers by the other example's order. The figure leaves the discretisations out. "
            "Bars: mean, lines: lowest and highest seed.",
            name="exchange", table=exchange_table(study), draw=partial(draw_exchange, study=study),
        ),
        Part(
            "Discretisation",
            "Kernel 4, everything else equal; differences are paired by seed. Bilinear decays are "
            "negative where Δ|A| > 2; bilinear-clamped sets them to 0. Left: every seed. "
            "Bars: mean, lines: lowest and highest seed.",
            name="rules", table=rules_table(study), draw=partial(draw_rules, study=study),
        ),
    ]  # fmt: skip


def _variants(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Runs of every seed by name of the variant."""
    found: dict[str, list[dict[str, Any]]] = {}
    for m in sorted(study["measures"], key=lambda m: m["seed"]):
        found.setdefault(m["name"], []).append(m)
    return found


def _smearing(study: Study) -> dict[str, list[dict[str, Any]]]:
    """The variants whose convolution has lags."""
    return {n: runs for n, runs in _variants(study).items() if not n.endswith("kernel 1")}


def _rules(study: Study) -> dict[str, list[dict[str, Any]]]:
    """The discretisations by name, all with kernel 4."""
    first = "kernel 4"
    return {
        "mamba" if name == first else name.removeprefix(f"{first}, "): runs
        for name, runs in _variants(study).items()
        if name.startswith(first)
    }
