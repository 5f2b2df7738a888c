"""Train in two processes and compare with one that accumulates; run by `test_resume.py`.

Process r of 2 takes every second batch, so that an update sees the same batches as one process with
an accumulation of 2. The run of two is stopped half-way and resumed, with dropout off, then on.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", SMEARLENS_PROGRESS="0")
os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
sys.path.insert(0, str(Path(__file__).parent))

import accelerate  # noqa: F401 - imported once, before the processes part
import torch
from conftest import TinyModel, TokenData

from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.tracking import Tracker


class StoppedError(Exception):
    """Ends a run half-way."""


def stop(moment):
    if moment.step == stop.at:
        raise StoppedError


def run(out, dropout, stop_at, accumulation=1, precision="float32"):
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
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    code = 1
    try:
        work(root)
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def main():
    import socket

    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        root = Path(folder)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        pids = [fork(root, rank, port) for rank in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes == [0, 0], codes
        for name in ("WORLD_SIZE", "MASTER_ADDR"):
            del os.environ[name]
        run(root / "one", 0.0, stop_at=None, accumulation=2)
        import json

        rows = [
            [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "exact-whole")
        ]
        for one, two in zip(*rows, strict=True):
            for key in one:
                assert abs(one[key] - two[key]) < 1e-5, (one, two)
        both = [(root / f"exact-{x}" / "metrics.jsonl").read_bytes() for x in ("whole", "parts")]
        assert both[0] == both[1]
    print("equal")


if __name__ == "__main__":
    main()
