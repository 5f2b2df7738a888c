"""The generators and train modes that training shares with its surroundings."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from smearlens.training.randomness import (
    leave_as_found,
    observing,
    random_states,
    restore_random_states,
    seed_all,
)


def draw():
    """Numbers of each generator; a single Gaussian leaves a second one in the state."""
    gauss = np.random.randn()  # noqa: NPY002 - the global generator is what is tested
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), gauss, random.gauss(0, 1)  # noqa: NPY002


def test_all_generators_come_back():
    draw()
    states = random_states()
    first = draw()
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    restore_random_states(states)
    assert draw() == first


def test_seeding_seeds_all_of_them():
    seed_all(3)
    first = draw()
    seed_all(4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    seed_all(3)
    assert draw() == first


def test_everything_is_put_back_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    states = random_states()
    expected = draw()
    restore_random_states(states)

    def disturb():
        with leave_as_found(model):
            draw()
            model.train()
            raise KeyError

    with pytest.raises(KeyError):
        disturb()
    assert [m.training for m in model.modules()] == [True, True, False]
    assert draw() == expected


def test_observing_is_eval_mode_without_gradients():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 3))
    with observing(model):
        assert not model(torch.ones(5, 2)).requires_grad
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())
