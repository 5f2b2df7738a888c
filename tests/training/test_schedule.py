"""The learning rate against torch's own schedulers."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from smearlens.training.config import TrainConfig
from smearlens.training.schedule import Plateau, learning_rate


def rates(config):
    return [learning_rate(step, config) for step in range(config.steps)]


@pytest.mark.parametrize(("steps", "fraction"), [(1, 0.1), (2, 0.0), (7, 0.3), (40, 1.0)])
def test_cosine_equals_torch(steps, fraction):
    config = TrainConfig(steps=steps, lr=0.02, final_lr_fraction=fraction)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=0.02 * fraction)
    expected = []
    for _ in range(steps):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(config) == pytest.approx(expected, rel=1e-12)


def test_warm_up_is_a_line_that_arrives_at_lr_as_the_cosine_begins():
    config = TrainConfig(steps=13, lr=0.5, warmup=4)
    assert rates(config)[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    later = TrainConfig(steps=9, lr=0.5)
    assert rates(config)[4:] == rates(later)


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_constant_after_the_warm_up(schedule):
    config = TrainConfig(steps=5, lr=0.3, warmup=2, schedule=schedule, eval_every=1)
    assert rates(config) == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])


@pytest.mark.parametrize("trend", [-0.3, 0.0, 0.01])
def test_plateau_equals_torch(trend):
    losses = (20 + trend * torch.arange(60) + 0.05 * torch.randn(60)).tolist()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3, min_lr=0.1)
    plateau = Plateau(least=0.1)
    for loss in losses:
        plateau.update(loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimiser is never stepped
            scheduler.step(loss)
        assert plateau.factor == scheduler.get_last_lr()[0]
    assert (plateau.factor < 1) == (trend >= 0)
