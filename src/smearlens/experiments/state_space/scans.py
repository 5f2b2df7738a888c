"""What do the scans cost, and which of them lose precision with length?

Errors of every scan against the sequential one in float64, by length, precision and regime of the
input; their time and memory. Leaves out the scans themselves and how their cost is measured
(`scan_costs`), the verdict (`scan_verdicts`), and the report (`scans_report`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from smearlens._files import write_atomically
from smearlens.experiments.state_space import scan_costs
from smearlens.experiments.state_space.scan_costs import SCANS
from smearlens.experiments.state_space.scan_verdicts import GATES, REGIMES, judge
from smearlens.experiments.study import open_study, write_result

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECIPE = (
    "Errors: the largest difference over time from the sequential scan in float64 of the same "
    "inputs, over the largest output, worst channel. Times: processor time of one thread, "
    "candidates alternated, median and 10 % to 90 %; ratios to the blocked scan are of one round."
)


@dataclass(frozen=True, kw_only=True)
class ScansConfig:
    """Sizes of the study of scans."""

    seeds: int = 3  # independent inputs of every measurement of errors
    lengths: tuple[int, ...] = (64, 256, 1024, 4096, 16384)  # of the errors
    error_channels: int = 8  # channels whose errors are measured
    cost_lengths: tuple[int, ...] = (64, 256, 1024, 4096)  # of times and memory
    cost_channels: int = 64  # channels that are timed
    d_state: int = 16  # states per channel
    rounds: int = 7  # timings of each candidate
    compile_lengths: tuple[int, ...] = (32, 64)  # compiled; () for none
    process_limit: int = 200  # seconds of processor time for a compilation, or a scan's memory

    def __post_init__(self):
        for name in ("lengths", "cost_lengths"):
            if len(getattr(self, name)) < 2:
                raise ValueError(f"{name} needs two lengths or more, got {getattr(self, name)}")
        for name in ("seeds", "error_channels", "cost_channels", "d_state", "rounds"):
            if getattr(self, name) < (2 if name == "rounds" else 1):
                raise ValueError(f"{name} is too small, got {getattr(self, name)}")

    def quick(self) -> ScansConfig:
        """The same in a minute: shorter, without compilation."""
        return replace(
            self, seeds=2, lengths=(64, 256, 1024), cost_lengths=(64, 256), rounds=3,
            compile_lengths=(),
        )  # fmt: skip


def run(
    config: ScansConfig, out: Path, *, jobs: int = 1, command: str = ""
) -> dict[str, Any]:  # fmt: skip
    """Measure, judge and report into `out`; repeating the call continues where it stopped.

    Args:
        config: lengths, seeds and sizes
        out: folder of the study
        jobs: not used: times are taken one after another
        command: the command line, for the report

    Raises:
        ValueError: if `out` holds a study with another configuration
    """
    from smearlens.experiments.state_space.scans_report import write_scans_report

    open_study(out, config)
    sizes = {"channels": config.cost_channels, "d_state": config.d_state}
    parts = {
        **{
            f"errors-seed{seed}": partial(errors, config, seed) for seed in range(config.seeds)
        },
        "times": partial(scan_costs.times, config.cost_lengths, **sizes, rounds=config.rounds),
        "memory": partial(
            scan_costs.memory, config.cost_lengths, **sizes, seconds=config.process_limit
        ),
        "compiled": partial(
            scan_costs.compiled_times, config.compile_lengths, **sizes,
            seconds=config.process_limit,
        ),
    }  # fmt: skip
    done = {name: _kept(out, name, measure) for name, measure in parts.items()}
    found = [row for name in done if name.startswith("errors") for row in done[name]["rows"]]
    study = write_result(
        out, study="scans", command=command, config=config, recipe=RECIPE,
        verdicts=[judge(found)], measures=found,
        **{name: done[name]["rows"] for name in ("times", "memory", "compiled")},
        cpu_seconds=round(sum(part["seconds"] for part in done.values()), 1),
    )  # fmt: skip
    write_scans_report(study, out)
    return study


def _kept(out: Path, name: str, measure: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    """A part of the study, `rows` and the processor `seconds` it took: from its file, or made."""
    path = out / "parts" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        start = scan_costs.processor_seconds()
        part = {"rows": measure(), "seconds": scan_costs.processor_seconds() - start}
        write_atomically(path, json.dumps(part) + "\n")
    return json.loads(path.read_text())


# Errors ----------------------------------------------------------------------------------------


def errors(config: ScansConfig, seed: int) -> list[dict[str, Any]]:
    """Error of every scan at every length, precision and regime; None where it is not finite.

    A shorter input is the beginning of the longest one. Under `bfloat16` every scan is given
    tensors of that precision: the library's own compute in float32 and round y, the others run the
    recurrence as it comes. `log_decay` is max |Σ log A_bar|, what a log-space scan has to carry.
    """
    rows = []
    for regime in REGIMES:
        whole = inputs(regime, max(config.lengths), config.error_channels, config.d_state, seed)
        for name, dtype in DTYPES.items():
            tensors = [x if i == 2 else x.to(dtype) for i, x in enumerate(whole)]  # A stays
            exact = scan_costs.loop(*(x.double() for x in tensors))
            for length in config.lengths:
                part = [x if i == 2 else x[:, :length] for i, x in enumerate(tensors)]
                carried = float((part[1].double().sum(1) @ part[2].double().abs()).max())
                rows += [
                    {"seed": seed, "regime": regime, "dtype": name, "length": length, "scan": scan,
                     "error": _error(scan, part, exact[:, :length]), "log_decay": carried}
                    for scan in SCANS if scan != "indexed loop"  # the arithmetic of the loop
                ]  # fmt: skip
    return rows


def inputs(regime: str, length: int, channels: int, d_state: int, seed: int) -> list[Tensor]:
    """u, delta, A, B, C of one sequence in a regime.

    `initial`: Δ log-uniform in 1e-3..0.1, A = -1..-16, as a Mamba starts. `trained`: Δ =
    softplus(2z) and A to -64, as they become. `long memory`: Δ in 1e-5..1e-4. `gates, s = …`: one
    state per channel with A_bar = sigmoid(s·z), and writes and z from N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, length, *shape, generator=generator)

    z, u, B, C = normal(channels), normal(channels), normal(d_state), normal(d_state)
    states = torch.arange(1.0, d_state + 1).repeat(channels, 1)
    if regime == "initial":
        return [u, torch.logspace(-3, -1, channels) * torch.exp(0.3 * z), -states, B, C]
    if regime == "trained":
        return [u, F.softplus(2 * z), -4 * states, B, C]
    if regime == "long memory":
        return [u, torch.logspace(-5, -4, channels) * torch.exp(0.3 * z), -states / d_state, B, C]
    if regime not in GATES:
        raise ValueError(f"regime must be one of {list(REGIMES)}, got {regime!r}")
    delta = F.softplus(-float(regime.rpartition(" ")[2]) * z).clamp(min=1e-30)  # exp(-Δ): the gate
    one = torch.ones(1, length, 1)
    return [u / delta, delta, -torch.ones(channels, 1), one, one]


def _error(scan: str, tensors: list[Tensor], exact: Float[Tensor, "1 pos channel"]) -> float | None:
    """Worst channel's largest difference over its largest output; None if it is not finite."""
    with torch.no_grad():
        y = SCANS[scan](*tensors).double()
    error = float(((y - exact).abs().amax(1) / exact.abs().amax(1)).max())
    return float(f"{error:.4g}") if math.isfinite(error) else None
