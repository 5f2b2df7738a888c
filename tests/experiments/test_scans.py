"""The study of scans: errors against a naive loop, its rule on made-up numbers, the whole of it."""

import json
import math
import re
import subprocess
from dataclasses import replace

import pytest
import torch

from smearlens.experiments.state_space import scan_costs
from smearlens.experiments.state_space.scan_verdicts import GATES, PARALLEL, REGIMES, judge, slope
from smearlens.experiments.state_space.scans import ScansConfig, errors, inputs, run
from smearlens.experiments.state_space.scans_report import compiled_table
from smearlens.experiments.study import as_json

TINY = ScansConfig(
    seeds=2, lengths=(3, 11), error_channels=2, cost_lengths=(5, 1031), cost_channels=3, d_state=7,
    rounds=2, compile_lengths=(),
)  # fmt: skip


def naive(u, delta, A, B, C):
    """y[t, c] by the definition, entry by entry, in float64."""
    u, delta, A, B, C = (x.double()[0] if x.ndim == 3 else x.double() for x in (u, delta, A, B, C))
    y = torch.zeros_like(u)
    for c in range(u.shape[1]):
        for n in range(B.shape[1]):
            h = 0.0
            for t in range(len(u)):
                h = math.exp(delta[t, c] * A[c, min(n, A.shape[1] - 1)]) * h
                h += float(delta[t, c] * u[t, c] * B[t, n])
                y[t, c] += C[t, n] * h
    return y


def test_errors_are_those_against_a_naive_loop():
    rows = errors(TINY, seed=5)
    assert len(rows) == len(REGIMES) * 2 * 2 * 5
    for regime in REGIMES:
        for dtype in ("float32", "bfloat16"):
            tensors = inputs(regime, 11, 2, 7, 5)
            tensors = [x if i == 2 else x.to(getattr(torch, dtype)) for i, x in enumerate(tensors)]
            expected = naive(*tensors)
            for row in rows:
                if (row["regime"], row["dtype"]) == (regime, dtype):
                    length = row["length"]
                    part = [x if i == 2 else x[:, :length] for i, x in enumerate(tensors)]
                    y = scan_costs.SCANS[row["scan"]](*part)[0].double()
                    worst = 0.0
                    for c in range(2):
                        wanted = expected[:length, c]
                        worst = max(
                            worst, float((y[:, c] - wanted).abs().max() / wanted.abs().max())
                        )
                    assert row["error"] == pytest.approx(worst, rel=1e-3, abs=1e-12), row


def test_all_scans_compute_one_thing_and_give_one_gradient():
    tensors = [x.double().requires_grad_() for x in scan_costs.inputs(13, 3, 5)]
    results = {}
    for name, scan in scan_costs.SCANS.items():
        y = scan(*tensors)
        results[name] = (y, *torch.autograd.grad(y.square().sum(), tensors))
    expected = results["indexed loop"]
    for name, found in results.items():
        tolerance = 0.05 if name.endswith("-12") else 1e-8  # what the approximation costs
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() < tolerance * other.abs().max(), name


def test_gates_are_sigmoids_of_normal_logits():
    u, delta, A, _, _ = inputs("gates, s = 4", 4001, 3, 7, 0)
    gate = torch.exp(delta * A[0])
    assert float(torch.logit(gate.double()).clamp(-50, 50).std()) == pytest.approx(4, rel=0.05)
    assert float((u * delta).std()) == pytest.approx(1, rel=0.05)
    with pytest.raises(ValueError, match=re.escape("regime must be one of ['initial', 'trained',")):
        inputs("gates", 3, 2, 5, 0)


# The verdict -----------------------------------------------------------------------------------


def world(regimes=GATES, **growth):
    """Errors 1e-7 · (length / 64)^growth over seeds; a scan that is not named keeps 1e-7."""
    rows = []
    for seed in range(3):
        for regime in regimes:
            for scan in ("loop", *PARALLEL):
                for length in (64, 256, 1024, 4096):
                    power = growth.get(
                        scan.replace("-", "_").replace(", log 0 := _12", "_floor"), 0
                    )
                    error = 1e-7 * (length / 64) ** power * (1 + 0.01 * ((seed + length) % 3))
                    rows.append({"seed": seed, "regime": regime, "dtype": "float32", "scan": scan,
                                 "length": length, "error": error})  # fmt: skip
    return rows


def test_the_slope_is_that_of_log_error_against_log_length():
    estimate = slope(world(doubling=0.7), "doubling", GATES[0])
    assert estimate.mean == pytest.approx(0.7, abs=0.02)
    assert estimate.n == 3


@pytest.mark.parametrize(
    ("growth", "outcome", "said"),
    [
        (
            {"doubling": 1, "log_space": 1, "log_space_floor": 1},
            "supported",
            "the doubling scan too",
        ),
        (
            {"log_space": 1, "log_space_floor": 1},
            "refuted",
            "With the write-up's gates, in float32: lost with length: log-space and log",
        ),
        ({}, "refuted", "no scan loses"),
        ({"doubling": 0.6, "log_space": 1, "log_space_floor": 1}, "undecided", "do not decide"),
    ],
)
def test_each_outcome_of_the_verdict_can_be_reached(growth, outcome, said):
    rows = world(**growth)
    if outcome == "undecided":  # about ten times the loop's error: on both sides of the bar
        for row in rows:
            if row["scan"] == "doubling":
                row["error"] *= (0.4, 1.0, 2.5)[row["seed"]] * (row["length"] == 4096) or 1
    verdict = judge(rows)
    assert verdict.outcome == outcome
    assert said in verdict.because
    assert verdict.claim.number == 22
    assert verdict.n_seeds == 3


