"""What the report of the whole smeared-keys study says: its sections, its figures, its head maps.

Reads only plain numbers (the contents of `result.json`). Leaves out the tables (`tables`),
measuring, judging, and how a report is put together (`viz.report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smearlens.analysis.stats import over_seeds
from smearlens.experiments.smeared_keys import tables
from smearlens.experiments.smeared_keys.short_report import head_maps
from smearlens.experiments.smeared_keys.study import CURVE_ROWS
from smearlens.experiments.smeared_keys.tables import Runs, variants
from smearlens.experiments.smeared_keys.text_verdicts import CONV
from smearlens.viz import plots
from smearlens.viz.report import Part, Study, mean_and_range, write_report

ROLES = {"stream": "before attention", "q": "on Q alone", "k": "on K alone", "v": "on V alone"}
CURVES = ("attention only", "smeared keys", "conv k=3", "conv k=5", "two layers", "four layers",
          "conv k=3, same padding")  # fmt: skip


def write_smeared_keys_report(study: Study, out: Path) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.md` of the study; returns the page."""
    title = "Smeared keys: what a convolution before attention does, and what only looks like it"
    return write_report(study, out, _parts(study), title=title)


# Figures ---------------------------------------------------------------------------------------


def draw_sweep(figure: Any, study: Study) -> None:
    """Accuracy and induction score by kernel size, one column per role, one line per padding."""
    figure.set_size_inches(11, 5.2)
    grid = figure.subplots(2, len(ROLES), sharex=True, sharey="row")
    runs = [m for m in study["measures"] if m["task"] == "repeats" and m["config"].get("residual")]
    for column, (role, words) in enumerate(ROLES.items()):
        of_role = [m for m in runs if m["config"].get("conv_on") == role]
        for colour, causal in zip(plots.COLOURS, (True, False), strict=False):
            chosen = [m for m in of_role if m["config"]["causal"] is causal]
            _sweep_line(grid[0][column], chosen, _accuracy, causal, colour)
            _sweep_line(grid[1][column], chosen, _induction, causal, colour)
        grid[0][column].set_title(f"convolution {words}", fontsize=9)
        grid[0][column].set_ylim(0, 1.03)
        grid[1][column].set(xlabel="kernel size (taps)", ylim=(0, 1.03))
    grid[0][0].set_ylabel("accuracy on repeats (fraction)")
    grid[1][0].set_ylabel("induction score of the best head")
    grid[0][-1].legend(frameon=False, fontsize=8)


def _sweep_line(ax: Any, runs: Runs, measure: Any, causal: bool, colour: str) -> None:
    """Mean over seeds by kernel size with its interval, moved aside so that both can be seen."""
    sizes = sorted({m["config"]["kernel_size"] for m in runs})
    found = [[measure(m) for m in runs if m["config"]["kernel_size"] == k] for k in sizes]
    side = -0.08 if causal else 0.08
    label = "causal" if causal else "“same” padding: reads ahead"
    _with_intervals(ax, [k + side for k in sizes], found, colour=colour, label=label)
    ax.set_xticks(range(1, max(sizes, default=1) + 1))


def draw_curves(figure: Any, study: Study) -> None:
    """Learning curves on repeats and on both texts."""
    figure.set_size_inches(11, 3.6)
    shown = {
        "accuracy on repeats (fraction)": ("repeats", CURVES, "accuracy"),
        "tiny Shakespeare (nats per character)": (
            "text", ("conv k=5, bare", "four layers, bare", "conv k=5", "four layers"), "loss"
        ),
        "WikiText-2 (nats per real token)": (
            "wikitext", ("conv k=5, bare", "four layers, bare", "conv k=5", "four layers"), "loss"
        ),
    }  # fmt: skip
    present = {m["task"] for m in study["measures"]}
    shown = {label: what for label, what in shown.items() if what[0] in present}
    for ax, (label, (task, names, key)) in zip(
        figure.subplots(1, len(shown)), shown.items(), strict=True
    ):
        found = variants(study, task)
        curves = {n: [m["curve"] for m in found[task, n]] for n in names if (task, n) in found}
        plots.draw_curves(ax, curves, key=key, ylabel=label)
        if task == "repeats":
            ax.legend(frameon=False, fontsize=6.5, loc="lower right", bbox_to_anchor=(1.02, 0.06))


