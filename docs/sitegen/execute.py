"""Run cells: tutorials as notebooks in a kernel of their own, pages in one shell in this process.

Both give the same outputs (those of a notebook), and in both an exception stops the build. Leaves
out how outputs become Markdown (`sitegen.render`).
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

from sitegen.cells import Cell

SECONDS_PER_CELL = 300
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


class CellError(Exception):
    """A cell that raised, or one that should have and did not."""


def run_tutorial(name: str, cells: list[Cell], folder: str) -> tuple[Any, list[list[Any]]]:
    """The executed notebook, and the outputs of each cell."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    make = {"markdown": nbformat.v4.new_markdown_cell, "run": nbformat.v4.new_code_cell}
    book = nbformat.v4.new_notebook(
        cells=[make[cell.kind](cell.source, id=f"cell-{i}") for i, cell in enumerate(cells)],
        metadata={"kernelspec": KERNEL},
    )
    options = {
        "timeout": SECONDS_PER_CELL,
        "resources": {"metadata": {"path": folder}},
        "record_timing": False,
        "extra_arguments": ["--IPKernelApp.log_level=ERROR"],
    }
    try:
        NotebookClient(book, **options).execute()
    except CellExecutionError as error:
        raise CellError(f"{name}: {error}") from None
    return book, [cell.get("outputs", []) for cell in book.cells]


def run_page(name: str, cells: list[Cell]) -> list[list[Any]]:
    """Outputs of each cell, run one after the other in a fresh namespace."""
    shell = _shell()
    shell.reset(new_session=False)
    return [[] if cell.kind == "markdown" else _run(shell, name, cell) for cell in cells]


def _shell() -> Any:
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    if "inline" not in matplotlib.get_backend():
        shell.enable_gui = lambda gui=None: None  # there is no event loop to join
        shell.enable_matplotlib("inline")
    return shell


def _run(shell: Any, name: str, cell: Cell) -> list[Any]:
    """Outputs of one cell, as a notebook has them."""
    from IPython.utils.capture import capture_output

    with capture_output() as captured:
        shell.display_trap.hook = sys.displayhook  # the one that captures
        result = shell.run_cell(cell.source, silent=False)
    error = result.error_before_exec or result.error_in_exec
    if (error is not None) != (cell.kind == "raises"):
        trace = "".join(traceback.format_exception(error)) if error else "it should have raised"
        raise CellError(f"{name}: {cell.source}\n\n{trace}\n{captured.stdout}")
    if error is not None:
        return [_stream(f"{type(error).__name__}: {error}\n")]
    if captured.stderr:
        sys.stderr.write(f"{name}: {captured.stderr}")
    shown = [{"output_type": "display_data", "data": dict(o.data)} for o in captured.outputs]
    return ([_stream(captured.stdout)] if captured.stdout else []) + shown


def _stream(text: str) -> dict[str, str]:
    return {"output_type": "stream", "name": "stdout", "text": text}
