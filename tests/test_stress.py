"""The campaigns of `make stress` in short form, and that each of them notices a fault.

Leaves out kills, which need processes of their own: `training/test_resume.py`.
"""

import random
import sys
from pathlib import Path

import pytest
import torch
from tests.models.zoo import VARIANTS

from smearlens.models import cached, files
from smearlens.models.base import HookedModel
from smearlens.training import checkpoint, loop
from smearlens.training.update import Updater

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import stress_code
import stress_files
import stress_hooks
import stress_injection
import stress_input
import stress_memory
import stress_training

SMALL = [v for v in VARIANTS if v.name in ("ConvAttn on k, smeared", "Mamba one decay")]


def ended_well(campaign):
    assert campaign.failures == []
    return campaign.counts


# Files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", stress_files.SUBJECTS)
def test_flipped_bits(subject, tmp_path):
    counts = ended_well(stress_files.flips(20, subject, tmp_path, random.Random(0)))
    assert counts["flips"] == counts["detected"] == 20


def test_flips_that_no_checksum_sees_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sha256", lambda path: "0" * 64)
    assert stress_files.flips(40, "saved model", tmp_path / "a", random.Random(0)).failures
    read = lambda file, fact: file.read_bytes()  # noqa: E731
    monkeypatch.setattr(checkpoint, "_intact", read)
    assert stress_files.flips(40, "checkpoint", tmp_path / "b", random.Random(0)).failures


@pytest.mark.parametrize("subject", stress_files.SUBJECTS)
def test_broken_files(subject, tmp_path, monkeypatch):
    counts = ended_well(stress_files.broken(subject, tmp_path / "a", ["Mamba"]))
    assert counts["kinds"] >= 12
    error = stress_files.SUBJECTS[subject][2]
    monkeypatch.setattr(error, "__str__", lambda self: "broken")
    failures = stress_files.broken(subject, tmp_path / "b", ["Mamba"]).failures
    assert len(failures) == counts["reads"]


def test_weights_that_do_not_fit(tmp_path, monkeypatch):
    assert ended_well(stress_files.misfits(tmp_path / "a", ["Mamba"]))["reads"] >= 12
    monkeypatch.setattr(checkpoint, "load_weights", lambda model, found: None)
    failures = stress_files.misfits(tmp_path / "b", ["Mamba"]).failures
    assert any("a tensor missing: accepted" in failure for failure in failures)


def test_data_and_study_files(tmp_path):
    ended_well(stress_files.data_files(tmp_path / "data"))
    ended_well(stress_files.study_files(tmp_path / "study"))


# Code and input --------------------------------------------------------------------------------


def test_no_source_runs_code_from_a_file():
    assert ended_well(stress_code.campaign())["sources"] > 100


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import load", "eval(text)", "torch.load(file)",
        "torch.load(file, weights_only=False)", "np.load(f, allow_pickle=True)",
        "subprocess.run(line, shell=True)", "f(trust_remote_code=True)",
    ],
)  # fmt: skip
def test_what_runs_code_is_noticed(line):
    assert list(stress_code.offences(line))


@pytest.mark.parametrize("only", ["ConvAttnConfig", "iid_tokens", "linear_cka", "Scores"])
def test_wrong_calls_are_explained(only):
    counts = ended_well(stress_input.campaign(only))
    assert counts["explained"] > 3


def lookup(name: str, size: int) -> int:
    """Bare errors for what is unknown or of a wrong kind."""
    return {"a": 1}[name] + size.bit_length()


def test_a_bare_error_is_noticed(monkeypatch):
    calls = {"lookup": lambda: (lookup, {"name": "a", "size": 3})}
    monkeypatch.setattr(stress_input, "right_calls", lambda: calls)
    failures = stress_input.campaign().failures
    assert any("KeyError" in failure for failure in failures)
    assert any("AttributeError" in failure for failure in failures)


# Hooks -----------------------------------------------------------------------------------------


def test_exceptions_at_every_hook(monkeypatch):
    counts = ended_well(stress_hooks.exceptions(SMALL))
    assert counts["exceptions"] == 4 * counts["hook points"]
    theirs = HookedModel.__mro__[1].hooks
    monkeypatch.setattr(HookedModel, "hooks", theirs)
    assert any("contexts" in failure for failure in stress_hooks.exceptions(SMALL[:1]).failures)


def test_writes_behind_a_cache(monkeypatch):
    ended_well(stress_hooks.aliasing(SMALL))
    monkeypatch.setattr("smearlens._hooks._checked", lambda hook, dir: hook)
    assert stress_hooks.aliasing(SMALL[:1]).failures


# Pages -----------------------------------------------------------------------------------------


def test_hostile_strings(monkeypatch):
    counts = ended_well(stress_injection.campaign())
    assert counts["strings"] >= 20
    monkeypatch.setattr("html.escape", lambda text, quote=True: text)
    assert any("report" in failure for failure in stress_injection.campaign().failures)


# Training and memory ---------------------------------------------------------------------------


def test_the_same_run_twice(monkeypatch):
    ended_well(stress_training.determinism(["Mamba"], steps=3))
    monkeypatch.setattr(loop, "seed_all", lambda *seed: torch.seed())
    assert stress_training.determinism(["Mamba"], steps=3).failures


def test_numbers_that_break_down(monkeypatch):
    counts = ended_well(stress_training.nonfinite(["Mamba"]))
    assert counts["stopped"] > counts["trainings"] / 2
    monkeypatch.setattr(Updater, "_count_nonfinite", lambda *args: None)
    assert any("went on" in failure for failure in stress_training.nonfinite(["Mamba"]).failures)


def test_memory(monkeypatch):
    ended_well(stress_memory.memory(SMALL))
    monkeypatch.setattr(cached, "_refused", lambda error: False)
    assert stress_memory.memory(SMALL[:1]).failures
