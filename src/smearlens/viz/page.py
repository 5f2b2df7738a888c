"""Pieces of a self-contained page: style, frame, verdicts, tables, pictures.

Leaves out what a report says (`viz.report`).
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Callable
from typing import Any

from smearlens.analysis.stats import Estimate

INTERVAL = re.compile(r"\[[^\]]*\]")

STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5b6770;--line:#d9dee3;--card:#f6f8fa;--bg:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e3e8ec;--soft:#9aa3ab;--line:#333b43;--card:#1b2127;
--bg:#12161a}img{background:#fff;border-radius:4px}}
body{font:15px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--bg);max-width:1060px;
margin:2rem auto;padding:0 1.2rem}h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;
margin-top:2.4rem}p.lead,figcaption,.soft{color:var(--soft)}table{border-collapse:collapse;width:100%;
font-size:13px;font-variant-numeric:tabular-nums}th,td{text-align:left;padding:.35rem .5rem;
border-bottom:1px solid var(--line);vertical-align:top}th{font-weight:600;color:var(--soft)}
td span{white-space:nowrap}.wide td span{display:block}.smearlens{margin:1.6rem 0}
.scroll{overflow-x:auto}img{max-width:100%}figure{margin:1rem 0}.claim{background:var(--card);
border:1px solid var(--line);border-left:5px solid var(--c);border-radius:4px;padding:.7rem 1rem;
margin:.8rem 0}.claim b.v{color:var(--c);text-transform:uppercase;font-size:.8rem;
letter-spacing:.04em}.supported{--c:#2e8b57}.refuted{--c:#c8553d}.undecided{--c:#b8860b}
.claim ul{margin:.4rem 0 0;padding-left:1.1rem;font-size:13px}details>summary{cursor:pointer;
color:var(--soft);font-size:13px}pre{background:var(--card);padding:.8rem;overflow-x:auto;
font-size:12px}
"""


def frame(title: str, body: list[str]) -> str:
    """A whole HTML document that asks the network for nothing."""
    return "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width,initial-scale=1'>"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
            *body,
            "</body></html>",
        ]
    )


def picture(data: bytes, text: str) -> str:
    """A PNG inside the page, with its description."""
    source = base64.b64encode(data).decode()
    return f"<figure><img alt='{html.escape(text)}' src='data:image/png;base64,{source}'></figure>"


def spoken(estimate: Estimate) -> str:
    """Mean, interval and number of runs, with as many digits as small numbers need.

    >>> spoken(Estimate(0.9187, 0.9121, 0.9252, 3)), spoken(Estimate(9.3e-05, -4.9e-05, 2.3e-4, 3))
    ('0.919 [0.912, 0.925], n = 3', '9.3e-05 [-4.9e-05, 2.3e-04], n = 3')
    """
    numbers = (estimate.mean, estimate.low, estimate.high)
    if estimate.n < 2:
        return f"{estimate.mean:.3g}, n = {estimate.n}: no interval"
    shape = ".1e" if 0 < max(map(abs, numbers)) < 0.002 else ".3f"
    mean, low, high = (format(number, shape) for number in numbers)
    return f"{mean} [{low}, {high}], n = {estimate.n}"


def stored_estimate(stored: dict[str, Any]) -> Estimate:
    """An estimate from a result file, which has null for the infinite ends of a single run."""
    missing = {"mean": math.nan, "low": -math.inf, "high": math.inf}
    ends = {key: other if stored[key] is None else stored[key] for key, other in missing.items()}
    return Estimate(n=stored["n"], **ends)


def claim_name(number: int) -> str:
    """What a claim is called: by its number in the registry, where 0 is none."""
    return f"claim {number}" if number else "own claim"


def claim_box(verdict: dict[str, Any]) -> str:
    """A verdict with its statement, reason, test and numbers."""
    claim = verdict["claim"]
    items = "".join(
        f"<li>{'causal' if f['causal'] else 'correlational'} · {html.escape(f['label'])}: "
        f"{spoken(stored_estimate(f['estimate']))}</li>"
        for f in verdict["findings"]
    )
    return (
        f"<div class='claim {verdict['outcome']}'><b class='v'>{verdict['outcome']}</b> "
        f"{claim_name(claim['number'])}: “{html.escape(claim['statement'])}”"
        f"<p>{html.escape(verdict['because'])}</p>"
        f"<details><summary>the test, and {len(verdict['findings'])} numbers behind the verdict"
        f"</summary><p class='soft'>{html.escape(claim['test'])}</p><ul>{items}</ul></details>"
        "</div>"
    )


def table(rows: list[list[str]]) -> str:
    """Rows as an HTML table, the first one its head."""
    head, *body = rows
    cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    lines = "".join("<tr>" + "".join(f"<td>{_cell(c)}</td>" for c in row) + "</tr>" for row in body)
    kind = " class='wide'" if len(head) > 6 else ""  # an interval below its mean
    return (
        f"<div class='scroll'><table{kind}><thead><tr>{cells}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A cell that may break before an interval and not within it."""
    return INTERVAL.sub(r"<span>\g<0></span>", html.escape(text))


def markdown(rows: list[list[str]]) -> str:
    """Rows as a Markdown table, the first one its head."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def png(draw: Callable[[Any], None]) -> bytes:
    """The picture that `draw` puts on a matplotlib Figure, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
