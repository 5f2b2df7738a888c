"""What the report on scans says: cost and errors of every scan, its tables and figures.

Reads only the study's plain numbers (the contents of `result.json`). Leaves out measuring and
judging (`scans`), and how a report is put together (`viz.report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import exp, log
from pathlib import Path
from typing import Any

from smearlens.viz import plots
from smearlens.viz.report import Part, Study, write_report

PASSES = {"forward": "forward", "both": "forward and backward"}
ROUNDING = 2.0**-24  # of float32, relative


def write_scans_report(study: Study, out: Path) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.md` of the study; returns the page."""
    title = "Scans: what they cost, and which of them lose precision with length"
    return write_report(study, out, _parts(study), title=title)


# Tables ----------------------------------------------------------------------------------------


def times_table(study: Study) -> list[list[str]]:
    """Ratio to the blocked scan and milliseconds, by scan, passes and length."""
    lengths = _unique(study["times"], "length")
    rows = [["scan", "passes", *(f"L = {length:,}" for length in lengths)]]
    for passes, label in PASSES.items():
        for scan in _unique(study["times"], "scan"):
            cells = [
                _time_cell(_only(study["times"], scan=scan, passes=passes, length=length))
                for length in lengths
            ]
            rows.append([scan, label, *cells])
    return rows


def _time_cell(row: dict[str, Any]) -> str:
    if row["ms"] is None:
        return "too slow to time"
    if row["scan"] == "blocked":
        return f"1 ({row['ms']:.3g} ms [{row['low']:.3g}, {row['high']:.3g}])"
    spread = f"[{row['ratio_low']:.2g}, {row['ratio_high']:.2g}]"
    return f"{row['ratio']:.3g} {spread} ({row['ms']:.3g} ms)"


def compiled_table(study: Study) -> list[list[str]]:
    """The write-up's two scans, eager and compiled, forward."""
    rows = [["scan", "length", "eager (ms)", "compiled (ms)", "times faster", "compiling (s)"]]
    for row in study["compiled"]:
        start = [row["scan"], f"{row['length']:,}"]
        if "failed" in row:
            rows.append([*start, "", row["failed"], "", ""])
            continue
        rows.append([
            *start, f"{row['eager_ms']:.3g}", f"{row['compiled_ms']:.3g}",
            f"{row['eager_ms'] / row['compiled_ms']:.2g}", f"{row['compile_seconds']:.0f}",
        ])  # fmt: skip
    return rows


def memory_table(study: Study) -> list[list[str]]:
    """Peak rise of resident memory in both passes, megabytes."""
    lengths = _unique(study["memory"], "length")
    rows = [["scan", *(f"L = {length:,} (MB)" for length in lengths)]]
    for scan in _unique(study["memory"], "scan"):
        cells = []
        for length in lengths:
            found = _all(study["memory"], scan=scan, length=length)
            value = found[0]["bytes"] if found else None
            reason = found[0].get("failed", "") if found else "too slow to run"
            cells.append(reason if value is None else f"{value / 1e6:.3g}")
        rows.append([scan, *cells])
    return rows


def errors_table(study: Study, dtype: str) -> list[list[str]]:
    """Largest error over seeds by regime and scan, for inputs of a precision."""
    measures = _all(study["measures"], dtype=dtype)
    lengths = _unique(measures, "length")
    rows = [["regime", "scan", *(f"L = {length:,}" for length in lengths)]]
    for regime in _unique(measures, "regime"):
        for scan in _unique(measures, "scan"):
            cells = [
                _worst(_all(measures, regime=regime, scan=scan, length=length))
                for length in lengths
            ]
            rows.append([regime, scan, *cells])
    return rows


def _worst(rows: Sequence[dict[str, Any]]) -> str:
    errors = [row["error"] for row in rows]
    return "not finite" if any(e is None for e in errors) else f"{max(errors):.1e}"


# Figures ---------------------------------------------------------------------------------------


def draw_times(figure: Any, study: Study) -> None:
    """Milliseconds against length, forward and both passes."""
    figure.set_size_inches(10, 3.8)
    for ax, (passes, label) in zip(figure.subplots(1, 2), PASSES.items(), strict=True):
        for colour, scan in zip(plots.COLOURS, _unique(study["times"], "scan"), strict=False):
            rows = _all(study["times"], scan=scan, passes=passes)
            rows = [row for row in rows if row["ms"] is not None]
            x = [row["length"] for row in rows]
            ax.plot(x, [row["ms"] for row in rows], marker="o", color=colour, label=scan)
            ends = [row["low"] for row in rows], [row["high"] for row in rows]
            ax.fill_between(x, *ends, color=colour, alpha=0.18, linewidth=0)
        _log_axes(ax, "processor time (ms)")
        ax.set_title(label, fontsize=10)
    figure.axes[0].legend(frameon=False, fontsize=8)


def draw_memory(figure: Any, study: Study) -> None:
    """Peak rise of memory against length."""
    figure.set_size_inches(6, 3.6)
    ax = figure.subplots()
    for colour, scan in zip(plots.COLOURS, _unique(study["memory"], "scan"), strict=False):
        rows = [row for row in _all(study["memory"], scan=scan) if row["bytes"]]
        values = [row["bytes"] / 1e6 for row in rows]
        ax.plot([row["length"] for row in rows], values, marker="o", color=colour, label=scan)
    _log_axes(ax, "peak rise of memory (MB)")
    ax.legend(frameon=False, fontsize=8)


