"""Hostile strings in everything that becomes a page: they stay text.

    python benchmarks/stress_injection.py

Each string goes through every widget (as token, label and title), the adapter to CircuitsVis, a
study's report (as name, command, configuration, section, cell, verdict), and a page of the
documentation. A parser then reads the page as a browser would: the only tags and scripts may be
those of the library. Leaves out drawing: the browser tests of the suite do that in Chromium.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from campaign import Campaign, script

from smearlens.viz import widgets
from smearlens.viz._payload import visible
from smearlens.viz.report import Part, write_report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

MARK = "hacked"  # never part of a tag, an attribute's name or a script
HOSTILE = [
    "</script><script>hacked()</script>", "<script>hacked()</script>", "</SCRIPT ><sCript>hacked()",
    "<img src=x onerror=hacked()>", "<svg/onload=hacked()>", "<!--<script>hacked()", "--><hacked>",
    "<![CDATA[<hacked>]]>", "'><b onmouseover='hacked()'>", '"><i onclick="hacked()">',
    "\\u003cscript\\u003ehacked()", "&lt;script&gt;hacked()", "&#60;hacked&#62;", "`${hacked()}`",
    "</div></div><hacked>", "</style><hacked>", "</title><hacked>", "</textarea><hacked>",
    "javascript:hacked()", "\u2028hacked()\u2029", "\u202ehacked", "\x00<hacked>", "\r\n\n<hacked>",
    "\\'><hacked>", "\\\"><hacked>", "{{7*7}}{% hacked %}", "]]><hacked>", "<hacked/>",
    "onload=hacked()", "';hacked();//", "\\</script\\><hacked>", "<a href='javascript:hacked()'>x",
]  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes by name, and the source of each script."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def breaches(html: str, harmless: str) -> list[str]:
    """In what a page with hostile strings differs from the same page with harmless ones."""
    page, plain = Page(html), Page(harmless)
    found = []
    tags, expected = ([t for t in p.tags if t != "span"] for p in (page, plain))  # [1, 2] has one
    if tags != expected:
        found.append(f"tags {sorted(set(tags) - set(expected))} were added or lost")
    if [name for name, _ in page.attributes] != [name for name, _ in plain.attributes]:
        found.append("attributes were added or lost")
    found += [f"script: {s[:60]}" for s in page.scripts if MARK in s and "slQueue" not in s]
    found += [
        f"{name}={value[:40]!r}"
        for name, value in page.attributes
        if value and name in ("href", "src") and value.lower().startswith("javascript")
    ]
    return found


def softmax(*shape: int) -> np.ndarray:
    weights = np.exp(np.random.default_rng(0).normal(size=shape))
    return weights / weights.sum(-1, keepdims=True)


def drawn(texts: list[str]) -> dict[str, Any]:
    """Every widget with these strings wherever it takes one."""
    n, title = len(texts), texts[0]
    values = np.arange(n) / n
    return {
        "attention_heads": widgets.attention_heads(
            softmax(2, n, n), texts, labels=texts[:2], title=title
        ),
        "attention_heads, keys of another text": widgets.attention_heads(
            softmax(2, n, n), texts, texts[::-1], title=title
        ),
        "attention_pattern": widgets.attention_pattern(softmax(n, n), texts, title=title),
        "evolution": widgets.evolution(softmax(2, 2, n, n), [0, 5], texts, title=title),
        "layer_similarity": widgets.layer_similarity(np.eye(n), texts, title=title),
        "state_map": widgets.state_map(np.ones((2, n, 3)), texts, title=title),
        "tokens": widgets.tokens(texts, values, title=title),
        "delta_strip": widgets.delta_strip(values, texts, title=title),
        "kernel_profile": widgets.kernel_profile([0.1, 0.7], [0, 1], title=title),
    }


def on_a_page(widget: Any) -> str:
    """A widget as the documentation shows it."""
    from sitegen.cells import Cell
    from sitegen.render import to_markdown

    page = ROOT / "docs" / "built" / "page.md"
    output = {"output_type": "display_data", "data": widget._repr_mimebundle_()}
    return to_markdown([Cell("show", "widget")], [[output]], page, page.parent)


def circuitsvis(texts: list[str]) -> str:
    """The adapter's page."""
    from smearlens.viz.circuitsvis_adapter import component

    n = len(texts)
    made = component("AttentionHeads", attention=softmax(2, n, n), tokens=texts)
    return made.to_html("page")


