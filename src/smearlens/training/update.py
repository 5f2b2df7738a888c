"""One update of the weights: gradients of its batches, their norm, clipping, AdamW.

Devices, mixed precision, gradient scaling and several processes are `accelerate`'s work. Leaves out
when updates happen and at what rate (`loop`, `schedule`), and the search for the origin of a nan
(`nonfinite`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from smearlens.data.batches import PaddedBatches
from smearlens.training.config import TrainConfig
from smearlens.training.nonfinite import NonFiniteError, find_origin


@runtime_checkable
class DataSource(Protocol):
    """Batches by number, so that a run needs no other data state to resume."""

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch number `step`: the same tensors whenever it is asked for."""
        ...


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays tensors of two or more axes (matrices, embeddings, kernels) and no others.

    Raises:
        ValueError: if the model has nothing to train
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def make_accelerator(config: TrainConfig) -> Any:
    """An `accelerate.Accelerator` of the configured precision.

    Raises:
        ValueError: for fp16 on a device that cannot scale gradients
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it outlives its Accelerator and fixes the first precision
    precision = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}[config.precision]
    accelerator = Accelerator(
        mixed_precision=precision, gradient_accumulation_steps=config.accumulation
    )
    # an ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment would win over the argument
    accelerator.gradient_accumulation_steps = config.accumulation
    if precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            f"precision='fp16' needs a GPU, and the device is {accelerator.device}; "
            "use 'bf16' or 'float32'"
        )
    return accelerator


def require_targets(data: DataSource, config: TrainConfig) -> None:
    """Raise a ValueError if a run of `config` would come to a batch of `data` without a target."""
    if not isinstance(data, PaddedBatches):
        return  # others are not known before they are asked for
    number = data.batch_without_target(config.steps * config.accumulation)
    if number is not None:
        raise ValueError(
            f"data.batch({number}) has no target, as all its lines have fewer than 2 tokens, and "
            "the run would stop there: leave such lines out, or use a larger batch_size"
        )


class Updater:
    """A model, its optimiser and its data, moved from one step to the next by `update`.

    Args:
        model: moved to the accelerator's device and trained in place
        data: its batches
        config: accumulation, clip, skip_nonfinite and what AdamW needs
        accelerator: of `make_accelerator`
    """

    def __init__(self, model: nn.Module, data: DataSource, config: TrainConfig, accelerator: Any):
        self.model, self.data, self.config = model, data, config
        self.accelerator, self.scaler = accelerator, accelerator.scaler
        self.optimizer = adamw(model.to(accelerator.device), config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.several = accelerator.num_processes > 1
        self.parallel = accelerator.prepare_model(model) if self.several else model
        self.skipped = 0  # updates left out for a loss or gradient of nan or inf
        self.loss = math.nan  # of the last update
        self.tokens = 0  # elements of the largest tensor of every batch so far
        self._random = torch.get_rng_state()

    def update(self, step: int, rate: float, look: Callable[[float], None]) -> dict[str, Any]:
        """Make update number `step` at learning rate `rate`.

        Args:
            step: updates made before
            rate: of AdamW
            look: called with the loss when the gradients are there, before they are clipped

        Returns:
            the row of the log: step, loss before the update, rate, gradient norm before clipping

        Raises:
            NonFiniteError: if loss or norm is nan or inf more often than config.skip_nonfinite
        """
        loss_on_device = self._gradients(step)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        total = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        loss, norm = torch.stack((loss_on_device, total)).tolist()  # the one wait for the device
        self.loss, finite = loss, math.isfinite(loss) and math.isfinite(norm)
        if not finite and not self._too_large_a_scale(loss):
            self._count_nonfinite(step, loss, norm)
        look(loss)
        clip = self.config.clip
        if finite and clip is not None and norm > clip:
            clip_grads_with_norm_(self.parameters, clip, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaler is not None:
            self.scaler.step(self.optimizer)  # leaves the update out after an overflow
            self.scaler.update()
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        row = {"step": step, "loss": loss, "lr": rate, "grad_norm": norm}
        return row if finite else {**row, "skipped": True}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly; without the weights."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]

    def release(self) -> None:
        """Take away what `accelerate` wrapped around the model for several processes."""
        if self.several:
            self.accelerator.unwrap_model(self.parallel, keep_fp32_wrapper=False)
            vars(self.model).pop("forward", None)

    def _gradients(self, step: int) -> Tensor:
        """Add up the gradients of all batches of update `step`; their mean loss."""
        accelerator, losses = self.accelerator, []
        self._random = torch.get_rng_state()
        for n, (batch, weight) in enumerate(self._batches(step), start=1):
            last = n == self.config.accumulation
            with nullcontext() if last else accelerator.no_sync(self.parallel):
                loss = self._loss(self.parallel, batch)
                loss = loss * weight if self.several else loss
                accelerator.backward(loss)  # divides by the accumulation
            losses.append(loss.detach())
        mean = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        return accelerator.reduce(mean, "mean") if self.several else mean

    def _batches(self, step: int) -> Iterator[tuple[dict[str, Tensor], float]]:
        """The batches of update `step`, or this process's share of each, and what they weigh."""
        many, device = self.accelerator.num_processes, self.accelerator.device
        for n in range(step * self.config.accumulation, (step + 1) * self.config.accumulation):
            batch, weight = self.data.batch(n), 1.0
            self.tokens += max(t.numel() for t in batch.values())
            if self.several:
                from smearlens.training.distributed import share_of_batch

                batch, weight = share_of_batch(batch, self.accelerator.process_index, many)
            yield {name: t.to(device, non_blocking=True) for name, t in batch.items()}, weight

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with self.accelerator.autocast():
            loss = model(**batch, return_type="loss")
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                'model(**batch, return_type="loss") must return a scalar tensor with a gradient, '
                f"got {found}"
            )
        return loss

    def _too_large_a_scale(self, loss: float) -> bool:
        """Whether fp16 gradients overflowed while the loss is fine: the scaler lowers its scale."""
        return self.scaler is not None and math.isfinite(loss) and self.scaler.get_scale() > 1

    def _count_nonfinite(self, step: int, loss: float, norm: float) -> None:
        """Count an update that is left out; one too many is an error that says where it began."""
        self.skipped += 1
        if self.skipped <= self.config.skip_nonfinite:
            return
        torch.set_rng_state(self._random)  # the same dropout (a GPU's generator has moved on)
        batches = self._batches(step)
        raise find_origin(
            NonFiniteError(step, loss, norm),
            self.model,
            lambda: (self._loss(self.model, batch) for batch, _ in batches),
        )
