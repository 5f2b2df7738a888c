"""`Scores` and intervals: hand-made values, a plain bootstrap, closed forms of scipy's tests."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis import reference as ref

from smearlens.analysis.scores import COLUMNS, Scores, best_head
from smearlens.analysis.stats import (
    bootstrap_interval,
    over_seeds,
    paired_over_seeds,
    proportion_interval,
)

NAN = math.nan


def hand_made(**changes):
    """Two layers of 2 and 3 heads, 4 examples; one value and one head are undefined."""
    one = torch.tensor([[0.1, 0.9], [0.3, 0.9], [NAN, 0.9], [0.5, 0.9]], dtype=torch.float64)
    two = torch.tensor([[0.2, NAN, 0.4]] * 4, dtype=torch.float64)
    parts = {
        "name": "a_score",
        "per_layer": {"blocks.0.attn": one, "blocks.1.attn": two},
        "chance": {"blocks.0.attn": torch.tensor([0.05]), "blocks.1.attn": torch.tensor([0.05])},
        "maximum": {"blocks.0.attn": torch.ones(2), "blocks.1.attn": torch.ones(1)},
        "control": {
            "blocks.0.attn": torch.tensor([0.11, 0.12]),
            "blocks.1.attn": torch.tensor([NAN]),
        },
        "rows": {
            "blocks.0.attn": torch.tensor([[2.0], [3.0], [0.0], [5.0]]),
            "blocks.1.attn": torch.full((4, 3), 6.0),
        },
    }
    return Scores(**{**parts, **changes})


def test_it_is_a_mapping_from_layers_to_values():
    scores = hand_made()
    assert list(scores) == ["blocks.0.attn", "blocks.1.attn"]
    assert len(scores) == 2
    assert scores["blocks.1.attn"].shape == (4, 3)
    with pytest.raises(KeyError, match=r"no layer 'blocks.7.attn' in a_score; layers: \['blocks"):
        scores["blocks.7.attn"]


def test_macro_and_micro():
    scores = hand_made()
    assert scores.mean()["blocks.0.attn"].tolist() == pytest.approx([0.3, 0.9])
    micro = scores.mean("micro")["blocks.0.attn"]
    assert micro.tolist() == pytest.approx([(2 * 0.1 + 3 * 0.3 + 5 * 0.5) / 10, 0.9])
    assert scores.mean("micro")["blocks.1.attn"][1].isnan()


def test_records_and_frame_hold_every_head():
    scores = hand_made()
    records = scores.records()
    assert [tuple(r) for r in records] == [COLUMNS] * 5
    assert [(r["layer"][7], r["head"]) for r in records] == [
        ("0", 0), ("0", 1), ("1", 0), ("1", 1), ("1", 2),
    ]  # fmt: skip
    assert records[0]["score"] == pytest.approx(0.3)
    assert records[1]["low"] == records[1]["high"] == pytest.approx(0.9)
    assert [r["control"] for r in records[:2]] == pytest.approx([0.11, 0.12])
    assert math.isnan(records[3]["score"])
    assert [r["chance"] for r in records] == pytest.approx([0.05] * 5)
    frame = scores.to_frame()
    assert list(frame.columns) == list(COLUMNS)
    assert frame["score"].tolist() == pytest.approx([r["score"] for r in records], nan_ok=True)


def test_top_and_best_leave_undefined_heads_out():
    scores = hand_made()
    assert [(r["layer"], r["head"]) for r in scores.top(3)] == [
        ("blocks.0.attn", 1), ("blocks.1.attn", 2), ("blocks.0.attn", 0),
    ]  # fmt: skip
    assert len(scores.top(99)) == 4
    assert best_head(scores)["score"] == pytest.approx(0.9)
    none = hand_made(per_layer={n: torch.full((4, 2), NAN) for n in scores})
    with pytest.raises(ValueError, match="a_score: no head has a valid score"):
        best_head(none)


def test_repr_is_a_table():
    lines = repr(hand_made(note="stated")).splitlines()
    assert lines[0] == "a_score (fraction; stated)"
    assert " ".join(lines[1].split()) == "layer head score [95% interval] chance maximum control"
    assert " ".join(lines[3].split()) == "blocks.0.attn 1 0.900 [ 0.900, 0.900] 0.050 1.000 0.120"
    assert len(lines) == 2 + 5
    many = {f"blocks.{i}.attn": torch.rand(3, 9) for i in range(5)}
    other = {n: {layer: torch.ones(1) for layer in many} for n in ("chance", "maximum", "control")}
    rows = {layer: torch.ones(3, 9) for layer in many}
    lines = repr(hand_made(per_layer=many, rows=rows, **other)).splitlines()
    assert lines[-1] == "… the top 20 of 45 heads; .to_frame() has all"
    assert len(lines) == 2 + 20 + 1
    shown = [float(line.split()[2]) for line in lines[2:-1]]
    assert shown == sorted(shown, reverse=True)


@pytest.mark.parametrize("layer", ["a", "decoder.blocks.0.cross_attn", "blocks.10.deep.inner.attn"])
def test_figures_stand_below_each_other_however_long_a_name_is(layer):
    names = ["blocks.0.attn", layer]
    beside = {n: {name: torch.ones(1) for name in names} for n in ("chance", "maximum", "control")}
    values = {name: torch.full((3, 2), 0.25) for name in names}
    lines = repr(hand_made(per_layer=values, rows=values, **beside)).splitlines()[1:]
    assert lines[0].index("score") + len("score") == lines[1].index("0.250") + len("0.250")
    assert {line.index("0.250") for line in lines[1:]} == {lines[1].index("0.250")}


def test_html_is_escaped():
    evil = "<script>alert(1)</script>"
    parts = {n: {evil: torch.ones(1)} for n in ("chance", "maximum", "control")}
    values = {evil: torch.full((3, 1), 0.25)}
    scores = hand_made(name="<b>", unit="a & b", per_layer=values, rows=values, **parts)
    html = scores._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<caption>&lt;b&gt; (a &amp; b)</caption>" in html
    assert html.count("<tr>") == 2
    assert "<td>0.250</td>" in html


def test_html_says_what_the_text_says():
    scores = hand_made(note="as they are")
    html = scores._repr_html_()
    assert "<caption>a_score (fraction; as they are)</caption>" in html
    assert html.count("<tr>") == 1 + 5  # the undefined head too
    many = {"blocks.0.attn": torch.rand(3, 50)}
    beside = {n: {"blocks.0.attn": torch.ones(1)} for n in ("chance", "maximum", "control")}
    scores = hand_made(per_layer=many, rows={"blocks.0.attn": torch.ones(3, 50)}, **beside)
    assert "the top 40 of 50 heads" in scores._repr_html_()


def test_scores_are_equal_by_value():
    assert hand_made() == hand_made()
    assert hand_made() != hand_made(name="another")
    assert hand_made() != dict(hand_made())
    other = {layer: values + 1e-9 for layer, values in hand_made().per_layer.items()}
    assert hand_made() != hand_made(per_layer=other)


# Intervals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_intervals_are_those_of_a_plain_bootstrap(level):
    values = np.random.default_rng(0).gamma(2, size=(60, 2))
    values[7, 1] = NAN  # left out
    found = bootstrap_interval(torch.from_numpy(values), level)
    for head in range(2):
        column = values[np.isfinite(values[:, head]), head]
        low, high = ref.bootstrap(column, level, 5000, seed=head)
        error = column.std() / math.sqrt(len(column))
        assert found[head].tolist() == pytest.approx([low, high], abs=0.3 * error)
    wider = bootstrap_interval(torch.from_numpy(values), 0.99)
    assert bool((wider[:, 0] < found[:, 0]).all())
    assert bool((wider[:, 1] > found[:, 1]).all())


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draws = torch.randn(30, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(draws, 0.9).T
    covered = ((low < 0) & (high > 0)).double().mean()
    assert 0.82 < float(covered) < 0.95


def test_intervals_of_scores_repeat_and_follow_the_level():
    scores = hand_made(per_layer={"blocks.0.attn": torch.rand(20, 2)})
    one, two = (hand_made(per_layer=scores.per_layer).interval() for _ in range(2))
    assert torch.equal(one["blocks.0.attn"], two["blocks.0.attn"])
    narrow, wide = (scores.interval(level)["blocks.0.attn"] for level in (0.5, 0.95))
    assert bool((narrow[:, 0] > wide[:, 0]).all())
    mean = scores.mean()["blocks.0.attn"]
    assert bool(((wide[:, 0] < mean) & (mean < wide[:, 1])).all())
    assert scores.records(level=0.5)[0]["low"] == pytest.approx(float(narrow[0, 0]))


def test_fewer_than_two_examples_have_no_interval():
    values = torch.tensor([[0.5, NAN], [NAN, NAN]])
    assert bootstrap_interval(values).isnan().all()


@pytest.mark.parametrize("level", [0.0, 1.0, 95, -0.5])
def test_level_out_of_range(level):
    values = torch.rand(5, 2)
    with pytest.raises(ValueError, match=r"level must be between 0 and 1, got .*; for 95 % write"):
        bootstrap_interval(values, float(level))
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        hand_made().interval(float(level))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.floats(-3, 3))
def test_intervals_move_with_the_values(numbers, shift):
    values = torch.tensor(numbers, dtype=torch.float64)[:, None]
    low, high = bootstrap_interval(values)[0].tolist()
    assert min(numbers) - 1e-9 <= low <= high <= max(numbers) + 1e-9
    moved = bootstrap_interval(values + shift)[0].tolist()
    assert moved == pytest.approx([low + shift, high + shift], abs=1e-9)


def test_seeds():
    """Student's t with 2 degrees of freedom: 4.302653 standard errors."""
    found = over_seeds([1.0, 2.0, 6.0])
    half = 4.302653 * math.sqrt(7) / math.sqrt(3)
    assert (found.mean, found.n) == (3.0, 3)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)
    single = over_seeds([2.0])
    assert (single.mean, single.low, single.high, single.n) == (2.0, -math.inf, math.inf, 1)
    assert str(over_seeds([1.0, 1.0])) == "1.000 [1.000, 1.000], n = 2"
    paired = paired_over_seeds([1.0, 2.0, 6.0], [0.5, 0.0, 0.5])
    assert paired.mean == pytest.approx((0.5 + 2 + 5.5) / 3)
    assert paired == over_seeds([0.5, 2.0, 5.5])
    with pytest.raises(ValueError, match="paired values must be equally many, got 2 and 3"):
        paired_over_seeds([1.0, 2.0], [1.0, 2.0, 3.0])


def test_proportions_by_clopper_and_pearson():
    """No success in n trials: the upper end is 1 - (α / 2)^(1 / n)."""
    assert proportion_interval(0, 10) == pytest.approx((0, 1 - 0.025**0.1))
    assert proportion_interval(10, 10) == pytest.approx((0.025**0.1, 1))
    low, high = proportion_interval(5, 10, 0.9)
    assert low == pytest.approx(1 - high)
    tail = sum(math.comb(10, i) * low**i * (1 - low) ** (10 - i) for i in range(5, 11))
    assert tail == pytest.approx(0.05, abs=1e-9)
    for successes, trials in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="need 0 <= successes <= trials"):
            proportion_interval(successes, trials)
