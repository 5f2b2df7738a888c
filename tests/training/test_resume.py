"""A run that was stopped ends like one that never was: exceptions, SIGKILL, several processes."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smearlens.models.attn_attn import AttnAttn, AttnAttnConfig
from smearlens.models.conv_attn import ConvAttn, ConvAttnConfig
from smearlens.models.families import load_model
from smearlens.training import loop
from smearlens.training.checkpoint import CheckpointError, list_checkpoints, read_checkpoint
from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.tracking import Tracker

ROOT = Path(__file__).parents[2]
CONFIG = TrainConfig(
    steps=17, lr=0.01, warmup=3, accumulation=2, checkpoint_every=4, eval_every=3, clip=0.5
)


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def stop_at(step):
    def callback(moment):
        if moment.step == step:
            raise StoppedError

    callback.__name__ = "Stop"
    return callback


def go_on(moment):
    """In place of `stop_at`."""


go_on.__name__ = "Stop"


def measure(model):
    return {"size": model.out.weight.norm(), "draw": torch.rand(())}


def run(model, data, out, *last):
    callbacks = [Tracker(measure, at=2), *last]
    return train(model, data, CONFIG, out=out, callbacks=callbacks, evaluate=measure)


def state(out):
    """Bytes of logs, weights and trainer, but for Python's generator: the type checks of a test
    run draw from it."""
    last = list_checkpoints(out / "checkpoints")[-1]
    logs = [out / f"{name}.jsonl" for name in ("metrics", "tracking", "evaluation")]
    found = {file.name: file.read_bytes() for file in (*logs, last / "model.safetensors")}
    trainer = read_checkpoint(last).trainer
    del trainer["random_states"][0]["python"]
    torch.save(trainer, buffer := io.BytesIO())
    return {**found, "trainer.pt": buffer.getvalue()}


@pytest.mark.parametrize("stops", [[0], [3], [4], [5], [17], [7, 7, 15]])
def test_a_stopped_run_ends_like_one_that_never_was(make_model, data, tmp_path, stops):
    run(make_model(), data, tmp_path / "whole", go_on)
    for step in stops:
        with pytest.raises(StoppedError):
            run(make_model(), data, tmp_path / "parts", stop_at(step))
    other = make_model(seed=8)  # its weights do not matter: those of the folder do
    result = run(other, data, tmp_path / "parts", go_on)
    assert result.resumed_from == stops[-1] - stops[-1] % 4
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
    assert [row["step"] for row in result.log("evaluation")] == [0, 3, 6, 9, 12, 15, 17]


def test_a_plateau_goes_on_where_it_was(make_model, data, tmp_path):
    plan = replace(CONFIG, schedule="plateau", eval_every=1, warmup=0)

    def attempt(name, last):
        evaluate = lambda model: {"loss": 1.0}  # noqa: E731
        train(make_model(), data, plan, out=tmp_path / name, callbacks=[last], evaluate=evaluate)

    attempt("whole", go_on)
    with pytest.raises(StoppedError):
        attempt("parts", stop_at(11))
    attempt("parts", go_on)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_leaving_out_the_random_state_is_noticed(make_model, data, tmp_path, monkeypatch):
    """The negative of the test above: without torch's generator the losses differ."""
    run(make_model(), data, tmp_path / "whole", go_on)
    with pytest.raises(StoppedError):
        run(make_model(), data, tmp_path / "parts", stop_at(9))
    monkeypatch.setattr(loop, "restore_random_states", lambda states: None)
    run(make_model(), data, tmp_path / "parts", go_on)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    cut = [content["metrics.jsonl"].splitlines() for content in (whole, parts)]
    assert cut[0][:8] == cut[1][:8]
    assert cut[0][8:] != cut[1][8:]
    assert whole["model.safetensors"] != parts["model.safetensors"]


def test_a_broken_checkpoint_costs_time_and_nothing_else(make_model, data, tmp_path):
    run(make_model(), data, tmp_path / "whole", go_on)
    with pytest.raises(StoppedError):
        run(make_model(), data, tmp_path / "parts", stop_at(9))
    (tmp_path / "parts" / "checkpoints" / "step-000008" / "trainer.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over a broken checkpoint"):
        result = run(make_model(), data, tmp_path / "parts", go_on)
    assert result.resumed_from == 4
    assert state(tmp_path / "parts") == state(tmp_path / "whole")


@pytest.mark.parametrize("family", ["ConvAttn", "AttnAttn"])
def test_models_of_the_library_resume_and_their_checkpoints_load(data, tmp_path, family):
    def make():
        torch.manual_seed(5)
        if family == "ConvAttn":
            sizes = {"d_model": 8, "n_heads": 2, "n_ctx": 7, "kernel_size": 3}
            return ConvAttn(ConvAttnConfig(d_vocab=13, dropout=0.2, **sizes))
        return AttnAttn(AttnAttnConfig(d_vocab=13, d_model=8, n_heads=2, n_ctx=7, dropout=0.2))

    model = make()
    train(model, data, CONFIG, out=tmp_path / "whole", callbacks=[go_on])
    with pytest.raises(StoppedError):
        train(make(), data, CONFIG, out=tmp_path / "parts", callbacks=[stop_at(10)])
    train(make(), data, CONFIG, out=tmp_path / "parts", callbacks=[go_on])
    files = ("metrics.jsonl", "checkpoints/step-000017/model.safetensors")
    for file in files:
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    loaded = load_model(tmp_path / "parts" / "checkpoints" / "step-000017")
    tokens = data.batch(3)["tokens"]
    torch.testing.assert_close(loaded(tokens), model.eval()(tokens), rtol=0, atol=0)


def test_another_number_of_processes_is_refused(make_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.gather_object", lambda states: states * 2)
    with pytest.raises(StoppedError):
        run(make_model(), data, tmp_path, stop_at(9))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="made by 2 processes; expected the 1 of this call"):
        run(make_model(), data, tmp_path, go_on)


def script(*arguments, **environment):
    """Run a script of the repository; its output, once it has ended well."""
    memory = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **memory, **environment},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte():
    arguments = ("--kills", "6", "--steps", "30", "--checkpoint-every", "2", "tiny")
    said = script("benchmarks/stress_resume.py", *arguments)
    assert said.startswith("ok")
    assert " 6 kills," in said
    assert " 0 bytes differing; 0 failed" in said


@pytest.mark.slow
def test_kills_during_saves_leave_whole_files():
    said = script("benchmarks/stress_saves.py", "--kills", "4", "--steps", "12")
    assert said.startswith("ok")
    assert " 4 kills during a save" in said
    assert " 0 still there after the next start" in said


FORGETFUL = """
import sys
sys.path.insert(0, "benchmarks")
import stress_resume
from smearlens.training import loop
loop.restore_random_states = lambda states: None
print(*stress_resume.main(["tiny"], kills=12, steps=30, every=2))  # some after a checkpoint
"""


@pytest.mark.slow
def test_the_kills_notice_a_resume_that_forgets_the_random_states():
    said = script("-c", FORGETFUL)
    assert said.startswith("FAILED")
    assert "bytes differ" in said


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_batches():
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    assert "equal" in script("tests/training/two_processes.py", **settings)
