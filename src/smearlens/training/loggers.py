"""Send the logs of a run to wandb, tensorboard or trackio, while it also writes its own.

Each service is loaded when its callback is made. Leaves out what is logged: `tracking` and `loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from smearlens._extras import extra
from smearlens.training.tracking import Moment

SERVICES = ("tensorboard", "trackio", "wandb")


class LogTo:
    """A callback that sends the loss, and what is given, to a service every few steps.

    Args:
        service: "wandb", "trackio" or "tensorboard"
        every: steps between two reports
        values: also sent: a function from the moment to numbers
        **options: of `wandb.init` or `trackio.init` (such as `project`), or of tensorboard's
            `SummaryWriter` (such as `log_dir`)

    Raises:
        MissingExtraError: if the service's package is not installed
        ValueError: for another service
    """

    def __init__(
        self,
        service: str,
        *,
        every: int = 10,
        values: Callable[[Moment], Mapping[str, float]] | None = None,
        **options: Any,
    ):
        if service not in SERVICES:
            raise ValueError(f"service must be one of {list(SERVICES)}, got {service!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self.values = every, values
        if service == "tensorboard":
            writer = extra("torch.utils.tensorboard", "tensorboard").SummaryWriter(**options)
            self._send = lambda row, step: [
                writer.add_scalar(name, value, step) for name, value in row.items()
            ]
        else:
            run = extra(service, service).init(**options)
            self._send = lambda row, step: run.log(dict(row), step=step)

    def __call__(self, moment: Moment) -> None:
        """Report the moment if it is one of every few."""
        if moment.step % self.every or moment.loss is None:
            return
        row = {"loss": moment.loss, **(self.values(moment) if self.values else {})}
        self._send(row, moment.step)
