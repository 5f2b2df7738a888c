"""Kill training with SIGKILL at random moments, and compare what it ends with, byte by byte.

    python benchmarks/stress_resume.py --kills 10 tiny ConvAttn AttnAttn
    python benchmarks/stress_resume.py --kills 100 --checkpoint-every 1 tiny    # mostly mid-save

Each model trains once undisturbed (dropout on, two batches per update, a tracker that draws random
numbers), then again and again under kills. After every kill each checkpoint must read as intact;
every run that reaches its end must have the logs, weights and optimiser state of the undisturbed
one. The process imports torch once and forks its victims, so that a restart costs milliseconds.
Exit code 1 if a single byte differs.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child must not need threads
os.environ["SMEARLENS_PROGRESS"] = "0"

import argparse
import inspect
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accelerate  # noqa: F401 - imported here once, not in every child
import torch
from torch import nn

from smearlens.models.families import family
from smearlens.training.checkpoint import list_checkpoints, read_checkpoint
from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.tracking import Tracker

LOGS = ("metrics.jsonl", "tracking.jsonl", "evaluation.jsonl")


class Tiny(nn.Module):
    """Predicts each token from the one before it: fast, and with dropout."""

    def __init__(self, d_vocab: int = 13, width: int = 17):
        super().__init__()
        self.embed, self.drop = nn.Embedding(d_vocab, width), nn.Dropout(0.2)
        self.up, self.norm, self.out = (
            nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, d_vocab)
        )  # fmt: skip

    def forward(self, tokens: torch.Tensor, return_type: str) -> torch.Tensor:
        x = self.drop(self.norm(self.up(self.embed(tokens))).relu())
        return nn.functional.cross_entropy(
            self.out(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )


class RandomTokens:
    """Tokens under every required argument of the model's forward pass."""

    def __init__(self, model: nn.Module):
        config = getattr(model, "config", None)
        self.d_vocab = config.d_vocab if config else 13
        self.length = min(config.n_ctx, 24) if config else 11
        parameters = inspect.signature(model.forward).parameters.values()
        self.names = [
            p.name for p in parameters if p.default is p.empty and p.name != "return_type"
        ]

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        size = (5, self.length)
        return {name: torch.randint(self.d_vocab, size, generator=generator) for name in self.names}


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    return Tiny() if name == "tiny" else family(name).from_preset("cpu", dropout=0.1)


def run(name: str, out: Path, steps: int, checkpoint_every: int) -> None:
    """The training that is killed."""
    model = build(name)
    data = RandomTokens(model)
    config = TrainConfig(
        steps=steps, accumulation=2, warmup=5, eval_every=7, checkpoint_every=checkpoint_every
    )
    held_out = data.batch(10**6)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": model(**held_out, return_type="loss").item(), "draw": torch.rand(()).item()}

    train(model, data, config, out=out, callbacks=[Tracker(evaluate)], evaluate=evaluate)


def check(out: Path) -> None:
    """Every checkpoint that is there can be read."""
    for path in list_checkpoints(out / "checkpoints"):
        read_checkpoint(path)


def child(work: Callable[[], None]) -> int:
    """Fork a process that does `work`; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        warnings.simplefilter("error")
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float = float("inf")) -> int | None:
    """The exit code of `pid`; None if it is still at work after `seconds`."""
    end = time.perf_counter() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.perf_counter() >= end:
            return None
        time.sleep(0.0005)


def state(out: Path) -> dict[str, bytes]:
    """The bytes that must agree: logs, final weights, final optimiser and random states."""
    last = list_checkpoints(out / "checkpoints")[-1]
    files = [*(out / log for log in LOGS), last / "model.safetensors", last / "trainer.pt"]
    return {file.name: file.read_bytes() for file in files}


@dataclass
class Tally:
    """What the kills of one model led to."""

    name: str
    seconds: float  # of the undisturbed run
    kills: int = 0
    runs: int = 0
    saved: int = 0  # kills after which there was a checkpoint beyond the first
    mid_save: int = 0  # kills that left a half-written checkpoint behind
    unreadable: int = 0
    differing: int = 0  # bytes
    failed: int = 0  # processes that ended with an error

    HEADER = (
        "model         undisturbed s  kills  mid-save  resumable  runs  unreadable  bytes differing"
    )

    def __str__(self) -> str:
        return (
            f"{self.name:<14}{self.seconds:>13.2f}{self.kills:>7}{self.mid_save:>10}{self.saved:>11}"
            f"{self.runs:>6}{self.unreadable:>12}{self.differing:>17}"
            + (f"  {self.failed} failed" if self.failed else "")
        )

    @property
    def good(self) -> bool:
        return not (self.unreadable or self.differing or self.failed)


def campaign(name: str, kills: int, steps: int, every: int, root: Path, moments: random.Random):
    """Kill the training of one model `kills` times."""
    start = time.perf_counter()
    if wait(child(lambda: run(name, root / "undisturbed", steps, every))):
        sys.exit(f"{name}: the undisturbed run failed")
    tally = Tally(name, time.perf_counter() - start)
    typical = tally.seconds
    expected = state(root / "undisturbed")
    out = root / "killed-0"
    while tally.kills < kills or out.exists():  # the last run is brought to its end
        patience = moments.uniform(0, typical) if tally.kills < kills else float("inf")
        fresh, start = not out.exists(), time.perf_counter()
        pid = child(lambda out=out: run(name, out, steps, every))
        code = wait(pid, patience)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
        if code == -signal.SIGKILL:
            tally.kills += 1
            left = list((out / "checkpoints").glob("*"))
            tally.mid_save += any(path.name.startswith(".") for path in left)
            tally.saved += any(path.name > "step-000000" for path in left)
            tally.unreadable += bool(wait(child(lambda out=out: check(out))))
            continue
        if fresh:
            typical = time.perf_counter() - start  # the load of the machine may have changed
        tally.failed += code != 0
        tally.runs += 1
        found = state(out) if code == 0 else {}
        for file in expected:
            pairs = zip(expected[file], found.get(file, b""), strict=False)
            tally.differing += sum(a != b for a, b in pairs)
            tally.differing += abs(len(expected[file]) - len(found.get(file, b"")))
        out = root / f"killed-{tally.runs}"
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="tiny, or class names such as ConvAttn")
    parser.add_argument("--kills", type=int, default=10, help="per model")
    parser.add_argument("--steps", type=int, default=60, help="updates of each run")
    parser.add_argument("--checkpoint-every", type=int, default=4, help="updates")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    given = parser.parse_args()
    moments = random.Random(given.seed)
    print(Tally.HEADER)
    good = True
    torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)]
    )  # the first optimiser imports much of torch
    for name in given.models:
        with tempfile.TemporaryDirectory() as root:
            tally = campaign(
                name, given.kills, given.steps, given.checkpoint_every, Path(root), moments
            )
        print(tally, flush=True)
        good = good and tally.good
    sys.exit(not good)


if __name__ == "__main__":
    main()
