"""The scans under study, each from (u, delta, A, B, C) to y, and what they cost in time and memory.

Contains the sequential loop in two spellings, the blocked scan of the library, the doubling scan
and the log-space scans; timing that alternates candidates; `torch.compile` and peak memory in
processes of their own. Leaves out errors and verdicts (`scans`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from smearlens.experiments.threads import one_thread
from smearlens.nn.scan import selective_scan, selective_scan_plain
from smearlens.nn.scan_variants import linear_scan

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Run = Callable[[], object]
Row = dict[str, Any]

BASE = "blocked"  # what the others are compared with
SMALLEST_MEASURE = 0.02  # seconds: quicker calls are repeated
PATIENCE = 10.0  # seconds: what is expected to take longer is left out
APART = {
    "MALLOC_MMAP_THRESHOLD_": "65536",  # freed memory goes back to the system
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # compile in the process whose time is limited
}
BUSY = 30  # times a limit of processor time that a machine full of others may take


def blocked(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The library's own, block by block."""
    return selective_scan(u, delta, A, B, C)[0]


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Position by position, steps from `unbind`."""
    return selective_scan_plain(u, delta, A, B, C)[0]


def indexed_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Position by position, steps by index: its gradient fills a whole zero tensor at each step."""
    a, write = _pair(u, delta, A, B)
    state, states = torch.zeros_like(write[:, 0]), []
    for t in range(u.shape[1]):
        state = a[:, t] * state + write[:, t]
        states.append(state)
    return (torch.stack(states, 1) @ C.unsqueeze(-1)).squeeze(-1)


def _variant(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, method: str
) -> Tensor:  # fmt: skip
    states, _ = linear_scan(*_pair(u, delta, A, B), method=method)
    return (states @ C.unsqueeze(-1)).squeeze(-1)


