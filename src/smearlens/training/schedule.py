"""The learning rate: a pure function of the step, and the state that reduce-on-plateau adds to it.

Leaves out the optimiser: `loop` sets the rate before each update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from smearlens.training.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    r"""The rate of update `step`, counted from 0.

    Args:
        step: updates made before this one
        config: its steps, lr, schedule, warmup and final_lr_fraction

    Returns:
        with w = warmup and s = steps: lr · (step + 1) / (w + 1) while step < w; then lr, or for the
        cosine lr · (f + (1 − f) · (1 + cos(π · (step − w) / (s − w))) / 2) with
        f = final_lr_fraction, which it would reach at step s. A plateau schedule multiplies this by
        `Plateau.factor`.

    Source:
        Loshchilov and Hutter 2017, "SGDR", equation 5, one period
    """
    # 1. warm-up: a straight line that arrives at lr with the first step after it
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    # 2. constant, which is also what a plateau schedule scales down
    if config.schedule != "cosine":
        return config.lr
    # 3. cosine from lr to its last fraction
    progress = (step - config.warmup) / (config.steps - config.warmup)
    high = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * high)


@dataclass(kw_only=True)
class Plateau:
    """Lowers the rate after `patience` evaluations in a row that did not improve on the best.

    An evaluation improves when it is below best · (1 − threshold), as in torch's
    `ReduceLROnPlateau`; losses are not negative, so the product is always the stricter bound.
    """

    least: float  # the factor never goes below this
    shrink: float = 0.5
    patience: int = 3
    threshold: float = 1e-4
    factor: float = 1.0  # multiplies the rate
    best: float = math.inf
    waited: int = 0

    def update(self, loss: float) -> None:
        """Take note of one evaluation, nats per target."""
        if loss < self.best * (1 - self.threshold):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.factor, self.waited = max(self.factor * self.shrink, self.least), 0
