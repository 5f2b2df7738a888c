"""Train in two processes and compare with one that has the same batches; run by `test_resume.py`.

Each process takes its rows of every batch: 3 of 5 and 2 of 5, and where a mask counts the targets
more unequally still, down to none. The run of two is stopped half-way and resumed, with dropout
off, then on.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from smearlens.models.decoder import next_token_loss
from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.tracking import Tracker

FILES = ("metrics.jsonl", "tracking.jsonl", "checkpoints/step-000009/model.safetensors")


class StoppedError(Exception):
    """Ends a run half-way."""


def stop(moment):
    if moment.step == stop.at:
        raise StoppedError


class Masked(nn.Module):
    """Predicts each of 13 tokens from the one before it, where a mask says so."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(13, 7), nn.Linear(7, 13)

    def forward(self, tokens, loss_mask, return_type):
        return next_token_loss(self.out(self.embed(tokens)), tokens, loss_mask)


class MaskedData:
    """Of 5 rows, the first two have fewer targets; at every third step none at all."""

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        mask = torch.rand(5, 6, generator=generator) < 0.6
        mask[:2] &= torch.rand(2, 6, generator=generator) < (0.5 if step % 3 else 0)
        mask[4, 1] = True
        return {"tokens": torch.randint(13, (5, 6), generator=generator), "loss_mask": mask}


def run(out, dropout, stop_at, precision="float32", accumulation=1):
    from conftest import TinyModel, TokenData  # beside this script

    torch.manual_seed(3)
    masked = dropout is None
    model = Masked() if masked else TinyModel(dropout)
    data, stop.at = MaskedData() if masked else TokenData(batch=5), stop_at
    config = TrainConfig(
        steps=9, lr=0.01, accumulation=accumulation, checkpoint_every=3, precision=precision
    )
    tracker = Tracker(lambda model: {"size": model.out.weight.norm()})
    result = train(model, data, config, out=out, callbacks=[tracker, stop])
    assert [row["step"] for row in result.log("metrics")] == list(range(9))  # in every process
    assert "forward" not in vars(model)
    return model


def work(root):
    """What each of the two processes does."""
    for name, dropout in (("exact", 0.0), ("dropout", 0.2)):
        try:
            run(root / f"{name}-parts", dropout, stop_at=5)
            raise AssertionError("not stopped")
        except StoppedError:
            pass
        parts = run(root / f"{name}-parts", dropout, stop_at=None)
        whole = run(root / f"{name}-whole", dropout, stop_at=None)
        torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)
    run(root / "masked", None, stop_at=None, accumulation=2)
    run(root / "bf16", 0.0, stop_at=None, precision="bf16")


def fork(root, rank, port):
    """Start process `rank` of 2, as a launcher would; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        work(root)
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([list(json.loads(line).values()) for line in lines], dtype=torch.float64)


def main():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = [fork(root, rank, port) for rank in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes == [0, 0], codes
        run(root / "one", 0.0, stop_at=None)
        run(root / "one-masked", None, stop_at=None, accumulation=2)
        for two, one in (("exact-whole", "one"), ("masked", "one-masked")):
            torch.testing.assert_close(rows(root / two), rows(root / one), rtol=0, atol=1e-5)
        for name in ("exact", "dropout"):
            for file in FILES:
                whole, parts = root / f"{name}-whole" / file, root / f"{name}-parts" / file
                assert whole.read_bytes() == parts.read_bytes(), (name, file)
    sys.stdout.write("equal")


if __name__ == "__main__":
    main()
