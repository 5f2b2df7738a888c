"""The tables of the report on attention over training.

Each function takes the study's plain numbers and returns rows of cells, the first one the head.
Leaves out figures and the words between them (`report`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from smearlens.analysis.association import ENOUGH
from smearlens.experiments.evolution.logs import (
    PLAIN,
    TRACKED,
    WRITTEN,
    columns,
    pairs_at,
    pairs_shuffled,
)
from smearlens.experiments.evolution.measures import QUALITIES
from smearlens.experiments.evolution.samples import STATISTICS, correlation, effect
from smearlens.experiments.evolution.verdicts import HIGH, LOW, change, within_run
from smearlens.viz.report import Study, estimate

Runs = Sequence[dict[str, Any]]
Rows = list[list[str]]

WRITEUP = {  # of its four runs: final training loss, best validation loss, seconds, tokens / s
    "shakespeare_char": (
        (0.8061, 1.4682, 142.4, 420.0), (0.8076, 1.4696, 140.0, 410.6),
        (0.8044, 1.4639, 140.3, 419.0), (0.8094, 1.4663, 139.7, 422.9),
    ),
    "enwik8": (
        (0.9472, 1.0063, 1210.4, 423.8), (0.9353, 1.0060, 1217.4, 387.7),
        (0.9399, 1.0057, 1207.8, 414.7), (0.9434, 1.0068, 1210.8, 414.6),
    ),
    "text8": (
        (1.0054, 0.9808, 1189.6, 410.9), (0.9953, 0.9797, 1209.8, 406.5),
        (1.0014, 0.9807, 1199.7, 412.4), (1.0030, 0.9802, 1191.9, 390.0),
    ),
}  # fmt: skip
WRITEUP_RUNS = ("no tracking", "attention", "cross-layer", "generation")
FIELDS = ("final_train_loss", "best_val_loss")
TIME_FIELDS = ("total_train_time", "avg_inference_tokens_per_second")
HEAD_COLUMNS = ("normalised_entropy", "distance", "previous", "sink", "head_diversity")
NEAR = 3  # tokens: "very local" heads of the write-up


def fields_table(study: Study) -> Rows:
    """Losses and times, ours beside the write-up's."""
    rows = [[
        "data set", "run", *FIELDS, "best in bits", "total_train_time (s)", "tokens per second",
    ]]  # fmt: skip
    for name in study["data_sets"]:
        for label, values in zip(WRITEUP_RUNS, WRITEUP[name], strict=True):
            losses, times = values[:2], values[2:]
            rows.append([
                name, f"write-up: {label}", *(f"{v:.4f}" for v in losses), _bits(losses[1]),
                *(f"{v:.0f}" for v in times),
            ])  # fmt: skip
        for variant in (PLAIN, TRACKED):
            found, took = study["fields"][name][variant], study["times"]["fields"][name][variant]
            if found["n"]:
                rows.append([
                    name, f"here: {variant} (n = {found['n']})",
                    *(_spread(found, key, ".4f") for key in FIELDS),
                    _bits(found["best_val_loss_mean"]),
                    *(_spread(took, key, ".0f") for key in TIME_FIELDS),
                ])  # fmt: skip
    return rows


def _bits(nats: float) -> str:
    return f"{nats / math.log(2):.3f}"


def _spread(values: dict[str, Any], key: str, shape: str) -> str:
    mean, sd = values[f"{key}_mean"], values[f"{key}_sd"]
    return f"{mean:{shape}}" + ("" if sd is None else f" ± {sd:{shape}}")


def changes_table(runs: Mapping[str, Runs]) -> Rows:
    """Where each series changes most, and whether it does."""
    kinds = {
        "js": "similarity of layers", "normalised_entropy": "entropy / log n",
        "distance": "mean distance", "previous": "weight on the previous token",
        "head_diversity": "difference of heads", "induction": "induction score",
    }  # fmt: skip
    rows = [["data set", "series (mean over layers)", "updates", "between", "ΔBIC", "verdict"]]
    for name, some in runs.items():
        for kind, label in kinds.items():
            c = change(some, kind)
            rows.append([
                name, label, f"{c.step:.0f}", f"{c.low:.0f} and {c.high:.0f}",
                f"{statistics.median(c.delta_bic):.1f}",
                "a change" if c.found else "a smooth curve does as well",
            ])  # fmt: skip
    return rows


def similarity_table(runs: Mapping[str, Runs]) -> Rows:
    """Groups of pairs of layers at the end, before training, and on shuffled text."""
    groups = {
        "within 1-3": lambda p: set(p) <= set(LOW),
        "within 4-6": lambda p: set(p) <= set(HIGH),
        "across": lambda p: p[0] in LOW and p[1] in HIGH,
    }
    rows = [["data set", "measure", "pairs", "trained", "untrained", "shuffled"]]
    for name, some in runs.items():
        for kind in ("js", "centred_cosine", "cka"):
            for label, chosen in groups.items():
                sources = [
                    [pairs_at(m, kind, -1) for m in some],
                    [pairs_at(m, kind, 0) for m in some],
                    [pairs_shuffled(m, kind) for m in some],
                ]
                cells = [
                    estimate([statistics.fmean(v for p, v in t.items() if chosen(p)) for t in each])
                    for each in sources
                ]
                rows.append([name, kind.replace("_", " "), label, *cells])
    return rows


