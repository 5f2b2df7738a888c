"""The share of a batch for one process of several, and a launch of two."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smearlens.cli import main
from smearlens.training.distributed import share_of_batch

PAGE = Path(__file__).parents[2] / "docs/pages/scaling.md"


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_shares_make_up_the_batch_and_its_mean_loss(processes, masked):
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(7, 5, generator=generator, dtype=torch.float64)  # of each target
    mask = torch.rand(7, 5, generator=generator) < 0.5
    mask[3:5] = False  # of 3 and 7 processes, some have no target at all
    batch = {"tokens": torch.arange(7), "losses": losses}
    batch |= {"loss_mask": mask} if masked else {}
    seen, total = [], 0.0
    for process in range(processes):
        share, weight = share_of_batch(batch, process, processes)
        counts = share.get("loss_mask", torch.ones_like(share["losses"], dtype=torch.bool))
        own = share["losses"][:, 1:][counts[:, 1:]].mean()
        total += weight * own / processes
        seen += share["tokens"].tolist() if weight else []
    whole = losses[:, 1:][mask[:, 1:]] if masked else losses[:, 1:]
    torch.testing.assert_close(total, whole.mean())
    assert set(range(7)) - set(seen) <= {3, 4} if masked else seen == list(range(7))


def test_a_share_without_a_target_is_the_whole_batch_and_weighs_nothing():
    mask = torch.tensor([[True, False], [True, True]])  # position 0 is never a target
    batch = {"tokens": torch.zeros(2, 2), "loss_mask": mask}
    share, weight = share_of_batch(batch, 0, 2)
    assert share["tokens"].shape == (2, 2)
    assert weight == 0
    assert share_of_batch(batch, 1, 2)[1] == 2


def test_batches_that_cannot_be_shared_are_named():
    with pytest.raises(ValueError, match="2 rows cannot be shared among 3 processes; make batch"):
        share_of_batch({"tokens": torch.zeros(2, 5)}, 0, 3)
    with pytest.raises(ValueError, match=r"same number of rows, got .'a': 3, 'b': 2."):
        share_of_batch({"a": torch.zeros(3, 5), "b": torch.zeros(2, 5)}, 0, 2)
    with pytest.raises(ValueError, match=r"got .'a': 3, 'b': 0."):
        share_of_batch({"a": torch.zeros(3, 5), "b": torch.tensor(1.0)}, 0, 2)


@pytest.mark.slow
def test_the_command_of_the_docs_trains_in_two_processes(tmp_path):
    """`accelerate launch` as the page has it, against the same training in this process."""
    command = re.search(r"^ACCELERATE_USE_CPU=1 (accelerate launch .*)$", PAGE.read_text(), re.M)
    words = command[1].replace("runs/two", str(tmp_path / "two")).split()
    words[0] = str(Path(sys.executable).with_name("accelerate"))
    words[2:2] = ["--main_process_port", "0"]  # a free one
    few = ["--steps", "7", "--checkpoint-every", "3"]  # the last of two equal options counts
    done = subprocess.run(
        [*words, *few],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nats per token") == 1  # one process speaks
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    main([one if word == two else word for word in words[words.index("train") :]] + few)
    two, one = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("two", "one")
    )
    assert len(two) == len(one) == 7
    for a, b in zip(two, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    trainer = torch.load(tmp_path / "two/checkpoints/step-000007/trainer.pt", weights_only=True)
    assert len(trainer["random_states"]) == 2  # there really were two processes
