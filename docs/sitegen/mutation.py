"""What the committed mutation test says, and which properties are tested, for the page of both.

Reads `results/mutation/result.json` and the files of the properties; leaves out running them
(`benchmarks/mutation.py`, `tests/properties`).
"""

from __future__ import annotations

import ast
import html
import json
from typing import Any

from sitegen.reference import Markdown, table
from sitegen.results import RESULTS, ROOT

FIGURES = ("tried", "make no difference", "noticed", "score [95 %]")


def scores() -> Markdown:
    """Of each package the newest sample, before its survivors were looked at."""
    newest = {
        package: (name, part)
        for name, sample in _samples()
        for package, part in sample["at_first"]["packages"].items()
    }
    changes = _result()["changes"]
    rows = [
        (f"`{package}`", f"{count:,}", newest[package][0], *_figures(newest[package][1]))
        for package, count in changes.items()
    ]
    return table(("package", "possible changes", "sample", *FIGURES), rows)


def history() -> Markdown:
    """Every sample before and after the tests were made better by what survived in it."""
    rows = []
    for name, sample in _samples():
        for said in ("at_first", "now"):
            for package, part in sample[said]["packages"].items():
                rows.append((name, said.replace("_", " "), f"`{package}`", *_figures(part)))
    return table(("sample", "", "package", *FIGURES), rows)


def commands() -> Markdown:
    """What was run for each sample."""
    lines = [sample["command"] for _, sample in _samples()]
    return Markdown("```sh\n" + "\n".join(lines) + "\n```")


def survivors() -> Markdown:
    """Every change that no test notices now, with the reason why it may stay."""
    rows = []
    for name, sample in _samples():
        for entry in sample["now"]["survivors"]:
            change = f"<code>{html.escape(entry['change']).replace('|', '&#124;')}</code>"
            reason = html.escape(entry["accepted"] or "not accepted: a test is missing")
            rows.append((name, f"`{entry['where'].removeprefix('smearlens/')}`", change, reason))
    return table(("sample", "where", "change", "why it may stay"), rows)


def properties() -> Markdown:
    """How many properties each file of `tests/properties` states, and of what."""
    rows, total = [], 0
    for file in sorted((ROOT / "tests" / "properties").glob("test_*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        stated = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and _given(n)]
        about = (ast.get_docstring(tree) or "").splitlines()[0]
        if stated:
            rows.append((f"`{file.name}`", str(len(stated)), about))
        total += len(stated)
    return table(("file", "properties", "about"), [*rows, ("all", str(total), "")])


def _given(function: ast.FunctionDef) -> bool:
    calls = [d.func for d in function.decorator_list if isinstance(d, ast.Call)]
    return any(isinstance(call, ast.Name) and call.id == "given" for call in calls)


def _result() -> dict[str, Any]:
    return json.loads((RESULTS / "mutation" / "result.json").read_text("utf-8"))


def _samples() -> list[tuple[str, dict[str, Any]]]:
    """In the order in which they were drawn."""
    return sorted(_result()["samples"].items(), key=lambda pair: pair[1]["now"]["seed"])


def _figures(found: dict[str, Any]) -> tuple[str, ...]:
    score = f"{found['score']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"
    return str(found["tried"]), str(found["accepted"]), str(found["noticed"]), score