def test_an_error_that_grows_as_the_loops_does_is_not_lost():
    rows = world(loop=1, doubling=1, log_space=1, log_space_floor=1)
    verdict = judge(rows)
    assert verdict.outcome == "refuted"
    assert "no scan loses" in verdict.because


def test_a_scan_that_loses_elsewhere_is_no_proof_that_the_logarithm_is_to_blame():
    logarithms = {"log_space": 1, "log_space_floor": 1}
    kept = world((*GATES, "long memory"), **logarithms)
    assert judge(kept).outcome == "refuted"
    assert "it is the logarithm that loses" in judge(kept).because
    assert "In other regimes" not in judge(kept).because
    elsewhere = world(("long memory",), doubling=1.2)
    grown = judge(world(**logarithms) + elsewhere)  # to 64^1.2 = 147 times the error
    assert grown.outcome == "undecided"
    assert "the logarithm" not in grown.because
    assert "doubling loses digits with long memory inputs (slope 1.20, at the longest 147" in (
        grown.because
    )
    for row in elsewhere:  # about ten times the loop's error: on both sides of the bar
        if row["scan"] == "doubling" and row["length"] == 4096:
            row["error"] = 1e-6 * (0.4, 1.0, 2.5)[row["seed"]]
    unclear = judge(world(**logarithms) + elsewhere)
    assert unclear.outcome == "refuted"
    assert "doubling may lose digits with long memory inputs" in unclear.because
    assert any("long memory" in f.label for f in unclear.findings)


def test_what_loses_is_named_and_not_explained_where_it_is_not_the_logarithms():
    verdict = judge(world(doubling=1, log_space=1))
    assert verdict.outcome == "refuted"
    assert "lost with length: doubling and log-space; kept: log-space, log 0" in verdict.because
    assert "it is the logarithm" not in verdict.because


def test_an_error_that_is_not_finite_counts_as_lost():
    rows = world()
    for row in rows:
        if row["scan"] != "loop" and row["length"] == 4096:
            row["error"] = None
    assert judge(rows).outcome == "supported"


# The whole -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study with one process of its own instead of six."""
    out = tmp_path_factory.mktemp("scans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_costs, "memory", lambda *a, **k: of_loops(memory, *a, **k))
        return run(TINY, out, command="smearlens experiment scans --tiny"), out


memory = scan_costs.memory


def of_loops(measure, *arguments, **sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_costs, "SCANS", {"loop": scan_costs.loop})
        return measure(*arguments, **sizes)


def test_the_study_writes_its_numbers_tables_and_figures(study):
    found, out = study
    assert json.loads((out / "result.json").read_text()) == json.loads(as_json(found))
    assert sorted(p.stem for p in (out / "tables").glob("*.md")) == [
        "errors-bfloat16", "errors-float32", "memory", "times",
    ]  # fmt: skip
    assert len(list((out / "figures").glob("*.png"))) == 5
    assert "claim 22" in (out / "report.html").read_text()
    times = found["times"]
    assert len(times) == 6 * 2 * 2
    assert all(row["low"] <= row["ms"] <= row["high"] for row in times)
    assert {row["ratio"] for row in times if row["scan"] == "blocked"} == {1.0}


def test_memory_of_a_loop_is_that_of_its_states(study):
    rows = study[0]["memory"]
    assert [(row["scan"], row["length"]) for row in rows] == [("loop", 5), ("loop", 1031)]
    if "failed" not in rows[0]:  # Linux
        state = 4 * 1031 * 3 * 7
        graph = 4096 * 1031  # of autograd, per step: these steps are small
        assert 2 * state < rows[1]["bytes"] < 10 * state + graph


def test_running_again_measures_nothing(study, monkeypatch):
    found, out = study
    for name in ("times", "memory", "compiled_times"):
        monkeypatch.setattr(scan_costs, name, lambda *a, **k: pytest.fail("measured"))
    assert run(TINY, out, command="smearlens experiment scans --tiny") == found
    with pytest.raises(ValueError, match=r"'rounds': \(2, 3\).*--force"):
        run(replace(TINY, rounds=3), out)


def test_a_process_that_fails_says_why():
    unknown = scan_costs._apart("peak_rises", "no such scan", [3], 2, 5, seconds=100)
    assert unknown == {"failed": "KeyError: 'no such scan'"}
    late = scan_costs._apart("peak_rises", "loop", [3], 2, 5, seconds=1)  # less than torch needs
    assert late == {"failed": "not finished within 1 s"}


def test_a_machine_without_a_compiler_says_so(monkeypatch):
    message = "x\ntorch._inductor.exc.InvalidCxxCompiler: No working C++ compiler found in y: None"
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=message)
    monkeypatch.setattr(scan_costs.subprocess, "run", lambda *a, **k: failed)
    (row,) = scan_costs.compiled_times([3], channels=2, d_state=5, seconds=1)[:1]
    assert row["failed"] == "no C++ compiler on this machine"
    study = {"compiled": [row]}
    assert compiled_table(study)[1][:4] == ["indexed loop", "3", "", row["failed"]]


def test_sizes_are_checked():
    with pytest.raises(ValueError, match=re.escape("lengths needs two lengths or more, got (64,)")):
        ScansConfig(lengths=(64,))
    with pytest.raises(ValueError, match="rounds is too small, got 1"):
        ScansConfig(rounds=1)
    assert ScansConfig().quick().compile_lengths == ()
