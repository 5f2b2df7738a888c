"""What the report on attention over training says: its figures, tables and sliders.

Reads only the study's plain numbers (the contents of `result.json`). Leaves out measuring, judging,
and how a report is put together (`viz.report`).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smearlens.experiments.evolution import tables
from smearlens.experiments.evolution.logs import (
    PLAIN,
    TRACKED,
    by_data_set,
    columns,
    layer_mean,
    pairs_at,
    pairs_shuffled,
)
from smearlens.experiments.evolution.paths import draw_paths, paths_table
from smearlens.viz import evolution_plots as plots
from smearlens.viz.report import Part, Study, write_report
from smearlens.viz.widgets import Widget, evolution

Runs = Sequence[dict[str, Any]]
NAMES = {
    "shakespeare_char": "tiny Shakespeare", "enwik8": "enwik8", "text8": "text8",
}  # fmt: skip


def write_evolution_report(study: Study, out: Path) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.md` of the study; returns the page."""
    runs = by_data_set([m for m in study["measures"] if m["name"] == TRACKED])
    plain = by_data_set([m for m in study["measures"] if m["name"] == PLAIN])
    parts = [_overview(study), _cost(study)]
    for name, some in runs.items():
        parts += _of_data_set(name, some, plain.get(f"{name}, {PLAIN}", []))
    parts.append(_paths(study["paths"]))
    parts += [
        Part(title, text, name=name, table=make(runs)) for title, text, name, make in OVER_ALL
    ]
    title = "Does attention over training tell how well a character model does or writes?"
    return write_report(study, out, parts, title=title)


def _overview(study: Study) -> Part:
    names = list(study["data_sets"])
    missing = [NAMES[name] for name in NAMES if name not in names]
    left_out = (
        f"{' and '.join(missing)} were left out: no folder with them was given. " if missing else ""
    )
    notes = "; ".join(f"{NAMES[name]}: {note}" for name, note in study["data_sets"].items())
    return Part(
        "The fields of the write-up",
        f"{left_out}Nats per character (enwik8: per byte), mean and s.d. over seeds; the final "
        "training loss is a mean over the last updates, bits are of the best validation loss. The "
        "write-up's four runs trained models of 10 million weights far longer, and differ from "
        "each other only in what was logged: their spread is noise. Here, too, tracking changes "
        "nothing (see below), so one training with everything tracked stands for the write-up's "
        "runs 1 to 3, and only some seeds train again without. Training times are by the clock of "
        "a machine with other work to do, generation is per CPU second; costs are compared below. "
        f"{notes}.",
        name="fields", table=tables.fields_table(study),
    )  # fmt: skip


# Per data set ----------------------------------------------------------------------------------


def _of_data_set(name: str, runs: Runs, plain: Runs) -> list[Part]:
    """The write-up's four plots, and the slider over training."""
    shown = NAMES[name]
    best = int(np.median([m["best_step"] for m in runs]))
    return [
        Part(
            f"{shown}: training loss",
            "Mean over seeds, the band is its standard error. A seed's log is the same with "
            "tracking and without, byte for byte: the second line differs only by holding fewer "
            "seeds.",
            name=f"train_loss_{name}",
            draw=partial(draw_losses, runs=runs, plain=plain, key="train_curve"),
        ),
        Part(
            f"{shown}: validation loss",
            "The same on held-out text; the ring is the lowest mean.",
            name=f"val_loss_{name}",
            draw=partial(draw_losses, runs=runs, plain=plain, key="curve"),
        ),
        Part(
            f"{shown}: attention metrics",
            "On held-out text, by layer; dark is the first. Untrained models attend almost "
            "uniformly, which is where every line starts. The dotted line is the step of the best "
            "validation loss (median of the seeds).",
            name=f"attention_metrics_{name}",
            draw=partial(draw_metrics, runs=runs, best=best),
        ),
        Part(
            f"{shown}: layer similarity",
            "Every pair of layers: 1 - JS / ln 2 of the layers' mean patterns, their cosine after "
            "uniform attention is taken away, and CKA of the residual streams. The grey band and "
            "the ticks are the same pairs of the trained models on shuffled text; the left end of "
            "a line is the untrained model.",
            name=f"layer_similarity_{name}",
            draw=partial(draw_similarity, runs=runs),
            widgets=[_slider(m, shown) for m in runs if m["seed"] == 0],
        ),
    ]


def draw_losses(figure: Any, runs: Runs, plain: Runs, key: str) -> None:
    """Training or validation loss with and without tracking."""
    figure.set_size_inches(8, 3.4)
    given = {"tracked": runs} | ({"no tracking": plain} if plain else {})
    bands = {name: plots.band([m[key] for m in some], "loss") for name, some in given.items()}
    which = "training" if key == "train_curve" else "validation"
    plots.draw_losses(
        figure.subplots(), bands, ylabel=f"{which} loss (nats per token)", mark_best=key == "curve"
    )


def draw_metrics(figure: Any, runs: Runs, best: int) -> None:
    """Entropy and distance of every layer."""
    figure.set_size_inches(8, 5.6)
    entropy, span = (_bands(runs, kind) for kind in ("normalised_entropy", "distance"))
    untrained = [
        float(np.mean([layer_mean(m, kind)[0] for m in runs]))
        for kind in ("normalised_entropy", "distance")
    ]
    axes = figure.subplots(2, 1, sharex=True)
    plots.draw_attention_metrics(
        axes, entropy, span, null_entropy=untrained[0], null_span=untrained[1], best_step=best
    )
    for ax in axes:
        _log(ax, runs)


