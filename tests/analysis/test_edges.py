"""Corners of measures: what a table shows, exact bounds, mixed precision, smooth curves."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from smearlens import association, layer_similarity, phase_change, stripe_score
from smearlens.analysis.association import association_within_run
from smearlens.analysis.kernels import kernel_profile
from smearlens.analysis.mixing.implicit import implicit_mixings
from smearlens.analysis.mixing.kinds import ComposedMixing, DenseMixing
from smearlens.analysis.mixing.state_space import SSMMixing
from smearlens.analysis.mixing.streaming import row_statistics
from smearlens.analysis.phase_change import PhaseChange
from smearlens.analysis.scores import Scores
from smearlens.analysis.smearing import score_by_lag
from smearlens.nn.conv import depthwise_conv

# Tables ------------------------------------------------------------------------------------------


def scores_of(heads):
    values = torch.rand(3, heads, dtype=torch.float64)
    one = {"blocks.0.attn": torch.zeros(1)}
    return Scores("a score", {"blocks.0.attn": values}, one, one, one, {"blocks.0.attn": values})


@pytest.mark.parametrize(("heads", "shown"), [(2, 2), (40, 40), (41, 20)])
def test_forty_heads_are_shown_and_more_are_not(heads, shown):
    lines = repr(scores_of(heads)).splitlines()
    assert sum(line.startswith("blocks.0.attn") for line in lines) == shown
    assert ("the top 20 of 41 heads" in lines[-1]) == (heads == 41)


def test_a_kernel_profile_shows_every_lag():
    lines = repr(kernel_profile(torch.rand(5, 3))).splitlines()
    assert [line.split()[0] for line in lines] == ["lag", "0", "1", "2", "untrained:"]


def test_the_name_of_a_similarity_says_what_was_compared():
    x = torch.rand(2, 7, 3)
    cache = {f"blocks.{i}.hook_resid_post": x + i * x.square() for i in range(2)}
    assert layer_similarity(cache, kind="cka").name == "linear CKA"
    mixings = {str(i): DenseMixing(torch.rand(1, 1, 3, 3).softmax(-1)) for i in range(2)}
    for options, name in (
        ({}, "js, heads by mean"),
        ({"kind": "cosine"}, "centred cosine, heads by mean"),
        ({"kind": "cosine", "centred": False, "heads": "match"}, "raw cosine, heads by match"),
    ):
        assert layer_similarity(mixings, **options).name == name


# Mixings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (1, 1), (2, 4)])
def test_channels_that_do_not_exist_are_refused(start, stop):
    steps = torch.rand(1, 5, 3, 2)
    mixing = SSMMixing.from_steps(steps, steps, torch.rand(1, 5, 2))
    with pytest.raises(ValueError, match=r"are outside 0\.\.3"):
        mixing.channels(start, stop)
    assert mixing.channels(0, 3).n_heads == 3


def test_a_lag_without_gain_makes_no_composition_signed():
    attention = DenseMixing(torch.ones(1, 2, 3, 3).tril().softmax(-1))
    gain = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert ComposedMixing(attention, gain, [0, 1]).signed is False
    assert ComposedMixing(attention, gain - 0.1, [0, 1]).signed is True


def test_implicit_attention_leaves_attention_layers_aside():
    x, kernel = torch.rand(1, 5, 3), torch.rand(3, 2)
    steps = torch.rand(1, 5, 3, 2)
    cache = {
        "blocks.0.conv.hook_in": x, "blocks.0.conv.hook_kernel": kernel,
        "blocks.0.conv.hook_out": depthwise_conv(x, kernel),
        "blocks.0.ssm.hook_A_bar": steps, "blocks.0.ssm.hook_B_bar": steps,
        "blocks.0.ssm.hook_C": torch.rand(1, 5, 2), "blocks.0.ssm.hook_gate": x,
        "blocks.1.attn.hook_pattern": torch.rand(1, 2, 5, 5).softmax(-1),
    }  # fmt: skip
    assert list(implicit_mixings(cache)) == ["blocks.0"]


@pytest.mark.parametrize("wide", ["c.hook_in", "a.hook_q", "w_k", None])
def test_scores_by_lag_are_in_the_widest_precision_given(wide):
    x, kernel = torch.rand(1, 6, 4), torch.rand(4, 2)
    given = {"c.hook_in": x, "c.hook_kernel": kernel, "a.hook_q": torch.rand(1, 6, 2, 3),
             "c.hook_out": depthwise_conv(x, kernel), "w_k": torch.rand(2, 4, 3)}  # fmt: skip
    if wide is not None:
        given[wide] = given[wide].double()
    w_k = given.pop("w_k")
    parts = score_by_lag(given, w_k, conv="c", attn="a")
    assert parts[0].dtype == (torch.float32 if wide is None else torch.float64)


# Series ------------------------------------------------------------------------------------------


def test_a_residual_that_is_zero_somewhere_still_correlates():
    """In log time -2 … 2 the first series is what a line leaves, and passes through 0 once."""
    steps = np.expm1(np.arange(5.0))
    x, y = np.array([-1.0, 2, 0, -2, 1]), np.array([-1.0, 2, 0, -2, 1.5])
    time = np.arange(5.0)
    rest = y - np.polyval(np.polyfit(time, y, 1), time)
    expected = float(rest @ x / np.linalg.norm(rest) / np.linalg.norm(x))
    assert association_within_run(x, y, steps).partial == pytest.approx(expected)


def bic(rss, n, parameters):
    return n * math.log(rss / n) + parameters * math.log(n)


def rss_of(columns, y):
    design = np.column_stack(columns)
    return float(np.square(y - design @ np.linalg.lstsq(design, y, rcond=None)[0]).sum())


def scales_of(steps):
    first, last = max(steps[1], steps[-1] / 1e4) / 2, 2 * steps[-1]
    return [first * (last / first) ** (i / 39) for i in range(40)]


def evidence_by_hand(y, steps):
    """BIC of the best smooth curve minus that of the best two segments."""
    n, x = len(y), np.log1p(steps)
    one = np.ones(n)
    segments = min(
        rss_of([one[:b], x[:b]], y[:b]) + rss_of([one[b:], x[b:]], y[b:]) for b in range(3, n - 2)
    )
    z = (x - x.mean()) / (x.max() - x.min())
    curves = [bic(rss_of([z**k for k in range(d + 1)], y), n, d + 1) for d in range(1, 6)]
    for scale in scales_of(steps):
        curves.append(bic(rss_of([one, np.exp(-steps / scale)], y), n, 3))
        curves += [bic(rss_of([one, (1 + steps / scale) ** -p], y), n, 4) for p in (0.5, 1, 2)]
    return min(curves) - bic(segments, n, 5)


@pytest.mark.parametrize("seed", range(6))
def test_the_evidence_for_a_change_is_the_difference_of_two_fits_by_hand(seed):
    rng = np.random.default_rng(seed)
    steps = np.cumsum(rng.integers(1, 40, 14)) - 1.0
    early, middle, late = (scales_of(steps)[i] for i in (0, 15, 30))
    shape = [
        np.exp(-steps / early), 1 / (1 + steps / middle), (1 + steps / late) ** -2,
        np.log1p(steps) ** 2, (steps > 150) * 1.0, (1 + steps / middle) ** -0.5,
    ][seed]  # fmt: skip
    y = shape + 1e-4 * rng.normal(size=14)
    found = phase_change(y, steps)
    assert found.delta_bic[0] == pytest.approx(evidence_by_hand(y, steps), rel=1e-6, abs=1e-6)
    assert found.n == 1


@pytest.mark.parametrize(("evidence", "found"), [(9.9, False), (10.0, False), (10.1, True)])
def test_evidence_must_exceed_ten(evidence, found):
    assert PhaseChange(5.0, 4.0, 6.0, 1.0, (evidence,), 1).found is found


@pytest.mark.parametrize("level", [0, 1, -0.1, 1.5])
def test_a_level_of_nothing_or_everything_is_refused(level):
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        association([1.0, 2, 3], [1.0, 3, 2], level=level)


def test_seven_runs_are_paired_in_every_way():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 7))
    dx, dy = x - x.mean(), y - y.mean()
    orders = np.array(list(permutations(range(7))))
    share = np.mean(np.abs(dy[orders] @ dx) >= abs(dx @ dy) - 1e-12)
    assert association(x, y).pearson.p_value == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("mass", [0.0, 1.0, -0.2])
def test_a_span_of_nothing_or_everything_is_refused_in_streams(mass):
    q = torch.rand(1, 1, 3, 2)
    with pytest.raises(ValueError, match="mass must lie between 0 and 1"):
        row_statistics(q, q, causal=True, mass=mass)


def test_the_maximum_of_a_stripe_does_not_depend_on_the_mass_of_the_rows():
    pattern = torch.rand(1, 2, 5, 5).tril().softmax(-1).tril()
    wanted = torch.eye(5, dtype=torch.bool).roll(-1, 1).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    for normalise_by in ("row", "mul"):
        whole, half = (
            stripe_score({"a.hook_pattern": p}, wanted, normalise_by=normalise_by).maximum["a"]
            for p in (pattern, pattern / 2)
        )
        torch.testing.assert_close(half, whole)