def _pair(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A_bar and the write of the `mamba` rule in the precision of the inputs."""
    decay = torch.exp(delta.unsqueeze(-1) * A.to(delta.dtype))
    return decay, (delta * u).unsqueeze(-1) * B.unsqueeze(2)


SCANS: dict[str, Scan] = {
    BASE: blocked,
    "loop": loop,
    "indexed loop": indexed_loop,
    "doubling": partial(_variant, method="doubling"),
    "log-space": partial(_variant, method="logspace"),
    "log-space, log 0 := -12": partial(_variant, method="logspace-floor"),
}
COMPILED = ("indexed loop", "log-space, log 0 := -12")  # S-scan and P-scan of the write-up


def inputs(length: int, channels: int, d_state: int) -> list[Tensor]:
    """u, delta, A, B, C of one sequence in the range of a freshly initialised model."""
    generator = torch.Generator().manual_seed(0)
    u, noise = torch.randn(2, 1, length, channels, generator=generator)
    B, C = torch.randn(2, 1, length, d_state, generator=generator)
    delta = torch.logspace(-3, -1, channels) * torch.exp(0.3 * noise)
    A = -torch.arange(1.0, d_state + 1).repeat(channels, 1)
    return [x.requires_grad_() for x in (u, delta, A, B, C)]


def call(scan: Scan, tensors: list[Tensor], passes: str) -> Run:
    """The scan as something to be timed: `forward`, or `both` passes."""
    if passes == "forward":
        without = [x.detach() for x in tensors]
        return lambda: scan(*without)
    weight = torch.ones_like(tensors[0])
    return lambda: torch.autograd.grad(scan(*tensors), tensors, weight)


# Time ------------------------------------------------------------------------------------------


def times(
    lengths: Sequence[int], *, channels: int, d_state: int, rounds: int
) -> list[Row]:  # fmt: skip
    """Milliseconds of every scan, on one thread in processor time, and as ratios to the blocked.

    In each round every candidate is timed once, and the ratio is that of the round. A candidate
    that is expected to take more than `PATIENCE` seconds is left out of that length and longer ones
    (`ms` is None).
    """
    rows, last = [], {}  # seconds at the length before
    with one_thread():
        for passes in ("forward", "both"):
            for length in lengths:
                tensors = inputs(length, channels, d_state)
                runs = {name: call(scan, tensors, passes) for name, scan in SCANS.items()}
                for name in [n for n in runs if last.get((n, passes), 0) > PATIENCE / 16]:
                    del runs[name]  # four times the length, and at worst quadratic
                measured = _alternate(runs, rounds)
                last |= {(name, passes): min(values) for name, values in measured.items()}
                rows += [
                    {"scan": name, "length": length, "passes": passes}
                    | _summary(measured.get(name), measured[BASE])
                    for name in SCANS
                ]
    return rows


def _alternate(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round; one that takes long gets fewer rounds."""
    repeats, chosen = {}, {}
    for name, run in runs.items():
        first = _seconds(run, 1)
        repeats[name] = max(1, min(50, int(SMALLEST_MEASURE / max(first, 1e-6))))
        chosen[name] = max(3, min(rounds, int(PATIENCE / max(first, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        for name, run in runs.items():
            if index < chosen[name]:
                found[name].append(_seconds(run, repeats[name]))
    return found


def _seconds(run: Run, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def _summary(values: list[float] | None, base: list[float]) -> Row:
    """Median and tenths in milliseconds; ratios to the base, round by round."""
    if values is None:
        return dict.fromkeys(("ms", "low", "high", "ratio", "ratio_low", "ratio_high"))
    found: Row = {}
    ratios = [a / b for a, b in zip(values, base, strict=False)]
    for prefix, numbers in (("", [1000 * v for v in values]), ("ratio_", ratios)):
        tenths = quantiles(numbers, n=10, method="inclusive")
        found |= {prefix + "low": tenths[0], prefix + "high": tenths[-1]}
        found["ratio" if prefix else "ms"] = median(numbers)
    return {key: float(f"{value:.4g}") for key, value in found.items()}


# Compilation and memory, in processes of their own ---------------------------------------------


def compiled_times(
    lengths: Sequence[int], *, channels: int, d_state: int, seconds: int
) -> list[Row]:
    """Eager and compiled milliseconds of the write-up's two scans, forward.

    Each is compiled in a process of its own; what does not end within `seconds` of processor time,
    or finds no C++ compiler, says so under `failed` and has no `compiled_ms`.
    """
    return [
        {"scan": name, "length": length}
        | _apart("compile_one", name, length, channels, d_state, seconds=seconds)
        for name in COMPILED
        for length in lengths
    ]


def compile_one(name: str, length: int, channels: int, d_state: int) -> Row:
    """Compile a scan and time it beside its eager form; run in a process of its own."""
    torch.set_num_threads(1)
    tensors = inputs(length, channels, d_state)
    eager = call(SCANS[name], tensors, "forward")
    fast = call(torch.compile(SCANS[name], dynamic=False), tensors, "forward")
    start = processor_seconds()
    fast()
    compiling = processor_seconds() - start
    measured = _alternate({"eager": eager, "compiled": fast}, 9)
    found = {"eager_ms": median(measured["eager"]), "compiled_ms": median(measured["compiled"])}
    found = {key: float(f"{1000 * value:.4g}") for key, value in found.items()}
    return found | {"compile_seconds": round(compiling, 1)}


def memory(lengths: Sequence[int], *, channels: int, d_state: int, seconds: int) -> list[Row]:
    """Rise of the peak of resident memory in both passes, each scan in a process of its own.

    The indexed loop is left out above a length of 1024, where it takes minutes. Elsewhere than on
    Linux nothing is measured, and `failed` says so.
    """
    rows = []
    for name in SCANS:
        chosen = [n for n in lengths if name != "indexed loop" or n <= 1024]
        found = _apart("peak_rises", name, chosen, channels, d_state, seconds=seconds)
        rises = found.get("rises", [None] * len(chosen))
        rows += [
            {"scan": name, "length": length, "bytes": rise}
            | {key: found[key] for key in ("failed",) if key in found}
            for length, rise in zip(chosen, rises, strict=True)
        ]
    return rows


def peak_rises(name: str, lengths: Sequence[int], channels: int, d_state: int) -> Row:
    """How far resident memory rises above what the inputs take; run in a process of its own."""
    torch.set_num_threads(1)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return {"failed": "peak memory is read from /proc, which only Linux has"}

    def resident(kind: str) -> int:
        return int(status.read_text().split(f"{kind}:")[1].split()[0]) * 1024

    call(SCANS[name], inputs(3, channels, d_state), "both")()  # code and small buffers
    rises = []
    for length in lengths:
        run = call(SCANS[name], inputs(length, channels, d_state), "both")
        reset.write_text("5")
        before = resident("VmRSS")
        run()
        rises.append(max(0, resident("VmHWM") - before))
    return {"rises": rises}


def processor_seconds() -> float:
    """Of this process and of those it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _apart(function: str, *arguments: Any, seconds: int) -> Row:
    """Call a function of this module in a fresh process; `failed` holds the reason if it fails.

    `seconds` is of processor time; where the system cannot limit that, of the clock.
    """
    code = (
        f"import json, sys; from {__name__} import _call; "
        "sys.stdout.write('\\n' + json.dumps(_call(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps([seconds, function, *arguments])]
    limited = find_spec("resource") is not None
    try:
        done = subprocess.run(
            command, env=os.environ | APART, capture_output=True, text=True, check=False,
            timeout=seconds * (BUSY if limited else 1),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished within {seconds} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.rsplit("\n", 1)[1])
    if done.returncode < 0:
        return {"failed": f"not finished within {seconds} s"}
    if "InvalidCxxCompiler" in done.stderr or "No working C++ compiler" in done.stderr:
        return {"failed": "no C++ compiler on this machine"}
    return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}


def _call(seconds: int, function: str, *arguments: Any) -> Row:
    """What `_apart` runs: one of two functions, killed after `seconds` of processor time."""
    if find_spec("resource") is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    return {"compile_one": compile_one, "peak_rises": peak_rises}[function](*arguments)