def draw_kernels(figure: Any, study: Study) -> None:
    """RMS and average by lag of kernels: mean and interval over seeds, and the untrained kernel."""
    names = ("conv k=3", "conv k=5", "conv k=5, same padding", "conv k=5 on K")
    found = variants(study, "repeats")
    chosen = {n: [m["kernel"] for m in found["repeats", n]] for n in names}
    figure.set_size_inches(11, 5.4)
    upper, lower = figure.subplots(2, len(chosen), sharey="row")
    for rms, average, (name, kernels) in zip(upper, lower, chosen.items(), strict=True):
        first, records = kernels[0], []
        for i, lag in enumerate(first["lags"]):
            e = over_seeds([k["rms"][i] for k in kernels])
            low, high = (e.low, e.high) if e.n > 1 else (e.mean, e.mean)
            records.append({"lag": lag, "rms": e.mean, "low": low, "high": high})
        plots.draw_kernel_profile(rms, records, null=first["null_rms"],
                                  null_high=first["null_high"])  # fmt: skip
        rms.set_title(name, fontsize=9)
        signed = [[k["signed_mean"][i] for k in kernels] for i in range(len(first["lags"]))]
        _with_intervals(average, first["lags"], signed, colour=plots.COLOURS[0], label=name)
        average.axhspan(-first["null_signed"], first["null_signed"], color=plots.NULL, alpha=0.15,
                        linewidth=0)  # fmt: skip
        average.set(xlabel="lag (tokens; 1 = previous token)", xticks=first["lags"])
    highest = max(max(k["rms"]) for kernels in chosen.values() for k in kernels)
    upper[0].set_ylim(0, 1.1 * highest)
    lower[0].set_ylabel("average weight")


def draw_taps(figure: Any, study: Study) -> None:
    """Loss with taps that read ahead removed, beside training with causal padding."""
    figure.set_size_inches(10, 3.2)
    pairs = [(task, end) for task in ("text", "repeats") for end in ("", ", bare")]
    found = variants(study, "text", "repeats")
    groups = {}
    for task, end in pairs:
        runs = found[task, f"conv k=5, same padding{end}"]
        bars = {
            f"removed: {tables.removed_taps(row['removed'])}": mean_and_range(
                [m["future_taps"][i]["loss"] for m in runs]
            )
            for i, row in enumerate(runs[0]["future_taps"])
        }
        if task == "text":
            causal = [m["val_loss"] for m in found[task, f"conv k=5{end}"]]
            bars["trained with causal padding"] = mean_and_range(causal)
        groups[f"{tables.WHERE.get(task, task)}{end}"] = bars
    left, right = figure.subplots(1, 2)
    for ax, task in ((left, "tiny"), (right, "repeats")):
        chosen = {name: bars for name, bars in groups.items() if name.startswith(task)}
        plots.draw_bars(ax, chosen, ylabel="loss (nats per target)")
        ax.get_legend().remove()
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8,
                  loc="outside right upper")  # fmt: skip


def draw_norms(figure: Any, study: Study) -> None:
    """Gradient norm of the kernel through training, every seed, with and without clipping."""
    found = {name: runs for (_, name), runs in variants(study, "norms").items() if "conv" in name}
    settings = [name.removesuffix(", not clipped") for name in found if "not clipped" in name]
    figure.set_size_inches(11, 2.9)
    axes = figure.subplots(1, len(settings), sharey=True)
    for ax, setting in zip(axes, settings, strict=True):
        for colour, word in zip(plots.COLOURS, ("not clipped", "clipped"), strict=False):
            for i, run in enumerate(found[f"{setting}, {word}"]):
                norms = run["gradient_norms"]
                trace = norms["parameters"][CONV]["trace"]
                label = word if i == 0 else None
                ax.plot(norms["steps"], trace, color=colour, linewidth=0.9, label=label)
        ax.set(xlabel="updates", yscale="log")
        ax.set_title(setting, fontsize=8)
    axes[0].set_ylabel("gradient norm of the kernel")
    axes[-1].legend(frameon=False, fontsize=8)


# Sections --------------------------------------------------------------------------------------


def _parts(study: Study) -> list[Part]:
    return [
        *_repeats_parts(study),
        *_kernel_parts(study),
        *_text_parts(study),
        Part(
            "Every model on repeats",
            "Control: the same head scored on another example's tokens. A role without its lags "
            "gets what it would be if the convolution or smearing passed only the present token.",
            name="repeats", table=tables.repeats_table(study),
        ),
    ]  # fmt: skip


