"""Plots of the evolution: what they draw is what they were given, nulls and units included."""

import math

import matplotlib as mpl
import pytest

mpl.use("Agg")

from matplotlib.figure import Figure

from smearlens.viz.evolution_plots import (
    Band,
    band,
    draw_attention_metrics,
    draw_layer_similarity,
    draw_losses,
)

STEPS = [0, 500, 1000, 1500]


def line(start, slope, error=0.1, n=3):
    return Band(STEPS, [start + slope * i for i in range(4)], [error] * 4, n)


@pytest.fixture
def ax():
    return Figure().subplots()


def test_a_band_is_mean_and_standard_error_over_seeds():
    values = [[4.0, 2.0], [3.0, 2.5], [5.0, 1.5]]
    runs = [
        [{"step": s, "loss": v, "other": 9} for s, v in zip((0, 500), row, strict=True)]
        for row in values
    ]
    found = band(runs, "loss")
    assert (found.steps, found.n) == ([0, 500], 3)
    assert found.mean == pytest.approx([4, 2])
    assert found.error == pytest.approx([1 / math.sqrt(3), 0.5 / math.sqrt(3)])
    assert band(runs[:1], "loss").error == [0, 0]


@pytest.mark.parametrize("runs", [[], [[]], [[{"step": 0, "loss": 1}], [{"step": 5, "loss": 1}]]])
def test_seeds_logged_at_other_steps_are_no_band(runs):
    with pytest.raises(ValueError, match="all at the same steps"):
        band(runs, "loss")


def test_losses_with_their_bands_and_best_steps(ax):
    bands = {"baseline": line(4, -1), "tracked": Band(STEPS, [4, 1, 2, 3], [0.2] * 4, 5)}
    assert draw_losses(ax, bands, ylabel="validation loss (nats)", mark_best=True) is ax
    lines = {x.get_label(): x for x in ax.get_lines()}
    assert lines["baseline (n = 3)"].get_ydata().tolist() == [4, 3, 2, 1]
    marks = [x.get_xydata().tolist() for x in ax.get_lines() if x.get_marker() == "o"]
    assert marks == [[[1500, 1]], [[500, 1]]]
    edges = ax.collections[1].get_paths()[0].vertices
    assert {(500.0, 0.8), (500.0, 1.2)} <= {(x, round(y, 9)) for x, y in edges.tolist()}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("updates", "validation loss (nats)")
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts == ["baseline (n = 3)", "tracked (n = 5)"]


def test_attention_in_two_panels_with_the_untrained_level():
    axes = Figure().subplots(2, 1, sharex=True)
    entropy = {f"blocks.{i}": line(0.9, -0.1 * i) for i in range(3)}
    span = {f"blocks.{i}": line(2 + i, 1) for i in range(3)}
    found = draw_attention_metrics(
        axes, entropy, span, null_entropy=0.98, null_span=15.75, best_step=1000
    )
    assert found is axes
    for ax, level in zip(axes, (0.98, 15.75), strict=True):
        dashed = [x for x in ax.get_lines() if x.get_linestyle() == "--"]
        assert [x.get_ydata()[0] for x in dashed] == [level]
        dotted = [x for x in ax.get_lines() if x.get_linestyle() == ":"]
        assert [x.get_xdata()[0] for x in dotted] == [1000]
        assert "untrained" in [t.get_text() for t in ax.texts]
        colours = [x.get_color() for x in ax.get_lines()[:3]]
        assert len(set(colours)) == 3
    assert axes[0].get_ylabel() == "entropy / log n"
    assert axes[1].get_ylabel() == "mean distance (tokens)"
    assert "best validation loss" in [t.get_text() for t in axes[0].texts]


def test_every_pair_of_layers_has_a_line_and_its_null(ax):
    pairs = {f"{i}-{j}": line(0.3 + 0.1 * i, 0.01 * j) for j in range(6) for i in range(j)}
    null = {name: 0.5 + 0.01 * i for i, name in enumerate(pairs)}
    draw_layer_similarity(ax, pairs, ylabel="centred cosine", null=null, null_name="shuffled")
    named = [x for x in ax.get_lines() if not x.get_label().startswith("_")]
    assert [x.get_label() for x in named] == list(pairs)
    assert len({x.get_color() for x in named}) == 15
    ticks = {x.get_color(): x.get_ydata()[0] for x in ax.get_lines() if x.get_marker() == "_"}
    for drawn in named:
        assert ticks[drawn.get_color()] == null[drawn.get_label()]
    box = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (box.y0, box.y1) == pytest.approx((0.5, 0.64))
    assert "shuffled" in [t.get_text() for t in ax.texts]
    with pytest.raises(ValueError, match=r"null lacks \['0-1'\]"):
        draw_layer_similarity(ax, {"0-1": line(0, 0)}, ylabel="js", null={"0-2": 0.1})
