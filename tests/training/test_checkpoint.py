"""Checkpoints: exact round trips, whole or absent files, and every kind of damage detected."""

import io
import json
import os
import pickle
import random
import shutil
import stat
import warnings

import pytest
import torch
from torch import nn

from smearlens.training.checkpoint import (
    MANIFEST,
    TRAINER,
    WEIGHTS,
    CheckpointError,
    _fingerprint,
    _sealed,
    list_checkpoints,
    load_weights,
    prune_checkpoints,
    read_checkpoint,
    read_manifest,
    remove_litter,
    write_checkpoint,
)
from smearlens.training.randomness import random_states


def write(parent, step=500, model=None):
    trainer = {
        "random_states": [random_states()],
        "momentum": torch.arange(7.0),
        "nested": {"betas": (0.9, 0.999), "none": None, "names": ["a", "b"]},
    }
    return write_checkpoint(parent, model or nn.Linear(2, 3), trainer, step=step, note={"lr": 0.1})


def test_round_trip(tmp_path):
    model = nn.Linear(2, 3)
    path = write(tmp_path, model=model)
    found = read_checkpoint(path)
    assert (path.name, found.step, found.manifest["note"]) == ("step-000500", 500, {"lr": 0.1})
    assert found.manifest["random_states"] == ["numpy", "python", "torch"]
    assert found.trainer["nested"] == {"betas": (0.9, 0.999), "none": None, "names": ["a", "b"]}
    torch.testing.assert_close(found.trainer["momentum"], torch.arange(7.0), rtol=0, atol=0)
    other = nn.Linear(2, 3)
    load_weights(other, found)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)


