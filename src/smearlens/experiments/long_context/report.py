"""What the report on long contexts says: its figures and tables.

Reads only the study's plain numbers (the contents of `result.json`). Leaves out measuring, judging,
and how a report is put together (`viz.report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smearlens.analysis.stats import over_seeds
from smearlens.experiments.long_context.verdicts import LEARNED, REPEATS, harm, texts
from smearlens.viz import plots
from smearlens.viz.report import Part, Study, estimate, write_report

Runs = Sequence[dict[str, Any]]
Rows = list[list[str]]

COMMAND = (
    'python -c "from smearlens.experiments.long_context.paper_preset import train_paper; '
    "train_paper('{}', 'wikitext-2-raw', 'runs/paper-{}')\""
)


def write_long_context_report(study: Study, out: Path) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.md` of the study; returns the page."""
    title = "Do hybrids of convolution, rotary positions and attention hold out on longer texts?"
    return write_report(study, out, _parts(study), title=title)


def _parts(study: Study) -> list[Part]:
    found, config = study["measures"], study["config"]
    left_out = "" if len(study["texts"]) > 1 else "TinyStories was left out: no file was given. "
    length, longest = config["length"], config["longest"]
    parts = [
        Part(
            "Models",
            f"{left_out}Trained at {length} tokens. A learned table adds {length} rows of weights "
            "to the count and has none beyond: that model cannot be read further. Rotary positions "
            f"and none at all have no table; these models are built to accept {longest:,} tokens, "
            "which changes no weight.",
            name="models", table=models_table(found),
        ),
        Part(
            "Repeats by gap",
            "A block of 16 distinct tokens that stood once before, so many tokens earlier, noise "
            f"of other tokens elsewhere. Trained: gaps up to {length - 16} in {length} tokens, as "
            "many copies as fit; the dotted line is the longest gap. Each panel is a length of the "
            "sequence. Mean over seeds, the band is their range; guessing among the kinds of "
            "tokens that blocks have is right in 0.03.",
            name="repeats", table=repeats_table(found), draw=partial(draw_repeats, found=found,
                                                                     trained=length - 16),
        ),
    ]  # fmt: skip
    for name in texts(found):
        parts += _of_text(found, name, length)
    if study["times"]["paper"]:
        parts.append(_paper(study["times"]["paper"]))
    return parts


def _of_text(found: Runs, name: str, length: int) -> list[Part]:
    """Loss by position, and recall, on one text."""
    stem = name.lower().replace(" ", "_")
    return [
        Part(
            f"{name}: loss by position",
            "The same tokens read with the whole context (lines) and with the last "
            f"{length // 2} to {length} tokens only, as in training (dashed). Where a line lies "
            "above its dashes, the longer context does harm.",
            name=f"positions_{stem}", table=positions_table(found, name),
            draw=partial(draw_positions, found=found, task=name),
        ),
        Part(
            f"{name}: recall by distance and frequency",
            f"Windows of {length} tokens. Hits are targets whose bigram stood earlier in the "
            "window, by the distance to its last occurrence (near: below 16, far: from 64); rare: "
            "the quarter of hits whose bigram is rarest in the training text. Nats, the same "
            "tokens for every model.",
            name=f"recall_{stem}", table=recall_table(found, name),
        ),
    ]  # fmt: skip


def _paper(costs: Runs) -> Part:
    return Part(
        "WikiText-2 at the write-up's size: the command, and what it would take",
        "The preset “paper” (width 512, 50,257 tokens, 32 x 256 tokens per update, 15 epochs). The "
        "loss streams over the logits, so that no array of tokens x 50,257 is kept. Gradients were "
        "timed on 2 windows and scale with their tokens, the optimiser step does not; CPU time of "
        "one core, extrapolated, not run.",
        name="paper", table=paper_table(costs),
    )  # fmt: skip


# Tables ----------------------------------------------------------------------------------------


def models_table(found: Runs) -> Rows:
    """Weights and held-out results at the trained length."""
    tasks = list(dict.fromkeys(m["task"] for m in found))
    rows = [["model", "weights on " + tasks[0], *(_measure(task) for task in tasks)]]
    for name, by_task in _models(found).items():
        cells = [estimate([_score(m) for m in by_task[task]]) for task in tasks]
        rows.append([name, f"{by_task[tasks[0]][0]['n_parameters']:,}", *cells])
    return rows


def _measure(task: str) -> str:
    return "repeats: accuracy" if task == REPEATS else f"{task}: loss (nats per character)"


def _score(run: dict[str, Any]) -> float:
    return run["curve"][-1]["accuracy"] if run["task"] == REPEATS else run["val_loss"]


def repeats_table(found: Runs) -> Rows:
    """Accuracy by gap at the trained and at the longest length."""
    first = next(m for m in found if m["task"] == REPEATS and m["name"] != LEARNED)
    shortest, *_, longest = first["by_length"]
    lengths = [shortest, longest]
    gaps = sorted({g for n in lengths for g in first["by_length"][n]}, key=int)
    rows = [["model", "tokens", *(f"gap {g}" for g in gaps)]]
    for name, by_task in _models(found).items():
        for length in lengths:
            runs = [m["by_length"].get(length) for m in by_task[REPEATS]]
            if runs[0] is None:
                rows.append([name, length, *["no positions"] * (len(rows[0]) - 2)])
                continue
            cells = [estimate([r[g] for r in runs]) if g in runs[0] else "" for g in gaps]
            rows.append([name, length, *cells])
    return rows


