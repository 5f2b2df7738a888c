"""What the committed campaigns tried and found, for the page that shows it.

Reads `results/stress/result.json`; leaves out running them (`benchmarks/stress.py`).
"""

from __future__ import annotations

import html
import json
from typing import Any

from sitegen.reference import Markdown, table
from sitegen.results import RESULTS

ROWS = {  # property -> beginnings of the claims of its campaigns
    "Exact resume": ("Exact resume",),
    "Whole files": ("Files are whole",),
    "Integrity": ("A flipped bit", "A broken file is refused"),
    "Strict loading": ("Weights are loaded",),
    "Data and studies": ("A broken data file", "A broken file of a study"),
    "Code execution": ("No code is run",),
    "Wrong input": ("Wrong input",),
    "Hooks": ("A failing hook",),
    "Caches": ("A cached tensor",),
    "Strings on pages": ("Strings stay text",),
    "Determinism": ("The same call",),
    "nan and inf": ("nan and inf",),
    "Memory": ("Memory is foretold",),
}


def overview() -> Markdown:
    """A line for each property: what was counted, and how much of it failed."""
    rows = []
    for name in ROWS:
        found = of(name)
        commands = sorted({f"`{c['command']}`" for c in found})
        counted = "<br>".join(f"{_short(c, found)}{_counts(c)}" for c in found)
        failed = sum(c["failed"] for c in found)
        rows.append((f"[{name}](#{_anchor(name)})", counted, f"{failed}", "<br>".join(commands)))
    return table(("property", "tried", "failed", "command"), rows)


def in_full() -> Markdown:
    """Every campaign: what was done, what must come out, what came out."""
    parts = []
    for name in ROWS:
        parts.append(f"## {name}")
        said = ""
        for c in of(name):
            if c["tried"] != said:
                parts.append(f"{_text(c['tried'])[:1].upper()}{_text(c['tried'])[1:]}.")
                parts.append(f"*Target* {_text(c['target'])}.")
                said = c["tried"]
            parts.append(f"{_text(c['claim'])}: {_counts(c)}; **{c['failed']} failed**.")
            parts += [f"- {_text(failure)}" for failure in c["failures"]]
    return Markdown("\n\n".join(parts))


def conditions() -> Markdown:
    """Where and with what the campaigns ran."""
    result = read()
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    seconds = sum(c["seconds"] for c in result["campaigns"])
    return Markdown(
        f"`{result['command']}`: {len(result['campaigns'])} campaigns, {seconds / 60:.0f} minutes "
        f"of processor time on {result['machine']}; {versions}."
    )


def of(name: str) -> list[dict[str, Any]]:
    """The campaigns of a property."""
    return [c for c in read()["campaigns"] if c["claim"].startswith(ROWS[name])]


def read() -> dict[str, Any]:
    """The committed result."""
    return json.loads((RESULTS / "stress" / "result.json").read_text("utf-8"))


def _counts(campaign: dict[str, Any]) -> str:
    counts = campaign["counts"].items()
    return ", ".join(f"{number:,} {_text(name)}" if number >= 1 or not number else
                     f"{_text(name)} {number:g}" for name, number in counts)  # fmt: skip


def _short(campaign: dict[str, Any], beside: list[dict[str, Any]]) -> str:
    """What tells a campaign from those beside it: the end of its claim."""
    return f"{_text(campaign['claim'].partition(': ')[2])}: " if ":" in campaign["claim"] else ""


def _text(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;")


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
