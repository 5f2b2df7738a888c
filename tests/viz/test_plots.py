"""Plots draw everything they are given, and take the results that analysis returns."""

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")

from matplotlib.figure import Figure

from smearlens import kernel_profile
from smearlens.viz.evolution_plots import Band, draw_losses
from smearlens.viz.plots import draw_bars, draw_curves, draw_kernel_profile

NAMES = [f"variant {i}" for i in range(17)]  # more than twice the colours


@pytest.fixture
def ax():
    return Figure().subplots()


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line_looks(ax):
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    return [(line.get_color(), line.get_linestyle()) for line in named]


def test_every_curve_is_drawn_and_no_two_look_alike(ax):
    curves = {n: [[{"step": s, "loss": i + s} for s in (0, 5)]] for i, n in enumerate(NAMES)}
    draw_curves(ax, curves, key="loss", ylabel="loss (nats)")
    assert legend(ax) == NAMES
    assert len(set(line_looks(ax))) == len(NAMES)
    assert [line.get_ydata().tolist() for line in ax.get_lines()] == [[i, i + 5] for i in range(17)]
    assert {style for _, style in line_looks(ax)[:7]} == {"-"}


def test_every_loss_is_drawn_and_no_two_look_alike(ax):
    bands = {n: Band([0, 5], [i, i + 5], [0.1, 0.1], 3) for i, n in enumerate(NAMES)}
    draw_losses(ax, bands, ylabel="loss (nats)")
    assert legend(ax) == [f"{name} (n = 3)" for name in NAMES]
    assert len(set(line_looks(ax))) == len(NAMES)


def test_every_bar_is_drawn_and_no_two_look_alike(ax):
    groups = {g: {n: (i + 0.5, i + 0.0, i + 1.0) for i, n in enumerate(NAMES)} for g in ("a", "b")}
    draw_bars(ax, groups, ylabel="score")
    assert legend(ax) == NAMES
    bars = [c for c in ax.containers if c.get_label() in NAMES]
    assert [[patch.get_height() for patch in c] for c in bars] == [[i + 0.5] * 2 for i in range(17)]
    looks = {(c[0].get_facecolor(), c[0].get_hatch()) for c in bars}
    assert len(looks) == len(NAMES)
    lefts = [c[0].get_x() for c in bars]
    assert lefts == sorted(lefts)


def test_groups_may_hold_different_bars(ax):
    draw_bars(
        ax,
        {"a": {"x": (1.0, 0.5, 2.0)}, "b": {"y": (3.0, 2.0, 4.0), "x": (5.0, 5.0, 6.0)}},
        ylabel="score",
    )
    bars = {c.get_label(): c for c in ax.containers if c.get_label() in ("x", "y")}
    assert [patch.get_height() for patch in bars["x"]] == [1, 5]
    (only,) = bars["y"]
    assert (only.get_height(), round(only.get_x() + only.get_width() / 2, 6)) == (3, 1.2)
    with pytest.raises(ValueError, match=r"at least one bar, got {'a': {}}"):
        draw_bars(ax, {"a": {}}, ylabel="score")


def test_a_kernel_profile_is_drawn_as_it_is_with_its_null(ax):
    profile = kernel_profile(torch.randn(11, 3), lags=[1, 0, -1])
    other = Figure().subplots()
    draw_kernel_profile(ax, profile)
    draw_kernel_profile(
        other, profile.records(), null=profile.null_rms, null_high=profile.null_high
    )
    for one, two in zip(ax.get_lines(), other.get_lines(), strict=True):
        assert one.get_xydata().tolist() == two.get_xydata().tolist()
    band, same = (a.patches[0].get_extents().bounds for a in (ax, other))
    assert band == pytest.approx(same)
    assert [line.get_ydata()[0] for line in ax.get_lines() if line.get_linestyle() == "--"] == [
        profile.null_rms
    ]
    with pytest.raises(ValueError, match=r"null is missing: .* null=profile.null_rms"):
        draw_kernel_profile(ax, profile.records())


def test_the_name_of_a_level_lies_on_nothing_that_is_drawn(ax):
    """Points and bars that are as high as the level are drawn over no name."""
    profile = kernel_profile(torch.full((11, 3), 0.2))
    draw_kernel_profile(ax, profile, null=0.2)
    draw_bars(ax.figure.add_axes((0, 0, 1, 0.4)), {"a": {"b": (0.3, 0.2, 0.4)}}, ylabel="y",
              level=0.3, level_name="chance")  # fmt: skip
    ax.figure.canvas.draw()
    for drawn, name in zip(ax.figure.axes, ("untrained", "chance"), strict=True):
        (label,) = [text for text in drawn.texts if text.get_text() == name]
        assert label.get_window_extent().x0 >= drawn.get_window_extent().x1
