"""What is read from trained models after training: kept beside each run, made once.

Leaves out training (`experiments.grid`) and what is read (the studies).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smearlens._files import write_atomically
from smearlens.experiments.grid import Cell, trained_model
from smearlens.experiments.threads import one_thread
from smearlens.models.base import HookedModel

Look = Callable[[HookedModel, Cell], dict[str, Any] | None]


def gather(
    cells: Sequence[Cell],
    measures: Sequence[dict[str, Any]],
    out: Path,
    look: Look,
    *,
    version: int = 1,
) -> list[dict[str, Any]]:
    """The measures of every run, with `evidence` where `look` has something to say.

    Args:
        cells: the grid
        measures: of its runs, in the same order
        out: folder of the study
        look: trained model and cell to plain numbers; None for a cell that nothing is asked of. Its
            results are kept beside the run and read from there the next time
        version: of what `look` asks; another one asks again
    """
    name = f"evidence-{version}.json"
    with one_thread():
        pairs = zip(cells, measures, strict=True)
        return [_with_evidence(c, m, out / "runs" / c.folder / name, look) for c, m in pairs]


def _with_evidence(cell: Cell, measures: dict[str, Any], path: Path, look: Look) -> dict[str, Any]:
    if not path.exists():
        write_atomically(path, json.dumps(look(trained_model(path.parent), cell)) + "\n")
    found = json.loads(path.read_text())
    return measures if found is None else {**measures, "evidence": found}
