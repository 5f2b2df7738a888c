"""Callbacks: they see the right model at the right time, and training does not notice them."""

import re
from itertools import pairwise

import pytest
import torch

from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.tracking import GradientNorms, Tracker, log_spaced

CONFIG = TrainConfig(steps=12, lr=0.01, clip=0.5, accumulation=2)


def size(model):
    return {"size": model.out.weight.norm()}


def noise(model):
    """A metric that draws random numbers, in the model's dropout too."""
    model.train()
    loss = model(torch.randint(13, (2, 5)), return_type="loss")
    return {"noise": loss, "gradients": torch.is_grad_enabled()}


def test_tracking_changes_no_byte_of_the_loss_log(make_model, data, tmp_path):
    train(make_model(), data, CONFIG, out=tmp_path / "plain")
    callbacks = [Tracker(size, noise, at=1), GradientNorms()]
    result = train(make_model(), data, CONFIG, out=tmp_path / "tracked", callbacks=callbacks)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("plain", "tracked")]
    assert logs[0] == logs[1]
    rows = result.log("tracking")
    assert [row["step"] for row in rows] == list(range(13))
    assert len({row["noise"] for row in rows}) == 13
    assert not any(row["gradients"] for row in rows)


def test_a_tracker_sees_the_weights_after_so_many_updates(make_model, data):
    model = make_model()
    initial = size(model)["size"].item()
    result = train(model, data, CONFIG, callbacks=[Tracker(size, at=[0, 5, 12, 99])])
    short = make_model()
    train(short, data, TrainConfig(steps=5, lr=0.01, clip=0.5, accumulation=2, schedule="constant"))
    found = {row["step"]: row["size"] for row in result.log("tracking")}
    assert list(found) == [0, 5, 12]
    assert found[0] == initial
    assert found[12] == size(model)["size"].item()
    assert found[5] not in (initial, found[12])


@pytest.mark.parametrize(
    ("at", "steps", "expected"),
    [
        (None, 12, [0, 1, 2, 3, 4, 6, 8, 11, 12]),
        (5, 12, [0, 5, 10, 12]),
        (6, 12, [0, 6, 12]),
        ([7, 3], 12, [3, 7]),
        (None, 1, [0, 1]),
    ],
)
def test_when_a_tracker_measures(at, steps, expected):
    tracker = Tracker(size, at=at)
    assert [step for step in range(steps + 1) if tracker.is_due(step, steps)] == expected


def test_log_spacing_is_even_on_a_log_scale():
    steps = sorted(log_spaced(10_000, per_doubling=3))
    assert steps[0] == 0
    assert steps[-1] == 10_000
    ratios = [b / a for a, b in pairwise(steps[10:-1])]
    assert ratios == pytest.approx([2 ** (1 / 3)] * len(ratios), rel=0.03)


def test_gradient_norms_are_those_before_clipping(make_model, data):
    result = train(make_model(), data, CONFIG, callbacks=[GradientNorms(every=3)])
    rows = result.log("gradient_norms")
    assert [row["step"] for row in rows] == [0, 3, 6, 9]
    names = {name for name, _ in make_model().named_parameters()}
    metrics = result.log("metrics")
    assert any(row["grad_norm"] > CONFIG.clip for row in metrics)
    for row in rows:
        assert row.keys() == {"step", *names}
        total = sum(row[name] ** 2 for name in names) ** 0.5
        assert total == pytest.approx(metrics[row["step"]]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tracker(), "Tracker needs at least one metric function"),
        (lambda: Tracker(size, at=0), "at=0 must be 1 or above"),
        (lambda: GradientNorms(every=0), "every=0 must be 1 or above"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_two_metrics_of_one_name_are_refused(make_model, data):
    with pytest.raises(ValueError, match="two metrics of Tracker are called"):
        train(make_model(), data, CONFIG, callbacks=[Tracker(size, size)])


def nothing(model):
    return None


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (nothing, TypeError, "metric nothing must return numbers by name, .*, got None"),
        (lambda model: {"step": 1.0}, ValueError, "metric <lambda> returned a value called 'step'"),
    ],
)
def test_a_metric_that_makes_no_row_is_explained(make_model, data, metric, error, message):
    with pytest.raises(error, match=message):
        train(make_model(), data, CONFIG, callbacks=[Tracker(size, metric)])


@pytest.mark.parametrize("at", [[100, 13], [-1], []])
def test_a_tracker_none_of_whose_steps_comes_says_so_at_the_start(make_model, data, at):
    message = rf"Tracker\(at={re.escape(str(sorted(at)))}\) would measure nothing: .* of 12 updates"
    with pytest.raises(ValueError, match=message):
        train(make_model(), data, CONFIG, callbacks=[Tracker(size, at=at)])
