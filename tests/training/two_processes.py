"""Train in two processes and compare with one that accumulates; run by `test_resume.py`.

Process r of 2 takes every second batch, so that an update sees the same batches as one process with
an accumulation of 2. The run of two is stopped half-way and resumed, with dropout off, then on.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch

from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.tracking import Tracker

FILES = ("metrics.jsonl", "tracking.jsonl", "checkpoints/step-000009/model.safetensors")


class StoppedError(Exception):
    """Ends a run half-way."""


def stop(moment):
    if moment.step == stop.at:
        raise StoppedError


def run(out, dropout, stop_at, accumulation=1, precision="float32"):
    from conftest import TinyModel, TokenData  # beside this script

    torch.manual_seed(3)
    model, stop.at = TinyModel(dropout), stop_at
    config = TrainConfig(
        steps=9, lr=0.01, accumulation=accumulation, checkpoint_every=3, precision=precision
    )
    tracker = Tracker(lambda model: {"size": model.out.weight.norm()})
    train(model, TokenData(), config, out=out, callbacks=[tracker, stop])
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
        run(root / "one", 0.0, stop_at=None, accumulation=2)
        torch.testing.assert_close(rows(root / "exact-whole"), rows(root / "one"))
        for name in ("exact", "dropout"):
            for file in FILES:
                whole, parts = root / f"{name}-whole" / file, root / f"{name}-parts" / file
                assert whole.read_bytes() == parts.read_bytes(), (name, file)
    sys.stdout.write("equal")


if __name__ == "__main__":
    main()
