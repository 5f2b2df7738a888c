"""What the study of attention over training takes from its runs while they train.

Contains two callbacks, what the logs of a run say in few numbers and how these are read, and the
comparison of runs with and without tracking. Leaves out what runs took (`times`), trained models
(`measures`), verdicts and report.
"""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from smearlens.models.base import HookedModel
from smearlens.training.attention_tracking import GenerationTracking
from smearlens.training.randomness import observing
from smearlens.training.tracking import Moment, Tracker

TRACKED, PLAIN = "tracked", "no tracking"
BINS = 60  # points of a training curve
COLUMNS = (  # kept at every look, of layers and pairs of layers
    "normalised_entropy", "normalised_entropy_without_first", "distance", "distance_without_first",
    "sink", "previous", "head_diversity", "induction", "js", "centred_cosine", "cka",
)  # fmt: skip
SINGLE = ("loss", "icl_score", "induction_accuracy")
NULLS = ("js", "centred_cosine", "cka")  # on shuffled tokens, kept of the last look
WRITTEN = ("normalised_entropy", "distance")  # kept of the layers while the model writes
OF_HEADS = ("distance", "previous", "induction")  # of every head at the last look
Numbers = dict[str, Any]


class Timed:
    """A tracker that also writes what it cost, in CPU seconds, into a log of its own."""

    def __init__(self, tracker: Tracker):
        self.tracker, self._ended = tracker, 0.0

    def __call__(self, moment: Moment) -> None:
        """Look if it is time to, and write what the look took, and all that went before it.

        Before it are the updates since the look before, and what else was done meanwhile.
        """
        if not self.tracker.is_due(moment.step, moment.steps):
            return
        started = time.process_time()
        before = started - self._ended if moment.step and self._ended else None
        self.tracker(moment)
        self._ended = time.process_time()
        row = {"step": moment.step, "look": self._ended - started, "updates": before}
        moment.write("tracking_seconds", row)


class Writing:
    """Lets the model write at chosen steps and writes its attention meanwhile to `writing.jsonl`.

    A log of its own: writing costs more than looking, and is no part of what looking costs.
    """

    def __init__(self, tracking: GenerationTracking, at: frozenset[int]):
        self.tracking, self.at = tracking, at

    def __call__(self, moment: Moment) -> None:
        """Let it write if it is time to."""
        if moment.step in self.at:
            with observing(moment.model):
                moment.write("writing", {"step": moment.step, **self.tracking(moment.model)})


class Snapshots:
    """Writes all patterns on one text at chosen steps to `patterns.jsonl`, a byte per weight."""

    def __init__(self, tokens: Int[Tensor, "1 pos"], pieces: Sequence[str], at: frozenset[int]):
        self.tokens, self.pieces, self.at = tokens, list(pieces), at

    def __call__(self, moment: Moment) -> None:
        """Look if it is time to."""
        model = moment.model
        if moment.step not in self.at or not isinstance(model, HookedModel):
            return
        with observing(model):
            _, cache = model.run_with_cache(
                self.tokens, names_filter=lambda name: name.endswith("attn.hook_pattern")
            )
        row: Numbers = {"step": moment.step, "tokens": self.pieces}
        for name in list(cache):
            weights = (cache[name][0] * 255).round().to(torch.uint8).cpu().numpy().tobytes()
            row[name.removesuffix(".attn.hook_pattern")] = base64.b64encode(weights).decode()
        moment.write("patterns", row)


# What the logs say -----------------------------------------------------------------------------


