"""MkDocs hook: formulas become MathML, which browsers draw without a script, a font or a request.

`pymdownx.arithmatex` marks them; where this hook is not run they stay readable as LaTeX.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

MARKED = re.compile(  # a formula in $$ inside a sentence keeps one of its dollars at each end
    r'\$?<(?P<tag>div|span) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>\$?',
    re.DOTALL,
)


def on_page_content(content: str, **_: Any) -> str:
    """The page with its formulas drawn."""
    return MARKED.sub(_formula, content)


def _formula(match: re.Match) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    return convert(html.unescape(match["latex"]).strip(), display=display)