def positions_table(found: Runs, task: str) -> Rows:
    """Loss by position, and what the whole context does to it."""
    rows: Rows = []
    for name, by_task in _models(found).items():
        runs = by_task[task]
        if "beyond" not in runs[0]:
            rows.append([name, *["cannot be read"] * (len(rows[0]) - 1)])
            continue
        if not rows:
            rows.append(["model", *(f"{r['from']}-{r['to']}" for r in runs[0]["beyond"]),
                         "last: whole minus trained context"])  # fmt: skip
        losses = [
            f"{over_seeds([m['beyond'][i]['loss'] for m in runs]).mean:.3f}"
            for i in range(len(runs[0]["beyond"]))
        ]
        rows.append([name, *losses, estimate([harm(m) for m in runs])])
    return rows


def recall_table(found: Runs, task: str) -> Rows:
    """Loss by distance and frequency of what could be recalled."""
    models = _models(found)
    first = next(iter(models.values()))[task][0]["recall"]
    rows = [["targets", "n", *models]]
    for i, row in enumerate(first):
        label = row["distance"] if row["frequency"] == "all" else (
            f"{row['distance']}, {row['frequency']}"
        )  # fmt: skip
        cells = [
            "" if row["loss"] is None
            else estimate([m["recall"][i]["loss"] for m in by_task[task]])
            for by_task in models.values()
        ]  # fmt: skip
        rows.append([label, f"{row['n']:,}", *cells])
    return rows


def paper_table(costs: Runs) -> Rows:
    """Extrapolated cost of the presets."""
    rows = [["model", "weights", "CPU s per 1,000 tokens", "CPU s per optimiser step", "updates",
             "15 epochs, one core", "command"]]  # fmt: skip
    for c in costs:
        rows.append([
            c["model"], f"{c['n_parameters']:,}", f"{c['seconds_per_1000_tokens']:.2f}",
            f"{c['seconds_per_optimiser_step']:.2f}", f"{c['updates']:,}", f"{c['hours']:.0f} h",
            COMMAND.format(c["model"], c["model"].lower()),
        ])  # fmt: skip
    return rows


# Figures ---------------------------------------------------------------------------------------


def draw_repeats(figure: Any, found: Runs, trained: int) -> None:
    """Accuracy by gap, a panel for each length."""
    models = {n: by_task[REPEATS] for n, by_task in _models(found).items()}
    lengths = max((list(runs[0]["by_length"]) for runs in models.values()), key=len)
    figure.set_size_inches(2.6 * len(lengths) + 2, 3.4)
    axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for ax, length in zip(axes, lengths, strict=True):
        for colour, (name, runs) in zip(plots.COLOURS, models.items(), strict=False):
            if length not in runs[0]["by_length"]:
                continue
            gaps = list(runs[0]["by_length"][length])
            values = [[m["by_length"][length][g] for m in runs] for g in gaps]
            _line(ax, [int(g) for g in gaps], values, colour, name)
        ax.axvline(trained, color=plots.NULL, linestyle=":", linewidth=1)
        ax.set_xscale("log", base=4)
        ax.set(xlabel="gap (tokens)", title=f"{int(length):,} tokens", ylim=(0, 1.02))
    axes[0].set_ylabel("accuracy on the second block (fraction)")
    axes[-1].legend(
        *axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper left",
        bbox_to_anchor=(1.01, 1),
    )  # fmt: skip


def draw_positions(figure: Any, found: Runs, task: str) -> None:
    """Loss by position with the whole context, and with a trained one."""
    figure.set_size_inches(8, 3.6)
    ax = figure.subplots()
    for colour, (name, by_task) in zip(plots.COLOURS, _models(found).items(), strict=False):
        runs = by_task[task]
        if "beyond" not in runs[0]:
            continue
        middle = [(r["from"] * r["to"]) ** 0.5 for r in runs[0]["beyond"]]
        for key, style in (("loss", "-"), ("short", "--")):
            values = [[m["beyond"][i][key] for m in runs] for i in range(len(middle))]
            _line(ax, middle, values, colour, name if key == "loss" else None, style)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="position (tokens, middle of each doubling)", ylabel="loss (nats per character)")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _line(
    ax: Any,
    x: Sequence[float | int],
    values: Sequence[Sequence[float]],
    colour: str,
    label: str | None,
    style: str = "-",
) -> None:
    """Mean over seeds with a band from the least to the greatest."""
    ax.plot(x, [sum(v) / len(v) for v in values], style, color=colour, label=label, marker="o",
            markersize=3, linewidth=1.4)  # fmt: skip
    ax.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15,
                    linewidth=0)  # fmt: skip


def _models(found: Runs) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs by model and task, in the order of the seeds."""
    models: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for m in sorted(found, key=lambda m: m["seed"]):
        models.setdefault(m["name"], {}).setdefault(m["task"], []).append(m)
    return models
