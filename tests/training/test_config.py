"""`TrainConfig`: what it refuses, and its way through JSON."""

import dataclasses

import pytest

from smearlens._files import from_json, to_json
from smearlens.training.config import TrainConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be a whole number, 1 or above, got 0"),
        ({"steps": 10.0}, "steps must be a whole number, 1 or above, got 10.0"),
        ({"steps": True}, "steps must be a whole number, 1 or above, got True"),
        ({"accumulation": 0}, "accumulation must be a whole number, 1 or above, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a whole number, 1 or above"),
        ({"warmup": -1}, "warmup must be a whole number, 0 or above, got -1"),
        ({"warmup": 100}, "warmup=100 must be below steps=100"),
        ({"seed": "3"}, "seed must be a whole number, 0 or above, got '3'"),
        ({"skip_nonfinite": -2}, "skip_nonfinite must be a whole number, 0 or above, got -2"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be None or a whole number, 1 or above"),
        ({"eval_every": 0}, "eval_every must be None or a whole number, 1 or above, got 0"),
        ({"lr": 0.0}, "lr must be a number above 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a number above 0, got nan"),
        ({"lr": "1e-3"}, "lr must be a number above 0, got '1e-3'"),
        ({"final_lr_fraction": 1.5}, r"final_lr_fraction must be a number in \[0, 1\], got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be a number 0 or above, got -0.1"),
        ({"clip": 0.0}, "clip must be a number above 0, or None for no clipping, got 0.0"),
        ({"betas": (0.9,)}, r"betas must be two numbers, as in \(0.9, 0.999\), got \(0.9,\)"),
        ({"betas": (0.9, 1.0)}, r"betas must be a number in \[0, 1\), got 1.0"),
        ({"schedule": "linear"}, r"schedule must be one of \['cosine', 'constant', 'plateau'\]"),
        ({"precision": "fp32"}, r"precision must be one of .*'float32'.*, got 'fp32'"),
        ({"schedule": "plateau"}, "schedule='plateau' lowers the rate .* eval_every=100"),
    ],
)
def test_a_wrong_field_says_what_would_do(changes, message):
    config = TrainConfig(steps=100)
    for name, value in changes.items():  # past the type checks that only test runs have
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.__post_init__()


def test_it_is_checked_when_made():
    with pytest.raises(ValueError, match="steps must be"):
        TrainConfig(steps=0)


def test_json_and_back():
    config = TrainConfig(steps=7, betas=(0.8, 0.95), clip=None, schedule="constant", eval_every=3)
    assert from_json(TrainConfig, to_json(config)) == config


def test_a_misspelt_key_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key 'warmpu'; nearest: \['warmup'"):
        from_json(TrainConfig, '{"steps": 7, "warmpu": 3}')


def test_it_is_frozen_and_short():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig(steps=7).steps = 8
    assert len(dataclasses.fields(TrainConfig)) <= 15
