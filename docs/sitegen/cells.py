"""Sources as lists of cells: percent scripts (`# %%`) and Markdown pages with code that runs.

Leaves out running the code (`sitegen.execute`) and writing pages (`sitegen.render`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

HEADER = re.compile(r"\A# ---\n((?:#.*\n)+?)# ---\n")
FENCE = re.compile(r"^```python (run|show|raises)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """A piece of a page.

    Attributes:
        kind: "markdown"; "run" shows code and output, "show" the output alone, "raises" code and
            the message of the exception it must raise
        source: text or code
    """

    kind: Literal["markdown", "run", "show", "raises"]
    source: str


def parse_percent(text: str) -> list[Cell]:
    r"""Cells of a percent script: `# %%` opens code, `# %% [markdown]` comments that are text.

    >>> script = "# ---\n# k: v\n# ---\n# %% [markdown]\n# Hi\n# %%\n1"
    >>> [cell.kind for cell in parse_percent(script)]
    ['markdown', 'run']
    """
    header = HEADER.match(text)
    if header is None:
        raise ValueError("a percent script starts with a header between two lines '# ---'")
    cells = []
    for piece in re.split(r"^# %%", text[header.end() :], flags=re.MULTILINE)[1:]:
        title, _, body = piece.partition("\n")
        if title.strip() == "[markdown]":
            lines = (line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
            cells.append(Cell("markdown", "\n".join(lines).strip()))
        elif body.strip():
            cells.append(Cell("run", body.strip()))
    return cells


def parse_page(text: str) -> list[Cell]:
    r"""Cells of a Markdown page: fences "```python run", "show" and "raises" are code that runs.

    >>> [(c.kind, c.source) for c in parse_page("One\n\n```python run\n1 + 1\n```\n")]
    [('markdown', 'One'), ('run', '1 + 1')]
    """
    pieces = FENCE.split(text)  # text, kind, code, text, kind, code, … text
    cells = []
    for index, piece in enumerate(pieces):
        if index % 3 == 0 and piece.strip():
            cells.append(Cell("markdown", piece.strip()))
        elif index % 3 == 2:
            cells.append(Cell(pieces[index - 1], piece.strip()))  # pyrefly: ignore
    return cells
