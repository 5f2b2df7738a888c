"""What the runs of the study of attention over training took, and the fields of the write-up.

Times are kept apart from everything that must come out the same again. Leaves out what the runs
found.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smearlens._files import write_atomically
from smearlens.experiments.evolution.logs import PLAIN, TRACKED, Numbers, rows_of
from smearlens.experiments.grid import Cell, trained_model
from smearlens.experiments.threads import one_thread

SPACING = 500  # updates between two looks in the write-up
ROUNDS = 5  # of the timing of generation


def times(cell: Cell, folder: Path) -> Numbers:
    """What the run took: seconds on the clock, CPU seconds of a look and an update, generation."""
    path = folder / "times.json"
    if not path.exists():
        write_atomically(path, json.dumps(_generation_speed(trained_model(folder))) + "\n")
    found = {
        "task": cell.task, "name": cell.name, "seed": cell.seed,
        "total_train_time": sum(row["seconds"] for row in rows_of(folder, "timing")),
        **json.loads(path.read_text()),
    }  # fmt: skip
    rows = rows_of(folder, "tracking_seconds")
    timed = _updates(folder, rows)
    if timed:
        look = statistics.fmean(row["look"] for row in rows)
        update = sum(seconds for seconds, _ in timed) / sum(updates for _, updates in timed)
        found |= {"look": look, "update": update, "share": look / (SPACING * update)}
        found["share_as_run"] = look * len(rows) / (update * cell.train.steps)
    return found


def _updates(folder: Path, rows: Sequence[Numbers]) -> list[tuple[float, int]]:
    """CPU seconds between two looks, and updates in them, where nothing but updates was done.

    The seconds before a look also hold what else came after the look before it: the model wrote,
    its patterns were kept, or it was evaluated. Such stretches are left out, unless all are such.
    """
    wrote = {row["step"] for row in rows_of(folder, "writing")}
    evaluated = {row["step"] for row in rows_of(folder, "evaluation")}
    found, clean = [], []
    for before, row in pairwise(rows):
        if row["updates"] is None:
            continue
        first, last = before["step"], row["step"]
        found.append((row["updates"], last - first))
        if first not in wrote and evaluated.isdisjoint(range(first + 1, last + 1)):
            clean.append(found[-1])
    return clean or found


def _generation_speed(model: Any) -> Numbers:
    """Tokens per CPU second of one text at a time, plain and with every pattern kept, in turns."""
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    count = model.config.n_ctx - 1
    kept: list[Tensor] = []
    names = [name for name in model.hook_dict if name.endswith("attn.hook_pattern")]

    def keep(pattern: Tensor, hook: Any) -> None:
        kept.append(pattern.detach())

    seconds: dict[str, list[float]] = {"": [], "_tracked": []}
    with one_thread():
        for _ in range(ROUNDS):
            for name, hooks in (("", []), ("_tracked", [(n, keep) for n in names])):
                generator, started = torch.Generator().manual_seed(0), time.process_time()
                with model.hooks(hooks):
                    model.generate(prompt, count, generator=generator)
                seconds[name].append(time.process_time() - started)
                kept.clear()
    return {
        f"tokens_per_second{name}": count / statistics.median(each)
        for name, each in seconds.items()
    }


# The fields of the write-up --------------------------------------------------------------------


def fields(found: Sequence[Numbers], data_sets: Sequence[str]) -> dict[str, Numbers]:
    """Losses of each data set under the names of the write-up, mean and spread over seeds."""
    names = ("final_train_loss", "best_val_loss")
    return {
        data_set: {PLAIN: _spread(found, f"{data_set}, {PLAIN}", {n: n for n in names}),
                   TRACKED: _spread(found, data_set, {n: n for n in names})}
        for data_set in data_sets
    }  # fmt: skip


def time_fields(timed: Sequence[Numbers], data_sets: Sequence[str]) -> dict[str, Numbers]:
    """Times of each data set, likewise."""
    plain = {
        "total_train_time": "total_train_time",
        "tokens_per_second": "avg_inference_tokens_per_second",
    }
    tracked = {
        "total_train_time": "total_train_time",
        "tokens_per_second_tracked": "avg_inference_tokens_per_second",
    }
    return {
        data_set: {PLAIN: _spread(timed, f"{data_set}, {PLAIN}", plain),
                   TRACKED: _spread(timed, data_set, tracked)}
        for data_set in data_sets
    }  # fmt: skip


def _spread(found: Sequence[Numbers], task: str, names: dict[str, str]) -> Numbers:
    runs = [m for m in found if m["task"] == task]
    result: Numbers = {"n": len(runs)}
    for key, name in names.items():
        values = [m[key] for m in runs]
        result[f"{name}_mean"] = statistics.fmean(values) if values else None
        result[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return result