def test_tied_weights_are_saved_under_both_names(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    found = read_checkpoint(write(tmp_path, model=model))
    assert torch.equal(found.weights["0.weight"], found.weights["1.weight"])


def test_mode_follows_umask_and_nothing_else_is_left(tmp_path):
    before = os.umask(0o027)
    try:
        path = write(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, WEIGHTS, TRAINER]
    assert [file.name for file in tmp_path.iterdir()] == ["step-000500"]


def test_a_failed_save_leaves_the_old_checkpoint_and_no_litter(tmp_path):
    path = write(tmp_path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_checkpoint(
            tmp_path, nn.Linear(2, 3), {"random_states": [{}], "bad": lambda: 0}, step=500
        )
    assert read_checkpoint(path).step == 500
    assert [file.name for file in tmp_path.iterdir()] == ["step-000500"]


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    write(tmp_path)
    model = nn.Linear(2, 3)
    weights = read_checkpoint(write(tmp_path, model=model)).weights
    assert torch.equal(weights["weight"], model.weight)
    assert [file.name for file in tmp_path.iterdir()] == ["step-000500"]


def test_litter_of_a_killed_save_is_removed(tmp_path):
    path = write(tmp_path)
    shutil.copytree(path, tmp_path / ".step-000501.99.tmp")
    (tmp_path / ".config.json.x7.tmp").write_text("{")
    remove_litter(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["step-000500"]


def test_pruning_waits_for_a_readable_manifest(tmp_path):
    for step in (9, 10, 999_999, 1_000_000):
        write(tmp_path, step)
    (tmp_path / "step-1000000" / MANIFEST).write_text("")
    with pytest.raises(CheckpointError):
        prune_checkpoints(tmp_path, 1)
    assert len(list_checkpoints(tmp_path)) == 4
    write(tmp_path, 1_000_000)
    prune_checkpoints(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 4
    prune_checkpoints(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def reseal(path, **changes):
    """Change a manifest and make it look genuine."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["seal"]
    (path / MANIFEST).write_text(_sealed({**manifest, **changes}))


def replace(path, name, content):
    """Change a file and make the manifest agree."""
    (path / name).write_bytes(content)
    files = json.loads((path / MANIFEST).read_text())["files"]
    reseal(path, files={**files, name: _fingerprint(content)})


def put(path, name, content):
    (path / name).write_bytes(content)


def cut(path, name, change):
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:change] if change < 0 else content + b"\0" * change)


class Malicious:
    def __reduce__(self):
        return (warnings.warn, ("code was run",))


BROKEN = {
    "folder missing": (lambda p: shutil.rmtree(p), "", "no such folder", "check the path"),
    "a file in its place": (
        lambda p: (shutil.rmtree(p), p.write_text("")), "", "is a file", "check the path"
    ),
    "folder renamed": (
        lambda p: p.rename(p.with_name("step-000700")), "", "holds step 500", "its old name"
    ),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), MANIFEST, "cannot be read", "delete"),
    "empty manifest": (lambda p: put(p, MANIFEST, b""), MANIFEST, "not a manifest", "delete"),
    "manifest cut off": (lambda p: cut(p, MANIFEST, -7), MANIFEST, "not a manifest", "delete"),
    "manifest of a list": (lambda p: put(p, MANIFEST, b"[]"), MANIFEST, "not a manifest", "delete"),
    "manifest not text": (
        lambda p: put(p, MANIFEST, b"\xff\xfe"), MANIFEST, "not a manifest", "delete"
    ),
    "manifest edited": (
        lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace("0.1", "0.2")),
        MANIFEST, "altered since it was written", "delete",
    ),
    "manifest of another version": (
        lambda p: reseal(p, schema=2), MANIFEST, "schema 2; expected schema 1", "with the version"
    ),
    "manifest without a part": (lambda p: reseal(p, files={}), MANIFEST, "both parts", "delete"),
    "weights missing": (lambda p: (p / WEIGHTS).unlink(), WEIGHTS, "cannot be read", "delete"),
    "weights empty": (lambda p: put(p, WEIGHTS, b""), WEIGHTS, "0 bytes; expected", "delete"),
    "weights cut off": (lambda p: cut(p, WEIGHTS, -1), WEIGHTS, "bytes; expected", "delete"),
    "weights padded": (lambda p: cut(p, WEIGHTS, 1), WEIGHTS, "bytes; expected", "delete"),
    "weights no safetensors": (lambda p: replace(p, WEIGHTS, b"x" * 9), WEIGHTS, "safet", "delete"),
    "trainer missing": (lambda p: (p / TRAINER).unlink(), TRAINER, "cannot be read", "delete"),
    "trainer cut off": (lambda p: cut(p, TRAINER, -100), TRAINER, "bytes; expected", "delete"),
    "trainer is code": (
        lambda p: replace(p, TRAINER, pickle.dumps(Malicious())), TRAINER, "refused", "delete"
    ),
    "trainer without its keys": (
        lambda p: replace(p, TRAINER, saved({"a": 1})), TRAINER, "no trainer state", "delete"
    ),
}  # fmt: skip


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_refused_with_path_finding_and_remedy(tmp_path, kind):
    damage, name, found, remedy = BROKEN[kind]
    path = write(tmp_path)
    damage(path)
    if kind == "folder renamed":
        path = tmp_path / "step-000700"
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(path)
    error = raised.value
    assert error.path == (path / name if name else path)
    assert found in str(error)
    assert remedy in error.remedy
    assert str(error.path) in str(error)
    assert "code was run" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as it crosses processes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("bias"),
            r"'bias' is missing \(1 such tensors\); expected \(torch.Size\(\[3",
        ),
        (lambda w: w.update(extra=torch.ones(2)), "'extra' is .*expected no such tensor"),
        (lambda w: w.update(weight=torch.ones(3, 5)), r"'weight' is \(torch.Size\(\[3, 5\]\)"),
        (
            lambda w: w.update(bias=torch.ones(3).double()),
            "'bias' is .*float64.*expected .*float32",
        ),
        (lambda w: w["bias"].fill_(float("inf")), "'bias' holds nan or inf; expected finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    checkpoint = read_checkpoint(write(tmp_path))
    change(checkpoint.weights)
    with pytest.raises(CheckpointError, match=message):
        load_weights(nn.Linear(2, 3), checkpoint)


def test_single_bit_flips_are_all_detected(tmp_path):
    path = write(tmp_path)
    draw = random.Random(0)
    files = sorted(path.iterdir())
    for flip in range(60):
        file = files[flip % 3]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
        file.write_bytes(good)
    assert read_manifest(path)["step"] == 500
    assert read_checkpoint(path).step == 500
