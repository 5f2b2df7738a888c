"""The `Widget` object: one view as HTML, as a file, as a picture; and the script of a page.

Leaves out: the kinds of widgets (`widgets.py`) and what is drawn (`assets/widgets.js`).
"""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from smearlens.viz._payload import safe_html, safe_json
from smearlens.viz._picture import draw

PAGE_BYTES = 58_000  # a page with 8 heads of 64 tokens stays below, whatever the numbers

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root{{color-scheme:light dark;--ink:#1c2026;--ground:#fff}}
@media(prefers-color-scheme:dark){{:root{{--ink:#e2e6eb;--ground:#14171c}}}}
:root[data-theme=light]{{color-scheme:light;--ink:#1c2026;--ground:#fff}}
:root[data-theme=dark]{{color-scheme:dark;--ink:#e2e6eb;--ground:#14171c}}
body{{margin:16px;color:var(--ink);background:var(--ground)}}
</style>
{body}
</html>
"""


@cache
def page_bundle() -> str:
    """The script of all widgets, for once on a page of widgets made with `bundle="page"`."""
    source = resources.files("smearlens.viz").joinpath("assets/widgets.js").read_text("utf-8")
    lines = (line.strip() for line in source.splitlines())
    return "<script>{}</script>".format("\n".join(s for s in lines if s and s[:2] != "//"))


@dataclass(frozen=True, eq=False, repr=False)
class Widget:
    """A picture of activations that answers to the pointer and the keyboard, without a network.

    In a notebook the last expression of a cell shows it. Where scripts are not allowed (an
    untrusted notebook, a repository's web page) its static picture stays.
    """

    payload: Mapping[str, Any]
    values: Float32[np.ndarray, "frame head query key"]
    summary: str
    max_width: int

    def __repr__(self) -> str:
        return self.summary

    def to_html(self, bundle: Literal["inline", "page"] = "inline") -> str:
        """HTML of the widget.

        Args:
            bundle: `"inline"` adds the script, `"page"` leaves it to one `page_bundle()` somewhere
                on the page; that form is one line of ASCII, fit for Markdown
        """
        if bundle not in ("inline", "page"):
            raise ValueError(f"bundle must be 'inline' or 'page', got {bundle!r}")
        data = safe_json(self.payload)
        left = PAGE_BYTES - len(page_bundle()) - len(data)
        limit = (
            12_000 if left < 0 else min(12_000, max(3_000, left * 3 // 4))
        )  # base64 adds a third
        source = base64.b64encode(draw(self.payload, self.values, limit=limit)).decode()
        html = (
            f'<div class="smearlens" style="max-width:{self.max_width}px" data-view=\'{data}\'>'
            f'<img alt="{safe_html(self.summary)}" style="max-width:100%" '
            f'src="data:image/png;base64,{source}"></div>'
        )
        return html + page_bundle() if bundle == "inline" else html

    def _repr_html_(self) -> str:
        return self.to_html()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.to_html(), "text/plain": self.summary}

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that needs no other file; an old file is replaced at once or not at all."""
        title = safe_html(self.payload["title"] or self.summary)
        return _write(path, PAGE.format(title=title, body=self.to_html()).encode())

    def save_png(self, path: str | os.PathLike[str], zoom: int = 2) -> Path:
        """Write the static picture on white, `zoom` pixels to a CSS pixel."""
        return _write(path, draw(self.payload, self.values, zoom=zoom, ground="white"))


def _write(path: str | os.PathLike[str], content: bytes) -> Path:
    """Replace `path` by `content` in one step, with the rights a new file gets here."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path={str(target)!r}: no folder {target.parent}; create it first")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target
