"""Callbacks: functions that training calls at every step, and two that come with the library.

`Tracker` measures the model at chosen steps, `GradientNorms` records the gradient of every
parameter. Neither changes training: the log of the losses is byte for byte the same without them.
Leaves out the metrics themselves (`smearlens.analysis`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from smearlens._explain import describe, explained
from smearlens.training.randomness import observing

MetricFunction = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a callback sees: the model after `step` updates, before the next one.

    The gradients of the coming update stand in `.grad`, not yet clipped; after the last update
    there are none and `loss` is None.
    """

    step: int  # updates made
    steps: int  # updates in all
    model: nn.Module
    loss: float | None  # of the coming update, nats per target
    write: Callable[[str, Mapping[str, Any]], None]  # write(name, row): adds a row to name.jsonl


@runtime_checkable
class Callback(Protocol):
    """Called with each `Moment`, steps + 1 times in all, on every process.

    What it keeps in itself is lost when the run is killed and resumed: it should be a function of
    the moment, and put its results into `moment.write`, whose logs are cut and continued exactly.
    """

    def __call__(self, moment: Moment) -> None:
        """Look at the model; change neither it nor its gradients."""
        ...


@explained
class Tracker:
    """Runs metric functions at chosen steps and writes their results to `tracking.jsonl`.

    The functions see the model in eval mode and without gradients, and may draw random numbers:
    every generator is put back.

    Args:
        *metrics: each `metric(model) -> {name: number}`; no two may share a name
        at: the steps, or every how many; None = `log_spaced`. The last step is always among them
            unless steps are listed, of which the run must have one

    Example:
        >>> tracker = Tracker(lambda model: {"weight": float(model.weight.sum())}, at=100)
        >>> tuple(step for step in range(401) if tracker.is_due(step, 350))
        (0, 100, 200, 300, 350, 400)
    """

    def __init__(self, *metrics: MetricFunction, at: int | Iterable[int] | None = None):
        if not metrics:
            raise ValueError("Tracker needs at least one metric function, metric(model) -> dict")
        if isinstance(at, int) and at < 1:
            raise ValueError(
                f"at={at} must be 1 or above (every so many steps), or a list of steps"
            )
        self.metrics = metrics
        self.at = at if at is None or isinstance(at, int) else frozenset(at)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to measure after `step` of `steps` updates."""
        if isinstance(self.at, frozenset):
            return step in self.at
        if self.at is None:
            return step in log_spaced(steps)
        return step == steps or step % self.at == 0

    def __call__(self, moment: Moment) -> None:
        """Measure if it is time to.

        Raises:
            ValueError: at step 0, if none of the steps in `at` will come; for a name given twice
            TypeError: if a metric returns something else than numbers by name
        """
        if isinstance(self.at, frozenset) and moment.step == 0:
            self._require_a_step(self.at, moment.steps)
        if not self.is_due(moment.step, moment.steps):
            return
        row: dict[str, float] = {"step": moment.step}
        with observing(moment.model):
            for metric in self.metrics:
                name = getattr(metric, "__name__", type(metric).__name__)
                values = numbers_by_name(f"metric {name}", metric(moment.model))
                if twice := row.keys() & values.keys():
                    raise ValueError(
                        f"two metrics of Tracker are called {sorted(twice)}; rename one"
                    )
                row.update(values)
        moment.write("tracking", row)

    @staticmethod
    def _require_a_step(at: frozenset[int], steps: int) -> None:
        if at.isdisjoint(range(steps + 1)):
            raise ValueError(
                f"Tracker(at={sorted(at)}) would measure nothing: none of these steps is in a run "
                f"of {steps} updates; list some of 0..{steps}, or leave `at` out"
            )


@explained
class GradientNorms:
    """Writes the gradient norm of every parameter, before clipping, to `gradient_norms.jsonl`.

    Args:
        every: at each so many steps
    """

    def __init__(self, every: int = 1):
        if every < 1:
            raise ValueError(f"every={every} must be 1 or above")
        self.every = every

    def __call__(self, moment: Moment) -> None:
        """Record the norms if it is time to, and there are gradients."""
        if moment.step % self.every or moment.loss is None:
            return
        named = [
            (name, p.grad) for name, p in moment.model.named_parameters() if p.grad is not None
        ]
        norms = torch.stack([torch.linalg.vector_norm(grad.float()) for _, grad in named]).tolist()
        moment.write(
            "gradient_norms",
            {
                "step": moment.step,
                **{name: norm for (name, _), norm in zip(named, norms, strict=True)},
            },
        )


def numbers_by_name(source: str, found: Any) -> dict[str, float]:
    """What a function of the caller's returned, as the columns of a row beside its "step".

    Raises:
        TypeError: for something else than a dict of numbers
        ValueError: for a value called "step"
    """
    if not isinstance(found, Mapping):
        raise TypeError(
            f"{source} must return numbers by name, as in {{'loss': 1.5}}, got {describe(found)}"
        )
    if "step" in found:
        raise ValueError(
            f"{source} returned a value called 'step', which is the row's own: rename it"
        )
    numbers = {}
    for name, value in found.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{source} returned {describe(value)} as {name!r}, which is no single number"
            ) from error
    return numbers


@cache
def log_spaced(steps: int, per_doubling: int = 2) -> frozenset[int]:
    """Steps 0, 1, 2, 3, 4, 6, 8, 11, 16, … up to `steps`, `per_doubling` in each doubling.

    Example:
        >>> sorted(log_spaced(50))
        [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 50]
    """
    powers = (round(2 ** (i / per_doubling)) for i in range(per_doubling * steps.bit_length()))
    return frozenset({0, steps, *(step for step in powers if step <= steps)})
