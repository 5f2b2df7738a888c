"""`TrainConfig`: everything that decides how a run trains, checked when it is made.

Leaves out the model, the data and the folder of the run: they are arguments of `train`. Reading and
writing it as JSON is the work of `smearlens._files`, as for every configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: AdamW, its schedule, and what happens every so many updates."""

    steps: int  # updates of the weights
    lr: float = 1e-3  # highest learning rate
    schedule: Literal["cosine", "constant", "plateau"] = "cosine"  # after the warm-up
    warmup: int = 0  # updates over which the rate rises linearly to lr
    final_lr_fraction: float = 0.1  # of lr: where the cosine ends and below which no plateau goes
    weight_decay: float = 0.01  # on tensors with two or more axes; gains and biases never decay
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    clip: float | None = 1.0  # largest gradient norm; None = as it comes
    accumulation: int = 1  # batches per update and process
    precision: Literal["float32", "bf16", "fp16"] = "float32"  # of the forward pass
    seed: int = 0  # of dropout; process r draws from seed + r
    checkpoint_every: int = 500  # updates; the first and the last state are saved too
    keep_checkpoints: int | None = 2  # newest ones to keep; None = all
    eval_every: int | None = None  # updates; None = only before the first and after the last
    skip_nonfinite: int = 0  # updates that may be left out for a loss or gradient of nan or inf

    def __post_init__(self):
        for name in ("steps", "accumulation", "checkpoint_every"):
            _whole(name, getattr(self, name), least=1)
        for name in ("warmup", "seed", "skip_nonfinite"):
            _whole(name, getattr(self, name), least=0)
        for name in ("keep_checkpoints", "eval_every"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least=1, what="None or ")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} must be below steps={self.steps}")
        _real("lr", self.lr, "above 0", lambda x: x > 0)
        _real("final_lr_fraction", self.final_lr_fraction, "in [0, 1]", lambda x: 0 <= x <= 1)
        _real("weight_decay", self.weight_decay, "0 or above", lambda x: x >= 0)
        if self.clip is not None:
            _real("clip", self.clip, "above 0, or None for no clipping", lambda x: x > 0)
        _choice("schedule", self.schedule, ("cosine", "constant", "plateau"))
        _choice("precision", self.precision, ("float32", "bf16", "fp16"))
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, as in (0.9, 0.999), got {self.betas!r}")
        for beta in self.betas:
            _real("betas", beta, "in [0, 1)", lambda x: 0 <= x < 1)
        if self.schedule == "plateau" and self.eval_every is None:
            raise ValueError(
                "schedule='plateau' lowers the rate when an evaluation stops improving: set "
                "eval_every, as in eval_every=100"
            )


def _whole(name: str, value: Any, *, least: int, what: str = "") -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be {what}a whole number, {least} or above, got {value!r}")


def _real(name: str, value: Any, allowed: str, accepts: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not accepts(value):
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
