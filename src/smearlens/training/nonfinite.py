"""Where a loss or gradient stopped being finite: `NonFiniteError` and the search for its origin.

The search runs the failed update once more with a hook on every module and torch's anomaly mode, so
that training itself pays nothing for it. Leaves out the decision to stop or to go on: `loop`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


class NonFiniteError(Exception):
    """Training stopped at a loss or gradient that is nan or inf, before it reached the weights.

    Attributes:
        step: updates made before
        layer: the first module or hook, in the order of the forward pass, whose output is not
            finite; None if all are
        parameter: the first parameter that is not finite; else, if every layer's output is, the one
            nearest to the loss whose gradient is not; else None
        operation: torch's name for the first backward operation that went wrong; None if none did
        checkpoint: the last good one; None if the run keeps none
    """

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(step, loss, grad_norm)
        self.step, self.loss, self.grad_norm = step, loss, grad_norm
        self.checkpoint: Path | None = None
        self.layer: str | None = None
        self.parameter: str | None = None
        self.operation: str | None = None

    def __str__(self) -> str:
        origin = [
            f"first bad layer {self.layer!r}" if self.layer else None,
            f"first bad parameter {self.parameter!r}" if self.parameter else None,
            f"first bad backward operation: {self.operation}" if self.operation else None,
        ]
        where = ", ".join(part for part in origin if part) or "not seen again in a second run"
        return (
            f"step {self.step}: loss {self.loss}, gradient norm {self.grad_norm}; {where}; "
            f"last good checkpoint: {self.checkpoint}. The weights are those before this update. "
            "Look at that layer's input, lower lr or clip, train in float32, or let "
            "skip_nonfinite=n leave out up to n such updates"
        )


def find_origin(
    error: NonFiniteError, model: nn.Module, losses: Callable[[], Iterable[Tensor]]
) -> NonFiniteError:
    """Run the update again and write into `error` where its numbers first went wrong.

    Args:
        error: to be completed
        model: its weights before the update, with the gradients that failed; they are lost
        losses: the loss of each batch of the update, computed anew
    """
    parameters = list(model.named_parameters())
    weights = [name for name, p in parameters if not _finite(p)]
    gradients = [name for name, p in parameters if p.grad is not None and not _finite(p.grad)]
    bad: list[str] = []
    masked = "hook_attn_scores"  # -inf there hides a key from a query

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not bad and isinstance(output, Tensor) and not _finite(output, masked in name):
                bad.append(name)

        return hook

    modules = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(look(name)) for name, module in modules]
    try:
        model.zero_grad()
        error.operation = _backward(losses)
    finally:
        for handle in handles:
            handle.remove()
    error.layer = next(iter(bad), None)
    error.parameter = next(iter(weights), None if bad else next(reversed(gradients), None))
    return error


def _backward(losses: Callable[[], Iterable[Tensor]]) -> str | None:
    """Gradients of the losses under anomaly mode; the operation that failed, in torch's words."""
    found = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly mode announces itself, and prints a traceback
        with torch.autograd.set_detect_anomaly(True):
            try:
                for loss in losses():
                    loss.backward()
            except RuntimeError as problem:
                if "returned nan" not in str(problem):
                    raise
                found = str(problem).rstrip(".")
    return found


def _finite(tensor: Tensor, masked: bool = False) -> bool:
    if not tensor.is_floating_point():
        return True
    return bool((tensor.isfinite() | (tensor.isneginf() if masked else False)).all())