def heads_table(runs: Mapping[str, Runs]) -> Rows:
    """Each layer at the end of training."""
    rows = [[
        "data set", "layer", "entropy / log n", "distance", "previous", "first", "heads differ",
        "best induction", f"heads within {NEAR} tokens", "writing: entropy", "writing: distance",
    ]]  # fmt: skip
    for name, some in runs.items():
        for layer in columns(some[0], "distance"):
            values = [
                f"{statistics.fmean(columns(m, kind)[layer][-1] for m in some):.3f}"
                for kind in HEAD_COLUMNS
            ]
            best = statistics.fmean(max(_heads_of(m, "induction", layer)) for m in some)
            near = [d <= NEAR for m in some for d in _heads_of(m, "distance", layer)]
            number = int(layer.removeprefix("blocks.")) + 1
            written = [m["written"]["columns"] for m in some]
            writing = [
                f"{statistics.fmean(w[f'{kind}/{layer}'][-1] for w in written):.3f}"
                for kind in WRITTEN
            ]
            rows.append([name, f"{number}", *values, f"{best:.3f}", f"{sum(near)} of {len(near)}",
                         *writing])  # fmt: skip
    return rows


def _heads_of(run: dict[str, Any], kind: str, layer: str) -> list[float]:
    return [v for n, v in run["heads"].items() if n.startswith(f"{kind}/{layer}/")]


def tracking_table(study: Study) -> Rows:
    """Bytes and texts of paired runs; what looks cost."""
    times = {(t["task"], t["seed"]): t for t in study["times"]["runs"] if t["name"] == TRACKED}
    rows = [[
        "data set", "seed", "logs of losses", "samples", "one look", "one update",
        "look / 500 updates", "all looks of this study", "generation, patterns kept",
    ]]  # fmt: skip
    for c in study["compared"]:
        t = times[c["data_set"], c["seed"]]
        costs = ["", "", "", ""]
        if "look" in t:
            costs = [f"{t['look']:.3f} s", f"{1000 * t['update']:.1f} ms", f"{t['share']:.2%}",
                     f"{t['share_as_run']:.1%}"]  # fmt: skip
        rows.append([
            c["data_set"], str(c["seed"]),
            f"{c['bytes']:,} bytes, {'the same' if c['identical'] else 'they DIFFER'}",
            "the same" if c["same_samples"] else "they DIFFER", *costs,
            f"{t['tokens_per_second_tracked'] / t['tokens_per_second']:.2f} of the speed",
        ])  # fmt: skip
    return rows


def associations_table(runs: Mapping[str, Runs]) -> Rows:
    """Attention along samples against quality, and along training against loss."""
    rows = [["data set", "runs", "attention", *QUALITIES]]
    for name, some in runs.items():
        for statistic in STATISTICS:
            cells = []
            for quality in QUALITIES:
                e = correlation(some, statistic, quality)
                cells.append(
                    f"{e.mean:+.2f} [{e.low:+.2f}, {e.high:+.2f}]" if e.n >= ENOUGH
                    else f"{e.mean:+.2f} (too few runs)"
                )  # fmt: skip
            rows.append([name, str(len(some)), statistic, *cells])
    return rows


def loss_table(runs: Mapping[str, Runs]) -> Rows:
    """Changes of attention against changes of the held-out loss, within runs."""
    kinds = {"js": "layer similarity", "distance": "mean distance", "normalised_entropy": "entropy"}
    rows = [["data set", "metric", "first differences within a run, given log step"]]
    for name, some in runs.items():
        rows += [
            [name, label, estimate([within_run(m, kind) for m in some])]
            for kind, label in kinds.items()
        ]
    return rows


def interventions_table(runs: Mapping[str, Runs]) -> Rows:
    """Effect of each change of attention on each quality."""
    rows = [["data set", "change", *QUALITIES]]
    for name, some in runs.items():
        for made in some[0]["interventions"]:
            if made == "none":
                continue
            cells = [
                estimate([effect(m, made, quality=quality) for m in some], "+.3f")
                for quality in QUALITIES
            ]
            rows.append([name, made, *cells])
    return rows


def texts_table(runs: Mapping[str, Runs]) -> Rows:
    """What a model writes at each temperature."""
    rows = [["data set", "temperature", "text"]]
    for name, some in runs.items():
        for m in some:
            rows += [
                [name, str(temperature), text.replace("\n", " ↵ ").replace("|", "¦")]
                for temperature, text in m["texts"]
            ]
    return rows
