"""`train`: a short loop that resumes where it was stopped and ends as if it never had been.

Leaves out the update itself (`update`), checkpoints (`checkpoint`), the folder of a run (`run`),
the learning rate (`schedule`), what is measured on the way (`tracking`), and every model and data
source.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smearlens._explain import explained
from smearlens.models.base import HookedModel
from smearlens.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_weights,
    prune_checkpoints,
    write_checkpoint,
)
from smearlens.training.config import TrainConfig
from smearlens.training.nonfinite import NonFiniteError
from smearlens.training.randomness import (
    leave_as_found,
    observing,
    random_states,
    restore_random_states,
    seed_all,
)
from smearlens.training.run import Logs, RunFolder, first_batch_sha256, last_good_checkpoint
from smearlens.training.schedule import Plateau, learning_rate
from smearlens.training.tracking import Callback, Moment, numbers_by_name
from smearlens.training.update import DataSource, Updater, make_accelerator, require_targets

FLUSH_SECONDS = 1.0  # how often the logs on disk and the progress bar catch up

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run; the model that was given to `train` holds its weights."""

    steps: int
    out: Path | None
    resumed_from: int | None  # step of the checkpoint this call began with; None = from scratch
    logs: Logs

    def log(self, name: str) -> list[dict[str, Any]]:
        """The rows of log `name`, oldest first.

        `metrics` has one per update (the loss before it, the rate, the gradient norm), `evaluation`
        what `evaluate` returned, `timing` seconds and tokens per second; callbacks write others,
        such as `tracking`.
        """
        return self.logs.read(name)


