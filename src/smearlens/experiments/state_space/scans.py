"""What do the scans cost, and which of them lose precision with length?

Errors of every scan against the sequential one in float64, by length, precision and regime of the
input; their time and memory; a verdict on the claim that a parallel scan loses precision. Leaves
out the scans themselves and how their cost is measured (`scan_costs`), and the report
(`scans_report`).
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
from smearlens.analysis.stats import Estimate, over_seeds
from smearlens.experiments.claims import Finding, Outcome, Verdict, claim
from smearlens.experiments.state_space import scan_costs
from smearlens.experiments.state_space.scan_costs import SCANS
from smearlens.experiments.study import open_study, write_result

GATES = ("gates, s = 1", "gates, s = 4", "gates, s = 16")  # the write-up's setting: logits N(0, s²)
REGIMES = ("initial", "trained", "long memory", *GATES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARALLEL = ("doubling", "log-space", "log-space, log 0 := -12")
SLOPE = 0.25  # log error against log length: below, an error does not grow with length
TIMES_LOOP = (
    10.0  # error at the longest length, as a multiple of the loop's: below, nothing is lost
)
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
        seconds_in_cells=round(sum(part["seconds"] for part in done.values()), 1),
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


# Verdict ---------------------------------------------------------------------------------------


def judge(found: list[dict[str, Any]]) -> Verdict:
    """Does a parallel scan lose precision with length? In float32, with the write-up's gates.

    One loses if, at some scale of the gates, its error grows with length (the interval of the slope
    of log error against log length lies above 0.25, or it stops being finite) and at the longest is
    ten times the loop's. One keeps its precision if at every scale it clearly does neither.
    Supported if all lose; refuted if one keeps it, for then parallelism is not the cause.
    """
    states = {scan: [_state(found, scan, regime) for regime in GATES] for scan in PARALLEL}
    lose = [scan for scan, each in states.items() if "loses" in each]
    keep = [scan for scan, each in states.items() if set(each) == {"keeps"}]
    outcome: Outcome = "undecided"
    if len(lose) == len(PARALLEL):
        outcome = "supported"
    elif keep:
        outcome = "refuted"
    findings = tuple(
        Finding(f"{label}, {scan}, {regime}", estimate, causal=True)
        for regime in GATES
        for scan in ("loop", *PARALLEL)
        for label, estimate in (
            ("slope of log error against log length", slope(found, scan, regime)),
            ("log10 of the error at the longest length", last_error(found, scan, regime)),
        )
        if estimate is not None
    )
    seeds = len({row["seed"] for row in found})
    return Verdict(claim(22), outcome, _because(outcome, lose, keep), findings, n_seeds=seeds)


def _because(outcome: Outcome, lose: list[str], keep: list[str]) -> str:
    if outcome == "supported":
        return "Every parallel scan loses digits with length, the doubling scan too."
    named = f"Lost with length: {'; '.join(lose) or 'none'}. Kept: {'; '.join(keep) or 'none'}. "
    if outcome == "undecided":
        return named + "Between the two the seeds do not decide."
    if not lose:
        return named + "Here no scan loses precision with length."
    return named + (
        "What loses digits is the logarithm, not running in parallel: a sum of logarithms as large "
        "as |Σ log Ā| carries an error of 2^-24 of it, which grows with length and with the size "
        "of the logits; a scan that multiplies decays does not."
    )


def _state(found: list[dict[str, Any]], scan: str, regime: str) -> str:
    """`loses`, `keeps` or `unclear`, by slope and error in float32."""
    grows, at_end = slope(found, scan, regime), last_error(found, scan, regime)
    loop = last_error(found, "loop", regime)
    if grows is None or at_end is None or loop is None:
        return "loses"  # not finite at some length
    margin = math.log10(TIMES_LOOP)
    if grows.low > SLOPE and at_end.low > loop.high + margin:
        return "loses"
    return "keeps" if grows.high < SLOPE or at_end.high < loop.low + margin else "unclear"


def slope(found: list[dict[str, Any]], scan: str, regime: str) -> Estimate | None:
    """Slope of log error against log length over seeds, least squares; None if not all finite."""
    values = []
    for rows in _by_seed(found, scan, regime):
        if any(row["error"] is None for row in rows):
            return None
        x = [math.log(row["length"]) for row in rows]
        y = [math.log(max(row["error"], 1e-12)) for row in rows]
        middle = sum(x) / len(x)
        values.append(
            sum((a - middle) * b for a, b in zip(x, y, strict=True))
            / sum((a - middle) ** 2 for a in x)
        )
    return over_seeds(values)


def last_error(found: list[dict[str, Any]], scan: str, regime: str) -> Estimate | None:
    """log10 of the error at the longest length over seeds; None if not all are finite."""
    ends = [rows[-1]["error"] for rows in _by_seed(found, scan, regime)]
    if any(error is None for error in ends):
        return None
    return over_seeds([math.log10(max(error, 1e-12)) for error in ends])


def _by_seed(found: list[dict[str, Any]], scan: str, regime: str) -> list[list[dict[str, Any]]]:
    """The float32 rows of a scan in a regime, one list per seed, shortest first."""
    rows = [r for r in found if (r["scan"], r["regime"], r["dtype"]) == (scan, regime, "float32")]
    seeds = sorted({row["seed"] for row in rows})
    return [sorted((r for r in rows if r["seed"] == s), key=lambda r: r["length"]) for s in seeds]