def report(text: str, widget: Any, out: Path) -> str:
    """A study's report in which every text is `text`."""
    claim = {"number": 3, "statement": text, "suspicion": text, "test": text, "source": text}
    finding = {
        "label": text, "causal": True, "estimate": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3},
    }  # fmt: skip
    verdict = {
        "claim": claim, "outcome": "undecided", "because": text, "n_seeds": 3,
        "findings": [finding],
    }  # fmt: skip
    study = {
        "study": text, "command": f"smearlens experiment {text!r} --data {text}", "recipe": text,
        "config": {"seeds": 3, "data": text, text: text}, "versions": {"torch": text},
        "seconds_in_cells": 1.0, "verdicts": [verdict], "measures": [],
    }  # fmt: skip
    part = Part(text, text, name="part", table=[[text, "b"], ["c", text]], widgets=[widget])
    return write_report(study, out, [part], title=text).read_text("utf-8")


def one_by_one(found: Campaign, where: str, make: Callable[[str], str], plain: str) -> None:
    """Every hostile string alone."""
    for text in HOSTILE:
        found.count("pages")
        try:
            wrong = breaches(make(text), plain)
        except Exception as error:
            wrong = [repr(error)]
        found.expect(not wrong, f"{where}, {text!r}: {wrong[:2]}")


def campaign() -> Campaign:
    found = Campaign(
        claim="Strings stay text",
        tried=f"{len(HOSTILE)} hostile strings as tokens, labels and titles of every widget, "
        "inline, saved and on a page of the documentation, and as every text of a study's report",
        target="the tags, attributes and scripts of the same page with harmless strings; the "
        "strings shown as they are",
        counts={"strings": len(HOSTILE), "widgets": 0, "pages": 0},
    )
    harmless = [f"t{i}" for i in range(len(HOSTILE))]
    with found.timed(), tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        tame = drawn(harmless)
        for kind, widget in drawn(HOSTILE).items():
            found.count("widgets")
            saved = {name: w.save_html(out / "w.html").read_text("utf-8")
                     for name, w in (("hostile", widget), ("tame", tame[kind]))}  # fmt: skip
            pairs = {
                "inline": (widget.to_html(), tame[kind].to_html()),
                "on a page": (widget.to_html("page"), tame[kind].to_html("page")),
                "saved": (saved["hostile"], saved["tame"]),
                "in the documentation": (on_a_page(widget), on_a_page(tame[kind])),
            }
            for form, (html, plain) in pairs.items():
                found.count("pages")
                wrong = breaches(html, plain)
                found.expect(not wrong, f"{kind} {form}: {wrong[:2]}")
            if kind != "kernel_profile":
                _require_shown(found, kind, widget)
        found.count("pages")
        wrong = breaches(circuitsvis(HOSTILE), circuitsvis(harmless))
        found.expect(not wrong, f"CircuitsVis: {wrong[:2]}")
        small = tame["tokens"]
        plain = report("t0", small, out)
        one_by_one(found, "report", lambda text: report(text, small, out), plain)
    return found


def _require_shown(found: Campaign, kind: str, widget: Any) -> None:
    """The strings are in the data of the widget, each as it is to be seen."""
    data = next(value for name, value in Page(widget.to_html("page")).attributes
                if name == "data-view")  # fmt: skip
    shown = json.loads(data or "{}")
    n = len(HOSTILE)
    rows = next(texts for texts in (shown["rows"], shown.get("cols", [])) if len(texts) == n)
    found.expect(rows == [visible(text) for text in HOSTILE], f"{kind}: strings shown otherwise")


def main() -> Iterable[Campaign]:
    yield campaign()


if __name__ == "__main__":
    script(main)
