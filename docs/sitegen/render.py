"""Cells and their outputs as Markdown; figures become files beside the page.

Leaves out running them (`sitegen.execute`).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sitegen.cells import Cell


def to_markdown(
    cells: Sequence[Cell], outputs: Sequence[Sequence[Any]], page: Path, root: Path
) -> str:
    """The page, and its figures written as `{page.stem}-{n}.png` into the folder of `page`.

    A page with components of CircuitsVis gets their script, once, from the assets of the site,
    whose pages lie below `root`.
    """
    figures: list[Path] = []
    parts = []
    for cell, shown in zip(cells, outputs, strict=True):
        if cell.kind == "markdown":
            parts.append(cell.source)
            continue
        if cell.kind != "show":
            parts.append(f"```python\n{cell.source}\n```")
        parts += [_output(output, cell, page, figures) for output in _joined(shown)]
    if any("slQueue" in part for part in parts):
        up = "../" * len(page.relative_to(root).with_suffix("").parts)
        parts.append(f'<script src="{up}assets/circuitsvis.js"></script>')
    return "\n\n".join(part for part in parts if part) + "\n"


def _joined(outputs: Sequence[Any]) -> list[Any]:
    """Outputs with consecutive pieces of text in one."""
    joined: list[Any] = []
    for output in outputs:
        streams = [o["output_type"] == "stream" for o in (*joined[-1:], output)]
        if streams == [True, True]:
            joined[-1] = {**joined[-1], "text": joined[-1]["text"] + output["text"]}
        else:
            joined.append(output)
    return joined


def _output(output: Any, cell: Cell, page: Path, figures: list[Path]) -> str:
    if output["output_type"] == "stream":
        return _text(output["text"], " .error" if cell.kind == "raises" else "")
    data = output["data"]
    if "smearlens" in data.get("text/html", "")[:30] or "slQueue" in data.get("text/html", ""):
        return _widget(data["text/html"])
    if "text/markdown" in data:
        return data["text/markdown"]
    if "image/png" in data:
        figures.append(page.with_name(f"{page.stem}-{len(figures) + 1}.png"))
        image = data["image/png"]
        content = base64.b64decode(image) if isinstance(image, str) else image
        figures[-1].write_bytes(content)
        return f"![Figure of the code above]({figures[-1].name}){{ .figure }}"
    return _text(data["text/plain"])


def _text(text: str, extra: str = "") -> str:
    fence = "````" if "```" in text else "```"
    return f"{fence} {{ .text .output{extra} }}\n{text.rstrip()}\n{fence}"


def _widget(html: str) -> str:
    """A widget on a page that has its script already."""
    from smearlens.viz import embed_bundle
    from smearlens.viz.widgets import page_bundle

    return html.removesuffix(page_bundle()).removesuffix(embed_bundle().html)
