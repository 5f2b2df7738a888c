"""The frame of the benchmarks, and the page made of their result. Nothing here is timed."""

import json
import math
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]

import children  # noqa: E402
import growth  # noqa: E402
import run  # noqa: E402
import timing  # noqa: E402
from sitegen import benchmarks, results  # noqa: E402

# Exponents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_the_exponent_of_an_exact_power_law(power):
    sizes = [2, 3, 7, 11, 50]
    found = growth.fit_exponent(sizes, [5 * s**power for s in sizes])
    assert found == pytest.approx((power, power, power), abs=1e-6)


def test_the_interval_is_the_one_of_least_squares():
    sizes, values = [1, 2, 4, 8], [3.0, 5.0, 13.0, 20.0]
    x, y = np.log(sizes), np.log(values)
    design = np.stack([np.ones(4), x], 1)
    (_, slope), residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    error = math.sqrt(residual[0] / 2 * np.linalg.inv(design.T @ design)[1, 1])
    reach = 4.302653 * error  # Student's t, 2 degrees of freedom, 97.5 %
    expected = (slope, slope - reach, slope + reach)
    assert growth.fit_exponent(sizes, values) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("sizes", "values"),
    [([1, 2], [1, 2]), ([1, 1, 2], [1, 1, 2]), ([1, 2, 3], [1, 2]), ([1, 2, 3], [1, 0, 2])],
)
def test_an_exponent_needs_three_sizes_and_positive_values(sizes, values):
    with pytest.raises(ValueError, match="3 different sizes or more and as many values"):
        growth.fit_exponent(sizes, values)


def test_a_curve_is_judged_by_its_exponent():
    sizes = [1, 2, 4, 8]
    linear = growth.curve("time: f", "positions", sizes, [3, 6, 12, 24], "s", 1.1)
    square = growth.curve("time: f", "positions", sizes, [1, 4, 16, 64], "s", 1.1)
    assert (linear["ok"], square["ok"]) == (True, False)
    assert square["value"] == pytest.approx(2)
    assert (square["axis"], square["of"], square["values"]) == ("positions", "s", [1, 4, 16, 64])


# Rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bar", "ok"),
    [(0.9, 1.0, True), (1.0, 1.0, True), (1.1, 1.0, False), (7.0, None, True),
     (math.nan, None, False), (math.inf, 2.0, False)],
)  # fmt: skip
def test_a_row_is_met_at_or_below_its_bar(value, bar, ok):
    assert timing.row("a / b", (2, 3), value, bar)["ok"] is ok


def test_rounds_give_ratios_until_the_budget_is_used_up():
    now = [0.0]

    def takes(seconds):
        def work():
            now[0] += seconds

        return work

    def ratios(**limits):
        return timing._ratios(takes(1), takes(4), 7, lambda: now[0], **limits)

    assert ratios(least=2, budget=1e9) == [0.25] * 7
    assert ratios(least=2, budget=-1.0) == [0.25] * 2
    assert timing.tenths([1.0, 2.0, 3.0]) == {"low": 1.2, "high": 2.8}
    assert timing.tenths([5.0]) == {"low": 5.0, "high": 5.0}


def test_a_child_returns_what_its_function_returns():
    assert children.call(children.resident, "VmRSS", environment={}) > 1