def _repeats_parts(study: Study) -> list[Part]:
    return [
        Part(
            "Kernel size, padding and role",
            "Repeats of period 8 to 20, drawn per example; accuracy counts only tokens that "
            "induction can predict. Mean and 95 % interval over seeds. With “same” padding the "
            "next token sits in the kernel, and attention has no work.",
            name="sweep", draw=partial(draw_sweep, study=study),
        ),
        Part(
            "Learning curves",
            "Mean over seeds, band from lowest to highest. On text the models of a "
            "pair have nearly as many parameters (see the table of both texts).",
            name="curves", draw=partial(draw_curves, study=study),
        ),
        Part(
            "Where the heads look",
            "One example each of repeated random tokens; hover over a head, click to lock it.",
            name="maps", widgets=head_maps(study),
        ),
        Part(
            "Where the stripe lies without skip connections",
            "Bare stacks on repeats: weight on the key so many tokens after an earlier occurrence "
            "of the query, for the head with most of it. 1 is where the induction score looks.",
            name="offsets", table=tables.offsets_table(study),
        ),
        Part(
            "Layer by layer",
            "Stacks of attention on repeats: the best head of each layer for each score, and the "
            "change of accuracy when that head gives its mean output instead.",
            name="layers", table=tables.layers_table(study),
        ),
    ]  # fmt: skip


def _kernel_parts(study: Study) -> list[Part]:
    return [
        Part(
            "Kernels",
            "Above the root mean square over channels, below their average, by tap, with intervals "
            "over seeds; grey: untrained. Moved: distance from the start divided by the length at "
            "the start.",
            name="kernels", table=tables.kernels_table(study),
            draw=partial(draw_kernels, study=study),
        ),
        Part(
            "Taps that read ahead, removed one by one",
            "Trained with “same” padding and 5 taps; the taps at +1 and +2 are then set to zero. "
            "Bars: mean, lines: lowest and highest seed.",
            name="taps", table=tables.taps_table(study), draw=partial(draw_taps, study=study),
        ),
    ]  # fmt: skip


def _text_parts(study: Study) -> list[Part]:
    parts = [
        Part(
            "Two texts",
            "Held-out loss in nats per character or token; pads never count in it. Half-way is the "
            "evaluation nearest half of the updates, the earlier one of two; on WikiText-2 it is "
            f"of the learning curve, measured on {CURVE_ROWS} lines, and the end on "
            f"{study['config']['wikitext_rows']}.",
            name="text", table=tables.text_table(study),
        ),
        Part(
            "Gradient norms with and without clipping",
            "Bare stacks on tiny Shakespeare, before clipping at 1. Jump: a norm divided by the "
            "median of the 20 updates before it.",
            name="norms", table=tables.norms_table(study), draw=partial(draw_norms, study=study),
        ),
        Part("What clipping does to the loss", "Paired over seeds; negative means that it helps.",
             name="clipping", table=tables.clipping_table(study)),
    ]  # fmt: skip
    if not study["padding"]:
        return parts
    return [
        *parts,
        Part(
            "What padding alone does",
            "Held-out lines of WikiText-2 in GPT-2's tokens, blank lines kept as rows, filled up "
            "with the end-of-text token.",
            name="padding", table=tables.padding_table(study),
        ),
        Part(
            "Where attention goes when lines end early",
            "First layer, queries before the last token of a line. Pads hidden: the same models "
            "with the pads' keys masked.",
            name="stripes", table=tables.stripes_table(study),
        ),
    ]  # fmt: skip


def _with_intervals(
    ax: Any,
    at: Sequence[float | int],
    found: Sequence[Sequence[float]],
    *,
    colour: str,
    label: str,
) -> None:
    estimates = [over_seeds(values) for values in found]
    half = [e.high - e.mean if e.n > 1 else 0.0 for e in estimates]
    ax.errorbar(at, [e.mean for e in estimates], yerr=half, color=colour, label=label,
                marker="o", markersize=3.5, capsize=2, linewidth=1.2)  # fmt: skip


def _accuracy(run: dict[str, Any]) -> float:
    return run["accuracy"]


def _induction(run: dict[str, Any]) -> float:
    return run["scores"]["induction"]["best"]["score"]