def logged(folder: Path, *, patterns: bool) -> Numbers:
    """Curves and tracked numbers of a run, without its times; with `patterns`, those too."""
    updates = rows_of(folder, "metrics")
    size = max(1, len(updates) // BINS)
    bins = [updates[i : i + size] for i in range(0, len(updates), size)]
    curve = [
        {"step": rows[-1]["step"], "loss": _short(statistics.fmean(r["loss"] for r in rows))}
        for rows in bins
    ]
    best = min(rows_of(folder, "evaluation"), key=lambda row: row["loss"])
    found: Numbers = {
        "train_curve": curve,
        "final_train_loss": curve[-1]["loss"],
        "best_val_loss": best["loss"],
        "best_step": best["step"],
    }
    looks = rows_of(folder, "tracking")
    if looks:
        found |= _tracked(looks) | {"written": _written(rows_of(folder, "writing"))}
    return found | (_shown(folder, looks[-1]) if looks and patterns else {})


def _tracked(looks: list[Numbers]) -> Numbers:
    """Columns over the looks, and what is kept of the last look alone."""
    last = looks[-1]

    def wanted(name: str) -> bool:
        kind, _, of = name.rpartition("/")
        return (kind in COLUMNS and of.startswith("blocks.")) or name in SINGLE

    names = [name for name in last if wanted(name)]
    nulls = [n for n in last if n.startswith("shuffled/") and n.split("/")[1] in NULLS]
    heads = [n for n in last if "/head." in n and n.split("/")[0] in OF_HEADS]
    return {
        "looks": {
            "steps": [row["step"] for row in looks],
            "columns": {name: [_short(row[name]) for row in looks] for name in names},
        },
        "shuffled": {name.removeprefix("shuffled/"): _short(last[name]) for name in nulls},
        "heads": {name: _short(last[name]) for name in heads},
    }


def _written(rows: list[Numbers]) -> Numbers:
    """Columns of the layers while the model writes, over the steps at which it did."""
    names = [f"generated/{kind}/" for kind in WRITTEN]
    kept = [n for n in rows[-1] if n.startswith(tuple(names)) and "/head." not in n]
    return {
        "steps": [row["step"] for row in rows],
        "columns": {
            name.removeprefix("generated/"): [_short(row[name]) for row in rows] for name in kept
        },
    }


def _shown(folder: Path, last: Numbers) -> Numbers:
    """Patterns over training of the most focused head of each layer: packed bytes in base64."""
    rows = rows_of(folder, "patterns")
    layers = [name for name in rows[0] if name not in ("step", "tokens")]
    length = len(rows[0]["tokens"])
    chosen, labels = [], []
    for layer in layers:
        prefix = f"normalised_entropy/{layer}/head."
        heads = {n: v for n, v in last.items() if n.startswith(prefix)}
        head = int(min(heads, key=lambda n: heads[n]).removeprefix(prefix))
        chosen.append((layer, head * length**2))
        labels.append(f"layer {int(layer.removeprefix('blocks.')) + 1}, head {head + 1}")
    weights = b"".join(
        base64.b64decode(row[layer])[start : start + length**2]
        for row in rows
        for layer, start in chosen
    )
    return {
        "patterns": {
            "steps": [row["step"] for row in rows],
            "labels": labels,
            "tokens": rows[0]["tokens"],
            "weights": base64.b64encode(zlib.compress(weights, 9)).decode(),
        }
    }


def compared(found: Sequence[Numbers], folders: Sequence[Path]) -> list[Numbers]:
    """Each run without tracking against the same run with it: logs of losses byte by byte."""
    place = {(m["task"], m["seed"]): i for i, m in enumerate(found) if m["name"] == TRACKED}
    result = []
    for m, folder in zip(found, folders, strict=True):
        if m["name"] != PLAIN:
            continue
        name = m["task"].removesuffix(f", {PLAIN}")
        i = place[name, m["seed"]]
        pairs = [
            [(f / f"{log}.jsonl").read_bytes() for f in (folder, folders[i])]
            for log in ("metrics", "evaluation")
        ]
        result.append({
            "data_set": name,
            "seed": m["seed"],
            "identical": all(one == other for one, other in pairs),
            "bytes": sum(len(one) for one, _ in pairs),
            "sha256": hashlib.sha256(b"".join(one for one, _ in pairs)).hexdigest(),
            "same_samples": m["written_sha256"] == found[i]["written_sha256"],
            "difference": found[i]["best_val_loss"] - m["best_val_loss"],
        })  # fmt: skip
    return result


# Reading a run ---------------------------------------------------------------------------------


def by_data_set(runs: Sequence[Numbers]) -> dict[str, list[Numbers]]:
    """Runs of every seed by data set, in the order of the seeds."""
    found: dict[str, list[Numbers]] = {}
    for m in sorted(runs, key=lambda m: m["seed"]):
        found.setdefault(m["task"], []).append(m)
    return found


def layer_mean(run: Numbers, kind: str) -> list[float]:
    """Mean over layers, or over pairs of layers, of a tracked number at every look."""
    return [statistics.fmean(values) for values in zip(*columns(run, kind).values(), strict=True)]


def columns(run: Numbers, kind: str) -> dict[str, list[float]]:
    """A tracked number at every look, by layer or pair of layers, such as "blocks.0-blocks.1"."""
    named = run["looks"]["columns"].items()
    return {n.removeprefix(f"{kind}/"): v for n, v in named if n.rpartition("/")[0] == kind}


def pairs_at(run: Numbers, kind: str, look: int) -> dict[tuple[int, int], float]:
    """Similarity of every pair of layers at one look."""
    return numbered({name: values[look] for name, values in columns(run, kind).items()})


def pairs_shuffled(run: Numbers, kind: str) -> dict[tuple[int, int], float]:
    """Similarity of every pair of layers at the end, on shuffled text."""
    prefix = f"{kind}/"
    named = {n.removeprefix(prefix): v for n, v in run["shuffled"].items() if n.startswith(prefix)}
    return numbered(named)


def numbered(pairs: dict[str, float]) -> dict[tuple[int, int], float]:
    """The same with pairs as numbers of layers, counted from 0."""
    found = {}
    for name, value in pairs.items():
        one, other = (int(layer.removeprefix("blocks.")) for layer in name.split("-"))
        found[one, other] = value
    return found


def rows_of(folder: Path, name: str) -> list[Numbers]:
    """The rows of a log of a run; none if it was never written."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _short(value: float | int | None) -> float | None:
    """Five significant digits; a value that is not finite stays None."""
    return None if value is None else float(f"{value:.5g}")
