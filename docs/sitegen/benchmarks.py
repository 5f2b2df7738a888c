"""What the committed benchmarks say: tables, growth curves, and where ours is the slower side.

Reads `results/benchmarks/result.json` and the first line of each suite's file. Leaves out measuring
(`benchmarks/run.py`).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from typing import Any

from sitegen.reference import Markdown, table
from sitegen.results import RESULTS, ROOT

RESULT = RESULTS / "benchmarks" / "result.json"
SUITES = sorted(path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py"))
FORMS = {"time": "{:.3g} ×", "memory": "{:.3g} ×", "MB": "{:.3g} MB", "difference": "{:.1e}",
         "exponent": "{:.2f}"}  # fmt: skip
OF = {"time": "time", "memory": "peak memory", "MB": "peak memory", "difference": "difference",
      "exponent": "growth"}  # fmt: skip
PANELS = (("s", "positions"), ("MB", "positions"), ("s", "sequences"), ("MB", "sequences"),
          ("s", "layers"), ("MB", "layers"))  # fmt: skip
UNITS = {"s": "seconds, one thread", "MB": "peak memory, MB"}
SIZES = {  # suite -> what its tuples of sizes are, in order
    "attention": "batch, heads, positions, d_head",
    "char_gpt": "batch, positions, d_model, layers (two numbers: batch, positions); of the loss: "
    "targets, d_vocab, d_model",
    "conv": "batch, positions, channels, taps",
    "growth": "the values along the axis that is named",
    "hidden_attention": "batch, positions, channels, states",
    "hooks": "batch, positions",
    "import": "there are none",
    "models": "batch, positions, d_model, layers (two numbers: batch, positions)",
    "scan": "batch, positions, channels, states",
    "seq2seq": "words, longest source, longest target; of translation: words, tokens written",
    "tracking": "layers, heads, d_model, positions",
}


def result() -> dict[str, Any]:
    """The committed result."""
    return json.loads(RESULT.read_text("utf-8"))


def described(found: dict[str, Any] | None = None) -> Markdown:
    """Machine, versions, date, load, cost."""
    found = result() if found is None else found
    m, suites = found["machine"], found["suites"].values()
    packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    loads = [load for suite in suites for load in suite["load"]]
    dates = sorted({suite["date"] for suite in suites})
    minutes = sum(suite["cpu_seconds"] for suite in suites) / 60
    absent = [name for name in SUITES if name not in found["suites"]]
    lacking = f" Not measured yet: {', '.join(absent)}." if absent else ""
    return Markdown(
        f"Measured by `{found['command']}` on {' and '.join(dates)}: {m['processor']}, "
        f"{m['architecture']} with {m['instructions']}, {m['cores']} cores, CPU only. "
        f"Python {m['python']}, {packages}. Load average between {min(loads):.1f} and "
        f"{max(loads):.1f} while it ran; {minutes:.0f} minutes of processor time.{lacking}"
    )


def verdict(found: dict[str, Any] | None = None) -> Markdown:
    """How many bars are met, and the rows that miss theirs."""
    rows = [row for _, row in _rows(result() if found is None else found)]
    judged = [row for row in rows if row["bar"] is not None]
    missed = [row for row in judged if not row["ok"]]
    said = f"{len(rows)} results, {len(judged)} with a bar, {len(missed)} of them above it."
    return Markdown(said + ("\n\n" + _table(missed) if missed else ""))


def families(found: dict[str, Any] | None = None) -> Markdown:
    """A section per suite: what it compares, and its table; growth has a section of its own."""
    found = result() if found is None else found
    parts = []
    for name, suite in sorted(found["suites"].items()):
        rows = [row for row in suite["rows"] if row["unit"] != "exponent"]
        if rows:
            said = f"{_first_sentence(name)} Sizes: {SIZES[name]}."
            parts += [f"### {_title(name)}", said, _table(rows)]
    return Markdown("\n\n".join(parts))


def slower(found: dict[str, Any] | None = None) -> Markdown:
    """Every comparison in which ours takes more than its peer, and why."""
    rows = [
        (row["name"], row["shape"], _value(row, "value"), _spread(row), _why(row))
        for _, row in _rows(result() if found is None else found)
        if row["unit"] in ("time", "memory") and row["value"] > 1
    ]
    if not rows:
        return Markdown("Nowhere, of what was measured.")
    return table(("what", "sizes", "of the peer's", "10 to 90 %", "why"), map(_escaped, rows))


def growth(found: dict[str, Any] | None = None) -> Markdown:
    """The fitted exponents."""
    rows = _curves(result() if found is None else found)
    cells = [
        (row["name"], row["shape"], _value(row, "value"), _spread(row), _bar(row), _met(row))
        for row in rows
    ]
    head = ("what, against what", "sizes", "exponent", "95 % interval", "at most", "met")
    return table(head, map(_escaped, cells))


def draw_growth(found: dict[str, Any] | None = None) -> Any:
    """The points behind the exponents, on logarithmic axes; a matplotlib figure."""
    import matplotlib.pyplot as plt

    curves = _curves(result() if found is None else found)
    fig, axes = plt.subplots(3, 2, figsize=(9, 13), layout="constrained")
    for ax, (unit, axis) in zip(axes.flat, PANELS, strict=True):
        shown = [row for row in curves if (row["of"], row["axis"]) == (unit, axis)]
        for row in shown:
            label = row["name"].partition(": ")[2].partition(" against ")[0]
            label = f"{label}: {row['value']:.2f}"
            ax.loglog(row["sizes"], row["values"], marker="o", markersize=3, label=label)
        sizes = sorted({size for row in shown for size in row["sizes"]})
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7, rotation=45)
        ax.minorticks_off()
        ax.set_xlabel(axis)
        ax.set_ylabel(UNITS[unit])
        if shown:  # below the axes, where no curve is
            ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)
    return fig


def _rows(found: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, suite in sorted(found["suites"].items()) for row in suite["rows"]]


def _curves(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for _, row in _rows(found) if row["unit"] == "exponent"]


def _table(rows: Iterable[dict[str, Any]]) -> Markdown:
    head = ("what", "sizes", "kind", "measured", "10 to 90 %", "wall clock", "at most", "met")
    cells = [
        (row["name"], row["shape"], OF[row["unit"]], _value(row, "value"), _spread(row),
         f"{row['wall']:.2g} ×" if "wall" in row else "", _bar(row), _met(row))
        for row in rows
    ]  # fmt: skip
    return table(head, map(_escaped, cells))


def _why(row: dict[str, Any]) -> str:
    known = row["why"] or "not known"
    return f"equal within the spread; {known}" if row["low"] <= 1 else known


def _value(row: dict[str, Any], key: str) -> str:
    """Rounded; a number that misses its bar never reads as if it were the bar."""
    form = FORMS[row["unit"]]
    shown, bar = form.format(row[key]), "" if row["ok"] else form.format(row["bar"])
    if key == "value" and shown == bar:
        finer = form.replace(".3g", ".4g")  # results keep four digits
        shown = finer.format(row["value"])
        return shown if shown != finer.format(row["bar"]) else f"just above {shown}"
    return shown


def _spread(row: dict[str, Any]) -> str:
    if row["low"] == row["high"]:
        return ""
    form = FORMS[row["unit"]].removesuffix(" ×")
    return f"{form.format(row['low'])} to {form.format(row['high'])}"


def _bar(row: dict[str, Any]) -> str:
    return "" if row["bar"] is None else _value(row, "bar")


def _met(row: dict[str, Any]) -> str:
    return "" if row["bar"] is None else "yes" if row["ok"] else "**no**"


def _escaped(cells: Iterable[str]) -> list[str]:
    return [str(cell).replace("|", "&#124;") for cell in cells]


def _title(suite: str) -> str:
    return suite.replace("_", " ").capitalize()


def _first_sentence(suite: str) -> str:
    """What the docstring of the suite's file begins with."""
    tree = ast.parse((ROOT / "benchmarks" / f"bench_{suite}.py").read_text("utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