def draw_errors(figure: Any, study: Study, dtype: str) -> None:
    """Error against length, one panel per regime; geometric mean over seeds and their range."""
    measures = [row for row in study["measures"] if row["dtype"] == dtype]
    regimes = _unique(measures, "regime")
    figure.set_size_inches(10, 5.6)
    axes = figure.subplots(2, (len(regimes) + 1) // 2, sharex=True, sharey=True, squeeze=False)
    for ax, regime in zip(axes.flat, regimes, strict=False):
        for colour, scan in zip(plots.COLOURS, _unique(measures, "scan"), strict=False):
            _draw_error(ax, _all(measures, regime=regime, scan=scan), colour, scan)
        _log_axes(ax, "relative error" if ax in axes[:, 0] else "")
        ax.set_title(regime, fontsize=10)
        if ax not in axes[-1]:
            ax.set_xlabel("")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=5, loc="outside lower center")


def _draw_error(ax: Any, rows: Sequence[dict[str, Any]], colour: str, label: str) -> None:
    by_length = {
        length: [row["error"] for row in _all(rows, length=length)]
        for length in _unique(rows, "length")
    }
    finite = {n: e for n, e in by_length.items() if None not in e and min(e) > 0}
    middle = [exp(sum(map(log, e)) / len(e)) for e in finite.values()]
    ax.plot(list(finite), middle, marker="o", markersize=3, color=colour, label=label)
    ends = [min(e) for e in finite.values()], [max(e) for e in finite.values()]
    ax.fill_between(list(finite), *ends, color=colour, alpha=0.18, linewidth=0)


def draw_law(figure: Any, study: Study) -> None:
    """Error of the log-space scan against the sum of logarithms that it carries."""
    figure.set_size_inches(6, 3.6)
    ax = figure.subplots()
    rows = [r for r in _all(study["measures"], scan="log-space", dtype="float32") if r["error"]]
    rows = [r for r in rows if r["regime"] != "trained"]  # there zero decays cut it into pieces
    for colour, regime in zip(plots.COLOURS, _unique(rows, "regime"), strict=False):
        points = _all(rows, regime=regime)
        ax.plot([r["log_decay"] for r in points], [r["error"] for r in points], linestyle="",
                marker="o", markersize=4, color=colour, label=regime)  # fmt: skip
    ends = [min(r["log_decay"] for r in rows), max(r["log_decay"] for r in rows)]
    ax.plot(ends, [ROUNDING * end for end in ends], color=plots.NULL, linestyle="--",
            label="2⁻²⁴ · |Σ log Ā|")  # fmt: skip
    _log_axes(ax, "relative error")
    ax.set_xlabel("largest |Σ log Ā|")
    ax.legend(frameon=False, fontsize=8)


def _log_axes(ax: Any, ylabel: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set(xlabel="length (tokens)", ylabel=ylabel)


def _parts(study: Study) -> list[Part]:
    return _error_parts(study) + _cost_parts(study)


def _error_parts(study: Study) -> list[Part]:
    return [
        Part(
            "Errors in float32",
            "Geometric mean over seeds, the band is their range. Initial: as a Mamba starts. "
            "Trained: Δ up to several, A to -64. Long memory: Δ about 1e-5. Gates: Ā = "
            "sigmoid(s·z), z and the writes from N(0, 1), the setting of the write-up.",
            name="errors-float32", table=errors_table(study, "float32"),
            draw=partial(draw_errors, study=study, dtype="float32"),
        ),
        Part(
            "Why the log-space scan loses them",
            "It adds logarithms of decays along the sequence, and takes differences of such sums: "
            "a sum S carries a rounding error of up to 2⁻²⁴·S, whatever the answer's size. "
            "Products of decays below 1 have no such sum. (Where the sum is small, other roundings "
            "are larger.) log 0 := -12 adds a floor: every write "
            "below 6e-6 counts as 6e-6.",
            name="law", draw=partial(draw_law, study=study),
        ),
        Part(
            "Errors with bfloat16 inputs",
            "The library's own scans compute in float32 and round their output once; the others "
            "run the recurrence in bfloat16, as a model without precautions would.",
            name="errors-bfloat16", table=errors_table(study, "bfloat16"),
            draw=partial(draw_errors, study=study, dtype="bfloat16"),
        ),
    ]  # fmt: skip


def _cost_parts(study: Study) -> list[Part]:
    size = study["config"]
    shape = f"One sequence, {size['cost_channels']} channels, {size['d_state']} states."
    parts = [
        Part(
            "Time",
            f"{shape} Ratio to the blocked scan with its spread from 10 % to 90 % of the rounds, "
            "and the median time. The indexed loop reads step t by index, so that each step of its "
            "gradient fills a tensor of the whole length.",
            name="times", table=times_table(study), draw=partial(draw_times, study=study),
        ),
        Part(
            "Memory",
            f"{shape} Rise of resident memory in both passes above what the inputs take, each scan "
            "in a process of its own.",
            name="memory", table=memory_table(study), draw=partial(draw_memory, study=study),
        ),
    ]  # fmt: skip
    if study["compiled"]:
        text = f"{shape} The write-up's S-scan (indexed loop) and P-scan (log 0 := -12), forward."
        parts.append(Part("torch.compile", text, name="compiled", table=compiled_table(study)))
    return parts


def _unique(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _all(rows: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _only(rows: Sequence[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (row,) = _all(rows, **wanted)
    return row