def draw_similarity(figure: Any, runs: Runs) -> None:
    """Three similarities of every pair of layers, each beside that on shuffled text."""
    figure.set_size_inches(9, 9.6)
    kinds = {
        "js": "1 - JS / ln 2", "centred_cosine": "centred cosine",
        "cka": "CKA of residual streams",
    }  # fmt: skip
    axes = figure.subplots(3, 1, sharex=True)
    for ax, (kind, label) in zip(axes, kinds.items(), strict=True):
        bands = _bands(runs, kind)
        tables_of = [pairs_shuffled(m, kind) for m in runs]
        pairs = dict(zip(pairs_at(runs[0], kind, 0), bands, strict=True))
        null = {name: float(np.mean([t[pair] for t in tables_of])) for pair, name in pairs.items()}
        plots.draw_layer_similarity(ax, bands, ylabel=label, null=null, null_name="shuffled text")
        ax.legend(
            frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), ncol=2,
            title="layers", title_fontsize=7,
        )  # fmt: skip
        _log(ax, runs)
        ax.label_outer()


def _bands(runs: Runs, kind: str) -> dict[str, plots.Band]:
    """A band for each layer or pair of layers, numbered from 1."""
    found = {}
    for name in columns(runs[0], kind):
        rows = [
            [
                {"step": step, "value": value}
                for step, value in zip(m["looks"]["steps"], columns(m, kind)[name], strict=True)
            ]
            for m in runs
        ]
        found[_numbered(name)] = plots.band(rows, "value")
    return found


def _numbered(name: str) -> str:
    layers = [str(int(layer.removeprefix("blocks.")) + 1) for layer in name.split("-")]
    return f"layer {layers[0]}" if len(layers) == 1 else "-".join(layers)


def _log(ax: Any, runs: Runs) -> None:
    """Steps on a scale that shows the start, where most happens."""
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(0, runs[0]["looks"]["steps"][-1])


def _slider(run: dict[str, Any], name: str) -> Widget:
    """Patterns of one head of each layer over training."""
    shown = run["patterns"]
    n_tokens = len(shown["tokens"])
    weights = np.frombuffer(zlib.decompress(base64.b64decode(shown["weights"])), np.uint8)
    shape = (len(shown["steps"]), len(shown["labels"]), n_tokens, n_tokens)
    return evolution(
        weights.reshape(shape) / 255.0, shown["steps"], shown["tokens"], mask="causal",
        labels=shown["labels"], normalised=False, scale="sqrt",
        title=f"{name}, seed 0: the most focused head of each layer over training",
    )  # fmt: skip


# Over all data sets ----------------------------------------------------------------------------


OVER_ALL = (  # heading, what is seen, name, table
    (
        "When does it change?",
        "Two straight segments against log step, free to jump, beside the best smooth curve; "
        "ΔBIC above 10 (median of the seeds) counts as a change. The interval holds the mean over "
        "seeds and is never finer than the looks.",
        "changes", tables.changes_table,
    ),
    (
        "Layer similarity and its nulls",
        "Means over groups of pairs at the end of training; untrained: the same models before the "
        "first update; shuffled: the trained models on shuffled text. Causal masks alone make "
        "patterns alike, so that a similarity says something only beside its nulls.",
        "similarity", tables.similarity_table,
    ),
    (
        "Attention and the held-out loss within runs",
        "Changes from look to look, a straight line in log step taken out; interval over seeds. "
        "Without this both sides follow the step and correlate whatever they are.",
        "loss", tables.loss_table,
    ),
    (
        "Heads at the end of training",
        "By layer, mean over seeds: normalised entropy, mean distance, weight on the previous and "
        "on the first token, how much heads differ (0: not at all), the best head's induction "
        "score, and how many heads look 3 tokens back or less on average; last, the same of the "
        "rows that wrote samples at temperature 0.8.",
        "heads", tables.heads_table,
    ),
    (
        "Attention along samples and their quality",
        "Partial Spearman correlations within run, prompt and sampling temperature, with "
        "bootstrap intervals over runs. Diversity and repetition of character 2- to 4-grams; "
        "coherence: cosine of counts of character 3-grams of prompt and continuation, which "
        "sees shared words and no meaning; words: share of the characters in whole words that "
        "stand in the training text; quality: diversity · words.",
        "associations", tables.associations_table,
    ),
    (
        "Attention changed while a model writes",
        "Difference to the samples with nothing changed, the same random numbers, temperature "
        "0.8. Scores doubled sharpen every head, halved they spread it.",
        "interventions", tables.interventions_table,
    ),
    (
        "Samples",
        "One per temperature, seed 0; the first quarter is the prompt.",
        "texts", tables.texts_table,
    ),
)  # fmt: skip


def _paths(paths: Mapping[str, Any]) -> Part:
    return Part(
        "Where training goes: losses of single characters",
        "The loss of one fixed random character of every held-out window, its first two principal "
        "components, fitted over all seeds and looks of a data set at once; points are updates. "
        "Paths of different seeds that coincide learn the same characters in the same order. "
        "Every smooth path bends once in such a plane, so that a turn alone is no change of phase: "
        "a random walk has the shares beside ours.",
        name="loss_paths", table=paths_table(paths), draw=partial(draw_paths, paths=paths,
                                                                  names=NAMES),
    )  # fmt: skip


def _cost(study: Study) -> Part:
    return Part(
        "What tracking changes and costs",
        "Pairs of runs that differ in tracking alone: whether the logs of all training and "
        "validation losses are the same bytes, and whether the trained models write the same "
        "text. Costs are CPU time, one look against the updates around it.",
        name="tracking", table=tables.tracking_table(study),
    )  # fmt: skip
