"""What was installed and tested together, and what shards cost: tables from committed results.

Reads `results/compatibility/result.json`, `results/shards/result.json` and `pyproject.toml`. Leaves
out measuring (`benchmarks/compatibility.py`, `benchmarks/shards_memory.py`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from sitegen.reference import Markdown, table
from sitegen.results import RESULTS, ROOT

COLUMNS = ("torch", "transformer-lens")


def compatibility() -> dict[str, Any]:
    """The committed result; without one, that nothing was tried."""
    path = RESULTS / "compatibility" / "result.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"combinations": {}}


def claimed() -> Markdown:
    """What pyproject.toml allows."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    python = re.search(r'^requires-python = "(.*)"', text, re.MULTILINE)
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    if python is None or block is None:
        raise ValueError("pyproject.toml has no requires-python or no dependencies")
    bounds = [f"Python {python[1]}", *re.findall(r'"(.*)"', block[1])]
    return Markdown("The package allows " + ", ".join(f"`{b}`" for b in bounds) + ".")


def combinations(found: dict[str, Any] | None = None) -> Markdown:
    """A row per combination: versions, tests, outcome."""
    found = compatibility() if found is None else found
    if not found["combinations"]:
        return Markdown("**No combination was tried yet.**")
    rows = []
    for name, c in found["combinations"].items():
        versions = [c.get("packages", {}).get(package, "") for package in COLUMNS]
        tests = f"{c['passed']} passed, {c['failed']} failed" if "passed" in c else ""
        rows.append((f"`{name}`", c["why"], c.get("python", ""), *versions, tests, c["outcome"]))
    head = ("combination", "what it stands for", "Python", *COLUMNS, "tests", "outcome")
    return table(head, rows)


def oldest(found: dict[str, Any] | None = None) -> Markdown:
    """Every package of the oldest combination that was installed."""
    found = compatibility() if found is None else found
    packages = found["combinations"].get("oldest", {}).get("packages", {})
    if not packages:
        return Markdown("**It was not tried yet.**")
    return Markdown(", ".join(f"{name} {version}" for name, version in sorted(packages.items())))


def gpu(found: dict[str, Any] | None = None) -> Markdown:
    """Whether any combination saw a GPU."""
    found = compatibility() if found is None else found
    seen = [name for name, c in found["combinations"].items() if c.get("gpu")]
    if seen:
        return Markdown(f"With a GPU: {', '.join(seen)}.")
    return Markdown(
        "**Behaviour on a GPU is untested**: no combination was run on a machine with one. The "
        "code moves models and batches to the device that `accelerate` chooses, and has no kernel "
        "of its own; which of its guarantees hold there is not known."
    )


def made(found: dict[str, Any] | None = None) -> Markdown:
    """Command, machine and tests."""
    found = compatibility() if found is None else found
    if not found["combinations"]:
        return Markdown("")
    tests = ", ".join(f"`{test}`" for test in found["tests"])
    return Markdown(f"Made by `{found['command']}` on {found['machine']}, with {tests}.")


def shards_memory() -> Markdown:
    """Peak memory of `write_shards`, by size of the text."""
    found = json.loads((RESULTS / "shards" / "result.json").read_text("utf-8"))
    rows = [
        (f"{r['text_mb']:.0f} MB", f"{r['tokens']:,}", r["shards"], f"{r['peak_mb']:.0f} MB",
         f"{r['text_mb'] / r['cpu_seconds']:.0f} MB")
        for r in found["rows"]
    ]  # fmt: skip
    head = ("text", "tokens", "shards", "peak memory", "text per second of processor time")
    made = f"\n\nBytes as tokens; measured by `{found['command']}` on {found['machine']}."
    return Markdown(table(head, rows) + made)
