"""Kill training with SIGKILL at random moments, and compare what it ends with, byte by byte.

    python benchmarks/stress_resume.py                              # every family
    python benchmarks/stress_resume.py --kills 12 --checkpoint-every 2 tiny

Each model trains once undisturbed (dropout on, two batches per update, data drawn in a shuffled
order, a tracker that draws random numbers), then again and again under kills. After every kill each
checkpoint must read as intact; every run that reaches its end must have the logs, weights and
optimiser state of the undisturbed one. The process imports torch once and forks its victims, so
that a restart costs milliseconds.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child must not need threads
os.environ["SMEARLENS_PROGRESS"] = "0"

import argparse
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import accelerate  # noqa: F401 - imported here once, not in every child
import torch
from campaign import Campaign, script
from stress_calls import FAMILIES, model
from torch import nn

from smearlens.data.batches import TokenBatches
from smearlens.training.checkpoint import list_checkpoints, read_checkpoint
from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.tracking import Tracker

LOGS = ("metrics.jsonl", "tracking.jsonl", "evaluation.jsonl")
TOKENS = 600  # of the text that batches are drawn from


class Tiny(nn.Module):
    """Predicts each token from the one before it: fast, and with dropout."""

    def __init__(self, d_vocab: int = 11, width: int = 17):
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


class ShuffledText:
    """Windows of a text in shuffled order, and for an encoder-decoder a source beside each."""

    def __init__(self, name: str):
        text = torch.randint(11, (TOKENS,), generator=torch.Generator().manual_seed(5))
        self.target = TokenBatches(text, 5, 11, 0, "shuffled")
        self.source = TokenBatches(text, 5, 9, 1, "shuffled") if name == "Seq2Seq" else None

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        tokens = self.target.batch(step)["tokens"]
        if self.source is None:
            return {"tokens": tokens}
        return {"source": self.source.batch(step)["tokens"], "target": tokens}


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    return Tiny() if name == "tiny" else model(name)


def run(name: str, out: Path, steps: int, checkpoint_every: int) -> None:
    """The training that is killed."""
    data = ShuffledText(name)
    config = TrainConfig(
        steps=steps, accumulation=2, warmup=5, eval_every=7, checkpoint_every=checkpoint_every
    )
    held_out = data.batch(10**6)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": model(**held_out, return_type="loss").item(), "draw": torch.rand(()).item()}

    train(build(name), data, config, out=out, callbacks=[Tracker(evaluate)], evaluate=evaluate)


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


def differing(expected: dict[str, bytes], found: dict[str, bytes]) -> int:
    """Bytes in which two states differ, or that one of them lacks."""
    count = 0
    for file, whole in expected.items():
        other = found.get(file, b"")
        count += sum(a != b for a, b in zip(whole, other, strict=False))
        count += abs(len(whole) - len(other))
    return count


def warm_up() -> None:
    """Import what a training imports on its way, once, and not in every child."""
    import tqdm  # noqa: F401

    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # the first optimiser imports much


def undisturbed(name: str, out: Path, steps: int, every: int) -> tuple[dict[str, bytes], float]:
    """What a run ends with that nobody kills, and how long it takes."""
    start = time.perf_counter()
    if wait(child(lambda: run(name, out, steps, every))):
        raise RuntimeError(f"{name}: the undisturbed run failed")
    return state(out), time.perf_counter() - start


def campaign(
    name: str, kills: int, steps: int, every: int, root: Path, moments: random.Random
) -> Campaign:
    """Kill the training of one model `kills` times."""
    found = Campaign(
        claim=f"Exact resume: {name}",
        tried="kill -9 at random moments of training, dropout on, 2 batches per update, shuffled "
        "text; then the same call again, until the run ends",
        target="0 differing bytes of logs, weights, optimiser and random states; 0 unreadable "
        "checkpoints",
        counts=dict.fromkeys(("kills", "during a save", "after a checkpoint", "finished runs",
                              "bytes compared", "bytes differing"), 0),
    )  # fmt: skip
    with found.timed():
        expected, typical = undisturbed(name, root / "undisturbed", steps, every)
        out = root / "killed-0"
        while found.counts["kills"] < kills or out.exists():  # the last run is brought to its end
            last = found.counts["kills"] >= kills
            patience = float("inf") if last else moments.uniform(0, typical)
            fresh, start = not out.exists(), time.perf_counter()
            pid = child(lambda out=out: run(name, out, steps, every))
            code = wait(pid, patience)
            if code is None:
                os.kill(pid, signal.SIGKILL)
                code = wait(pid)
            if code == -signal.SIGKILL:
                _after_kill(found, out)
                continue
            if fresh:
                typical = time.perf_counter() - start  # the load of the machine may have changed
            number = found.counts["finished runs"] + 1
            found.expect(code == 0, f"run {number} ended with exit code {code}")
            bytes_off = differing(expected, state(out) if code == 0 else {})
            found.expect(bytes_off == 0, f"run {number}: {bytes_off} bytes differ")
            found.count("finished runs")
            found.count("bytes compared", sum(map(len, expected.values())))
            found.count("bytes differing", bytes_off)
            out = root / f"killed-{number}"
    return found


def _after_kill(found: Campaign, out: Path) -> None:
    """Count what a kill left behind."""
    left = [path.name for path in (out / "checkpoints").glob("*")]
    found.count("kills")
    found.count("during a save", any(name.startswith(".") for name in left))
    found.count("after a checkpoint", any(name > "step-000000" for name in left))
    unreadable = wait(child(lambda: check(out)))
    found.expect(not unreadable, f"kill {found.counts['kills']}: an unreadable checkpoint")


def main(
    names: Iterable[str] = FAMILIES,
    *,
    kills: int = 10,
    steps: int = 60,
    every: int = 4,
    seed: int = 0,
) -> Iterable[Campaign]:
    moments = random.Random(seed)
    warm_up()
    for name in names:
        with tempfile.TemporaryDirectory() as root:
            yield campaign(name, kills, steps, every, Path(root), moments)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=FAMILIES, help="tiny, or class names")
    parser.add_argument("--kills", type=int, default=10, help="per model")
    parser.add_argument("--steps", type=int, default=60, help="updates of each run")
    parser.add_argument("--checkpoint-every", type=int, default=4, help="updates")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    given = parser.parse_args()
    script(
        lambda: main(
            given.models, kills=given.kills, steps=given.steps, every=given.checkpoint_every,
            seed=given.seed,
        )
    )  # fmt: skip