def test_a_peak_rises_by_what_was_touched_and_given_back():
    def touch():
        with mmap.mmap(-1, 64 * 2**20) as pages:  # malloc could reuse what an earlier test freed
            pages[::4096] = b"x" * (64 * 2**20 // 4096)

    assert 60 < children.peak_rise(touch) < 80


# One run ---------------------------------------------------------------------------------------


def a_row(**changes):
    return timing.row("ours | here / theirs", (2, 3), 0.123456, 0.5, low=0.1, high=0.2) | changes


def a_suite(*rows, name="conv", status=0):
    text = None if status else run.text_of(name)
    return {"date": "2026-01-02", "text": text, "status": status, "load": [0.5, 1.5],
            "cpu_seconds": 61.0, "wall_seconds": 70.0, "rows": list(rows)}  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """Names in the order in which they were measured; every suite has one row."""
    names = []

    def measure(name):
        names.append(name)
        return a_suite(a_row(), name=name)

    monkeypatch.setattr(run, "measure", measure)
    return names


def test_a_suite_that_is_done_is_kept(tmp_path, measured, monkeypatch):
    out = tmp_path / "result.json"
    assert run.main(["--out", str(out)]) == 0
    assert measured == run.SUITES
    assert run.main(["--out", str(out)]) == 0
    assert len(measured) == len(run.SUITES)
    assert run.main(["conv", "--out", str(out), "--force"]) == 0
    assert measured[len(run.SUITES) :] == ["conv"]
    found = json.loads(out.read_text())
    found["suites"]["scan"]["text"] = "another text of the file"
    out.write_text(run.as_text(found))
    run.main(["--out", str(out)])
    assert measured[len(run.SUITES) + 1 :] == ["scan"]
    monkeypatch.setattr(run, "machine", lambda: {"processor": "another"})
    run.main(["conv", "--out", str(out)])
    assert list(json.loads(out.read_text())["suites"]) == ["conv"]


def test_what_is_above_its_bar_or_fails_is_named(tmp_path, monkeypatch, capsys):
    suites = {"conv": a_suite(a_row(value=0.6, ok=False)), "scan": a_suite(a_row(), name="scan")}
    monkeypatch.setattr(run, "measure", suites.get)
    assert run.main(["conv", "scan"]) == 1
    assert "conv: ours | here / theirs (2, 3): 0.6, bar 0.5" in capsys.readouterr().out
    assert run.main(["scan"]) == 0
    suites["scan"] = a_suite(name="scan", status=3)
    out = str(tmp_path / "result.json")
    assert run.main(["scan", "--out", out]) == 1
    assert "scan: failed with status 3" in capsys.readouterr().out
    suites["scan"] = a_suite(a_row(), name="scan")
    assert run.main(["scan", "--out", out]) == 0  # what failed ran again
    assert run.main(["scna"]) == 2
    assert "no benchmark ['scna']" in capsys.readouterr().err


def test_the_file_has_a_line_per_row_and_four_digits():
    found = {"machine": {"cores": 2}, "suites": {"conv": a_suite(a_row(), a_row(wall=1.23456))}}
    text = run.as_text(found)
    kept = json.loads(text)
    assert kept["suites"]["conv"]["rows"][0] == a_row(value=0.1235)
    assert kept["suites"]["conv"]["rows"][1]["wall"] == 1.235
    assert sum("ours | here" in line for line in text.splitlines()) == 2
    assert {k: v for k, v in kept["suites"]["conv"].items() if k != "rows"} == {
        k: v for k, v in a_suite().items() if k != "rows"
    }


def test_the_machine_is_described_without_its_name():
    import platform

    text = json.dumps(run.machine())
    assert platform.node() not in text
    assert str(ROOT) not in text


# The page --------------------------------------------------------------------------------------

CURVES = [
    growth.curve(f"time: f{i}", axis, [1, 2, 4], [1, 2, 4], unit, 1.1)
    for i, (unit, axis) in enumerate(benchmarks.PANELS)
]
MADE = {
    "command": "make bench",
    "machine": {"processor": "Some CPU", "instructions": "AVX2", "architecture": "x86_64",
                "cores": 2, "threads": 2, "python": "3.11.1", "packages": {"torch": "2.9"}},
    "suites": {
        "conv": a_suite(
            a_row(wall=0.345678),
            a_row(name="slow / fast", value=1.5, low=1.4, high=1.6, bar=1.6, why="more is done"),
            a_row(name="even / odd", value=1.01, low=0.9, high=1.2, bar=None, why="noise"),
            a_row(name="heavy / light", value=3.0, low=3.0, high=3.0, bar=2.0, ok=False,
                  unit="memory"),
            a_row(name="error", value=3.2e-7, low=3.2e-7, high=3.2e-7, bar=1e-6, unit="difference"),
        ),
        "growth": a_suite(*CURVES),
    },
}  # fmt: skip


def rows_of(text):
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("|")][2:]  # fmt: skip