@explained
def train(
    model: nn.Module,
    data: DataSource,
    config: TrainConfig,
    *,
    out: Path | str | None = None,
    callbacks: Sequence[Callback] = (),
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """Train `model` in place with AdamW; the same call again continues, or loads what is finished.

    With `out`, a killed run resumes from its last good checkpoint and ends bit-identical to one
    that was never killed (on a CPU with the same versions and number of threads; on a GPU where
    `torch.use_deterministic_algorithms` is on as well). `step` counts updates made, so that the
    row, the checkpoint and the measurements of a step belong to the same weights. The caller's
    random generators and the model's train mode are left as they were.

    Args:
        model: called as `model(**batch, return_type="loss")`, a scalar in nats per target; moved to
            the device accelerate chooses (`ACCELERATE_USE_CPU=1` keeps it on the CPU)
        data: its `batch(n)` is a pure function of n; update s takes, with accumulation a, the
            batches s · a + i for i < a, with equal weight. Of several processes (`accelerate
            launch`) each takes its rows of them, so that their number changes no batch
        config: what decides the result; an existing folder must have been made with the same
        out: folder of the run; None keeps the logs in memory and saves nothing. A run that was
            begun there goes on from its own weights, whatever those of `model` are now: another
            initialisation is another run and needs another folder
        callbacks: called at every step, see `tracking.Callback`
        evaluate: called in eval mode every `config.eval_every` updates, returns numbers by name
            (any but "step"); its "loss" drives a plateau schedule

    Raises:
        RunConflictError: if `out` holds another run (naming the fields that differ) or is in use
        NonFiniteError: at a loss or gradient of nan or inf, naming layer and parameter
        CheckpointError: if `out` has checkpoints and none is intact
        ValueError, TypeError: for data, model, precision or evaluation that cannot be trained with
    """
    out = None if out is None else Path(out)
    if config.schedule == "plateau" and evaluate is None:
        raise ValueError("schedule='plateau' follows evaluate(model)['loss']: pass evaluate")
    description = _description(model, data, config, callbacks, evaluate)
    require_targets(data, config)
    accelerator = make_accelerator(config)
    folder = None
    with leave_as_found(model):
        try:
            if out is not None and accelerator.is_main_process:
                folder = RunFolder(out, description)
            accelerator.wait_for_everyone()
            checkpoint = None if out is None else last_good_checkpoint(out)
            updater = Updater(model, data, config, accelerator)
            return _Run(updater, out, callbacks, evaluate).finish(checkpoint)
        finally:
            if folder is not None:
                folder.close()


class _Run:
    """One call of `train`: what happens between the updates."""

    def __init__(
        self,
        updater: Updater,
        out: Path | None,
        callbacks: Sequence[Callback],
        evaluate: Evaluate | None,
    ):
        self.updater, self.model, self.config = updater, updater.model, updater.config
        self.out, self.callbacks, self.evaluate = out, callbacks, evaluate
        self.accelerator = updater.accelerator
        self.plateau = Plateau(least=self.config.final_lr_fraction)
        self.logs = Logs(None, {})

    def finish(self, checkpoint: Checkpoint | None) -> TrainResult:
        """From `checkpoint`, or from scratch, to the end."""
        try:
            start = self._begin(checkpoint)
            if start < self.config.steps:
                self._train(start)
        except NonFiniteError as error:
            saved = [] if self.out is None else list_checkpoints(self.out / "checkpoints")
            error.checkpoint = saved[-1] if saved else None
            raise
        finally:
            self.logs.flush()
            self.updater.release()
        resumed = None if checkpoint is None else start
        first = self.accelerator.is_main_process  # the others read what it wrote
        logs = self.logs if first or self.out is None else Logs(self.out, {})
        return TrainResult(steps=self.config.steps, out=self.out, resumed_from=resumed, logs=logs)

    def _begin(self, checkpoint: Checkpoint | None) -> int:
        """Set weights, optimiser, random states and logs to where the run begins."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        logged = self.out if self.accelerator.is_main_process else None
        if checkpoint is None:
            self.logs = Logs(logged, {})
            seed_all(self.config.seed + rank)
            self._save(0)
            return 0
        state = checkpoint.trainer
        if len(state["random_states"]) != processes:
            raise CheckpointError(
                checkpoint.path,
                f"made by {len(state['random_states'])} processes",
                f"the {processes} of this call",
                "start as many processes as before",
            )
        load_weights(self.model, checkpoint)
        self.updater.load_state_dict(state["updater"])
        self.plateau = Plateau(**state["plateau"])
        self.logs = Logs(logged, checkpoint.manifest["logs"])
        restore_random_states(state["random_states"][rank])
        return checkpoint.step

    def _train(self, start: int) -> None:
        config = self.config
        self.model.train()
        self.updater.optimizer.zero_grad()
        for step in self._progress(start):
            self._evaluate(step)
            rate = learning_rate(step, config) * self.plateau.factor
            row = self.updater.update(step, rate, partial(self._call_back, step))
            self.logs.write("metrics", row)
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                self._save(step + 1)
        self._evaluate(config.steps)
        self._call_back(config.steps, None)
        self._save(config.steps)

    def _evaluate(self, step: int) -> None:
        """Evaluate if it is time to, and let a plateau schedule know."""
        every, last = self.config.eval_every, self.config.steps
        if self.evaluate is None or (step % (every or last) and step != last):
            return
        with observing(self.model):
            values = numbers_by_name("evaluate", self.evaluate(self.model))
        self.logs.write("evaluation", {"step": step, **values})
        if self.config.schedule == "plateau":
            if "loss" not in values:
                raise ValueError(
                    f"schedule='plateau' follows evaluate(model)['loss'], got {sorted(values)}"
                )
            self.plateau.update(values["loss"])

    def _call_back(self, step: int, loss: float | None) -> None:
        if not self.callbacks:
            return
        moment = Moment(
            step=step, steps=self.config.steps, model=self.model, loss=loss,
            write=self.logs.write_for_callback,
        )  # fmt: skip
        for callback in self.callbacks:
            callback(moment)

    def _save(self, step: int) -> None:
        """Checkpoint the state after `step` updates, then let go of the oldest."""
        from accelerate.utils import gather_object

        if self.out is None:
            return
        states = gather_object([random_states()])
        if self.accelerator.is_main_process:
            trainer = {
                "updater": self.updater.state_dict(),
                "plateau": dataclasses.asdict(self.plateau),
                "random_states": states,
            }
            logs = self.logs.flush(sync=True)
            parent, config = self.out / "checkpoints", dataclasses.asdict(self.config)
            write_checkpoint(parent, self.model, trainer, step=step, config=config, logs=logs)
            prune_checkpoints(parent, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _progress(self, start: int) -> Iterator[int]:
        """The steps left, under a progress bar; on the way the logs reach the disk, and timing."""
        from tqdm import tqdm

        shown = self.accelerator.is_main_process and sys.stderr.isatty()
        off = not shown or os.environ.get("SMEARLENS_PROGRESS") == "0"
        steps, updater = self.config.steps, self.updater
        with tqdm(total=steps, initial=start, disable=off, unit="step", file=sys.stderr) as bar:
            since, tokens, shown_step = time.perf_counter(), 0, start
            for step in range(start, steps):
                yield step
                seconds = time.perf_counter() - since
                if seconds < FLUSH_SECONDS and step + 1 < steps:
                    continue
                speed = (updater.tokens - tokens) / seconds
                row = {"step": step + 1, "seconds": seconds, "tokens_per_second": speed}
                self.logs.write("timing", row)
                self.logs.flush()
                bar.set_postfix_str(f"loss {updater.loss:.4f}, {speed:,.0f} tokens/s", False)
                bar.update(step + 1 - shown_step)
                since, tokens, shown_step = since + seconds, updater.tokens, step + 1


def _description(
    model: nn.Module,
    data: DataSource,
    config: TrainConfig,
    callbacks: Sequence[Callback],
    evaluate: Evaluate | None,
) -> dict[str, Any]:
    """What makes a run this run and no other: the contents of its config.json."""
    batch = data.batch(0)
    if not isinstance(batch, dict) or not all(isinstance(t, Tensor) for t in batch.values()):
        raise TypeError(f"data.batch(0) must be a dict of tensors, got {batch!r:.80}")
    fingerprint = first_batch_sha256(batch)
    if fingerprint != first_batch_sha256(data.batch(0)):
        raise ValueError(
            "data.batch(0) gave two different batches: it must be a pure function of its argument "
            "(draw from torch.Generator().manual_seed(...) of the number), or no run could resume"
        )
    named = [getattr(callback, "__name__", type(callback).__name__) for callback in callbacks]
    return {
        "train": dataclasses.asdict(config),
        "model": {
            "class": type(model).__name__,
            "config": dataclasses.asdict(model.config) if isinstance(model, HookedModel) else None,
            "shapes": {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad},
        },
        "data": {"first_batch": fingerprint},
        "callbacks": named,
        "evaluate": evaluate is not None,
    }
