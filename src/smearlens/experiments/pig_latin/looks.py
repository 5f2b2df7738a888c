"""What is read from trained models after training: kept beside each run, made once.

Leaves out training (`experiments.grid`) and what is read (the studies).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from smearlens._files import write_atomically
from smearlens.experiments.grid import Cell
from smearlens.models.base import HookedModel
from smearlens.models.families import load_model
from smearlens.training.checkpoint import list_checkpoints

Look = Callable[[HookedModel, Cell], dict[str, Any] | None]


def gather(
    cells: Sequence[Cell], measures: Sequence[dict[str, Any]], out: Path, look: Look
) -> list[dict[str, Any]]:
    """The measures of every run, with `evidence` where `look` has something to say.

    Args:
        cells: the grid
        measures: of its runs, in the same order
        out: folder of the study
        look: trained model and cell to plain numbers; None for a cell that nothing is asked of. Its
            results are kept in `evidence.json` of the run and read from there the next time
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training: results do not depend on it
    try:
        return [_with_evidence(*pair, out, look) for pair in zip(cells, measures, strict=True)]
    finally:
        torch.set_num_threads(threads)


def _with_evidence(cell: Cell, measures: dict[str, Any], out: Path, look: Look) -> dict[str, Any]:
    folder = out / "runs" / cell.folder
    path = folder / "evidence.json"
    if not path.exists():
        model = load_model(list_checkpoints(folder / "checkpoints")[-1]).eval()
        write_atomically(path, json.dumps(look(model, cell)) + "\n")
    found = json.loads(path.read_text())
    return measures if found is None else {**measures, "evidence": found}
