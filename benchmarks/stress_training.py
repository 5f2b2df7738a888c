"""The same run twice, and runs whose numbers break down.

    python benchmarks/stress_training.py

Contains determinism at one and two threads, and nan and inf at every hook point of a model in
training. Leaves out resuming: `stress_resume`.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from campaign import Campaign, script
from stress_calls import FAMILIES, model

from smearlens.data.synthetic import iid_tokens
from smearlens.models.families import family
from smearlens.training.checkpoint import list_checkpoints, read_checkpoint
from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.nonfinite import NonFiniteError

WIDE = {"d_vocab": 64, "d_model": 64, "n_ctx": 64}  # large enough for torch to share the work
STEPS, TOLERANCE = 60, 1e-5


class Tokens:
    """Random tokens by number, and a source beside them for an encoder-decoder."""

    def __init__(self, name: str, batch: int, length: int, d_vocab: int):
        self.name, self.size, self.d_vocab = name, (batch, length), d_vocab

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(step)
        tokens = iid_tokens(*self.size, self.d_vocab, generator=draw)
        if self.name != "Seq2Seq":
            return {"tokens": tokens}
        return {"source": tokens.flip(1), "target": tokens}


def losses(name: str, threads: int, steps: int) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and final weights of a training on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            more = {"start": 62, "end": 63} if name == "Seq2Seq" else {}
            preset = sorted(family(name).presets)[0] if name != "Seq2Seq" else "base"
            given = family(name).from_preset(preset, **{**WIDE, **more}, dropout=0.1)
        config = TrainConfig(steps=steps, warmup=2, accumulation=2)
        rows = train(given, Tokens(name, 4, 48, 62), config).log("metrics")
        return [row["loss"] for row in rows], [p.detach() for p in given.parameters()]
    finally:
        torch.set_num_threads(before)


def determinism(names: Iterable[str] = FAMILIES, steps: int = STEPS) -> Campaign:
    """Train each family twice on one thread, and once on two."""
    found = Campaign(
        claim="The same call gives the same bits",
        tried=f"{steps} updates of every family, dropout on, 2 batches each: twice on one thread, "
        "twice on two, and one against the other",
        target="0 differing losses and weights at a fixed number of threads; losses of 1 and 2 "
        f"threads within {TOLERANCE:g}",
        counts={"runs": 0, "losses compared": 0},
    )
    farthest = 0.0
    with found.timed():
        for name in names:
            by_threads = {}
            for threads in (1, 2):
                one, other = (losses(name, threads, steps) for _ in range(2))
                found.count("runs", 2)
                found.count("losses compared", steps)
                same = one[0] == other[0] and all(map(torch.equal, one[1], other[1]))
                found.expect(same, f"{name}, {threads} threads: two runs differ")
                by_threads[threads] = one[0]
            pairs = zip(by_threads[1], by_threads[2], strict=True)
            gap = max(abs(a - b) for a, b in pairs)
            farthest = max(farthest, gap)
            found.expect(gap <= TOLERANCE, f"{name}: losses of 1 and 2 threads differ by {gap:.1e}")
        found.counts["largest difference between 1 and 2 threads, nats"] = float(f"{farthest:.2g}")
    return found


def poisoned(value: float, at: int) -> Callable:
    """A hook that puts `value` into what it sees, from its call number `at` on."""
    calls = 0

    def hook(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return tensor + value if calls > at else tensor

    return hook


def nonfinite(names: Iterable[str] = FAMILIES) -> Campaign:
    """Put nan and inf into every hook point of a training, forward and backward."""
    found = Campaign(
        claim="nan and inf stop a training",
        tried="nan or inf added at every hook point of every family, forward or backward, in the "
        "fourth update; then the same with skip_nonfinite",
        target="NonFiniteError with step 3, the bad layer and the last good checkpoint, weights "
        "finite and those of that step; with skip_nonfinite=n, n updates are left out",
    )
    with found.timed(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as root:
        warnings.simplefilter("ignore")
        for name in names:
            data = Tokens(name, 2, 7, 9)
            for number, hook in enumerate(model(name).hook_dict):
                value = (math.nan, math.inf)[number % 2]
                for side in ("fwd", "bwd"):
                    out = Path(root) / name / f"{number}-{side}"
                    _poison(found, name, data, hook, value, side, out)
            _skip(found, name, data)
    return found


def _poison(
    found: Campaign, name: str, data: Tokens, hook: str, value: float, side: str, out: Path
) -> None:
    """Train with one bad hook; what is raised must be complete."""
    given = model(name, dropout=0.0)
    given.add_hook(hook, poisoned(value, 3), side)
    where = f"{name} {hook} {side} {value}"
    found.count("trainings")
    config = TrainConfig(steps=5, checkpoint_every=1, keep_checkpoints=None)
    try:
        losses = [row["loss"] for row in train(given, data, config, out=out).log("metrics")]
        # a gradient hook that no gradient passes, and masked scores, change nothing
        finite = None not in losses and all(p.isfinite().all() for p in given.parameters())
        found.count("without effect on the loss")
        found.expect(finite, f"{where}: it went on, with losses {losses}")
        return
    except NonFiniteError as error:
        found.count("stopped")
        text, last = str(error), list_checkpoints(out / "checkpoints")[-1]
        found.expect(error.step == 3, f"{where}: step {error.step}")
        found.expect(error.checkpoint == last and last.name == "step-000003", f"{where}: {last}")
        named = error.layer == hook if side == "fwd" else bool(error.parameter or error.operation)
        found.expect(named, f"{where}: blamed {error.layer}, {error.parameter}")
        found.expect("skip_nonfinite" in text and "step 3" in text, f"{where}: {text}")
    except Exception as error:
        found.expect(False, f"{where}: {error!r:.120}")
        return
    good = read_checkpoint(last).weights
    same = all(torch.equal(good[n], t) for n, t in given.state_dict().items())
    found.expect(same, f"{where}: the weights are not those of the last checkpoint")


def _skip(found: Campaign, name: str, data: Tokens) -> None:
    """Two bad updates are left out when two may be, and the third stops the training."""
    first = next(iter(model(name).hook_dict))
    for allowed in (2, 1):
        given, calls = model(name), 0

        def twice(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return tensor + (math.nan if calls in (2, 4) else 0)

        given.add_hook(first, twice)
        found.count("trainings")
        try:
            config = TrainConfig(steps=6, skip_nonfinite=allowed)
            rows = train(given, data, config).log("metrics")
            left_out = [row["step"] for row in rows if row.get("skipped")]
            found.expect(left_out == [1, 3] and allowed == 2, f"{name}: left out {left_out}")
            found.expect(all(p.isfinite().all() for p in given.parameters()), f"{name}: weights")
        except NonFiniteError:
            found.expect(allowed == 1, f"{name}: stopped although {allowed} may be left out")


def main() -> Iterable[Campaign]:
    yield determinism()
    yield nonfinite()


if __name__ == "__main__":
    script(main)
