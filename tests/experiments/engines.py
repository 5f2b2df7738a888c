"""One small grid on every engine, with a worker killed in the middle; run by `test_engines.py`.

    python engines.py FOLDER ENGINE [ENGINE …]

Each engine has its own folder below FOLDER. On all but "serial" the first worker that comes to
step 6 of the first cell is killed by SIGKILL, once; `steps.txt` in the folder of a cell lists the
steps that were made, by whom.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

from smearlens.data.batches import RepeatBatches
from smearlens.experiments.engines import use_engine
from smearlens.experiments.grid import Cell, Task, run_grid
from smearlens.models.conv_attn import ConvAttnConfig
from smearlens.training.config import TrainConfig

SIZES = ConvAttnConfig(d_vocab=11, d_model=8, n_heads=2, kernel_size=3, n_ctx=13, dropout=0.2)
TRAIN = TrainConfig(steps=9, warmup=1, checkpoint_every=4)
CELLS = [
    Cell(name="conv", task="repeats", seed=seed, model="ConvAttn", config=SIZES, train=TRAIN)
    for seed in range(3)
]


class Witness:
    """Notes every step in a file, and may kill its own process."""

    def __init__(self, runs, mortal):
        self.runs, self.mortal, self.folder = runs, mortal, None

    def data(self, seed):
        """The batches of a seed; its cell is the one that trains now."""
        self.folder = self.runs / CELLS[seed].folder
        return RepeatBatches(5, (3, 4), 13, 11, seed)

    def __call__(self, moment):
        with (self.folder / "steps.txt").open("a") as file:
            file.write(f"{moment.step} {os.getpid()}\n")
        killed = self.runs / "killed"
        if self.mortal and moment.step == 6 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def tasks(runs, mortal):
    witness = Witness(runs, mortal)
    return {
        "repeats": Task(
            data=witness.data,
            evaluate=lambda model: {"size": model.unembed.weight.norm().item()},
            measure=lambda model, cell: {"sum": model.unembed.weight.double().sum().item()},
            callbacks=[witness],
        )
    }


def main():
    root = Path(sys.argv[1])
    for engine in sys.argv[2:]:
        out = root / engine
        with use_engine(engine):
            run_grid(CELLS, partial(tasks, out / "runs", engine != "serial"), out, jobs=2)


if __name__ == "__main__":
    main()
