"""Loggers against services of our own that keep what they are sent."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import nn

from smearlens._extras import MissingExtraError
from smearlens.training.config import TrainConfig
from smearlens.training.loggers import LogTo
from smearlens.training.loop import train


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, x, return_type):
        return ((self.slope * x - 2 * x) ** 2).mean()


class Points:
    def batch(self, step):
        return {"x": torch.full((3,), float(step + 1))}


@pytest.fixture
def service(monkeypatch):
    sent = []

    class Run:
        def log(self, row, step):
            sent.append((step, row))

    module = ModuleType("trackio")
    module.__spec__ = ModuleSpec("trackio", None)  # accelerate asks what is installed
    module.init = lambda **options: sent.append(options) or Run()
    monkeypatch.setitem(sys.modules, "trackio", module)
    return sent


def test_every_third_loss_arrives(service):
    callback = LogTo("trackio", every=3, values=lambda m: {"twice": 2 * m.step}, project="p")
    result = train(Line(), Points(), TrainConfig(steps=7), callbacks=[callback])
    losses = {row["step"]: row["loss"] for row in result.log("metrics")}
    assert service[0] == {"project": "p"}
    assert service[1:] == [(s, {"loss": losses[s], "twice": 2 * s}) for s in (0, 3, 6)]


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'smearlens\[wandb\]'"):
        LogTo("wandb")


def test_wrong_arguments_are_named(service):
    with pytest.raises(ValueError, match=r"service must be one of .*'wandb'.*, got 'wandbb'"):
        LogTo("wandbb")
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        LogTo("trackio", every=0)