def test_tables_show_what_was_measured():
    rows = rows_of(benchmarks.families(MADE))
    assert rows[0] == ["ours &#124; here / theirs", "(2, 3)", "time", "0.123 ×", "0.1 to 0.2",
                       "0.35 ×", "0.5 ×", "yes"]  # fmt: skip
    assert rows[3][2:] == ["peak memory", "3 ×", "", "", "2 ×", "**no**"]
    assert rows[4][2:] == ["difference", "3.2e-07", "", "", "1.0e-06", "yes"]
    assert "### Conv\n\nThe depthwise convolution beside `nn.Conv1d`" in benchmarks.families(MADE)
    assert "Some CPU" in benchmarks.described(MADE)
    assert "between 0.5 and 1.5 while it ran; 2 minutes" in benchmarks.described(MADE)
    absent = [name for name in run.SUITES if name not in ("conv", "growth")]
    assert benchmarks.described(MADE).endswith(f" Not measured yet: {', '.join(absent)}.")


def test_bars_that_are_missed_are_shown_first():
    text = benchmarks.verdict(MADE)
    assert text.startswith("11 results, 10 with a bar, 1 of them above it.")
    assert [row[0] for row in rows_of(text)] == ["heavy / light"]


@pytest.mark.parametrize(
    ("value", "shown"), [(12.04, "12.04 ×"), (12.0, "just above 12 ×"), (13.1, "13.1 ×")]
)
def test_a_number_above_its_bar_never_reads_as_the_bar(value, shown):
    missed = a_row(value=value, low=11.0, high=13.0, bar=12, ok=False)
    (cells,) = rows_of(benchmarks.verdict({"suites": {"conv": a_suite(missed)}}))
    assert (cells[3], cells[6]) == (shown, "12 ×")


def test_every_suite_says_what_its_sizes_are():
    assert sorted(benchmarks.SIZES) == benchmarks.SUITES
    assert "Sizes: batch, positions, channels, taps." in benchmarks.families(MADE)


def test_what_is_slower_comes_with_its_reason():
    rows = rows_of(benchmarks.slower(MADE))
    assert [(row[0], row[2], row[4]) for row in rows] == [
        ("slow / fast", "1.5 ×", "more is done"),
        ("even / odd", "1.01 ×", "equal within the spread; noise"),
        ("heavy / light", "3 ×", "not known"),
    ]  # fmt: skip
    none = {"suites": {"conv": a_suite(a_row())}}
    assert benchmarks.slower(none) == "Nowhere, of what was measured."


def test_growth_has_a_row_and_a_line_per_curve():
    import matplotlib.pyplot as plt

    rows = rows_of(benchmarks.growth(MADE))
    assert [row[0] for row in rows] == [curve["name"] for curve in CURVES]
    assert {row[2] for row in rows} == {"1.00"}
    figure = benchmarks.draw_growth(MADE)
    for i, (ax, (unit, axis)) in enumerate(zip(figure.axes, benchmarks.PANELS, strict=True)):
        (line,) = ax.lines
        assert line.get_label() == f"f{i}: 1.00"
        assert (ax.get_xlabel(), ax.get_ylabel()) == (axis, benchmarks.UNITS[unit])
    plt.close(figure)


def test_the_committed_result_is_of_suites_that_exist_and_says_why_it_is_slower():
    found = benchmarks.result()
    assert set(found["suites"]) <= set(run.SUITES) == set(benchmarks.SUITES)
    assert not any(suite["status"] for suite in found["suites"].values())
    slower = [row for row in rows_of(benchmarks.slower(found)) if row[-1] == "not known"]
    assert slower == []
    for make in (benchmarks.described, benchmarks.verdict, benchmarks.families, benchmarks.growth):
        assert make(found)


def test_results_without_verdicts_are_no_studies(tmp_path, monkeypatch):
    for name, content in {"a-study": {"verdicts": []}, "benchmarks": {"suites": {}}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(content))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert list(results.results()) == ["a-study"]
