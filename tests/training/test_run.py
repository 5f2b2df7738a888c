"""The folder of a run: who may write into it, its logs, and where it resumes."""

import json
import shutil

import jaxtyping
import pytest
import torch
from torch import nn

from smearlens.training.checkpoint import CheckpointError, write_checkpoint
from smearlens.training.randomness import random_states
from smearlens.training.run import (
    Logs,
    RunConflictError,
    RunFolder,
    first_batch_sha256,
    last_good_checkpoint,
)


def test_logs_reach_the_disk_when_flushed_and_read_back(tmp_path):
    logs = Logs(tmp_path, {})
    rows = [{"step": 0, "loss": 0.1 + 0.2}, {"step": 1, "loss": 1e-30}]
    logs.write("metrics", rows[0])
    assert not (tmp_path / "metrics.jsonl").exists()
    assert logs.read("metrics") == rows[:1]
    lengths = logs.flush()
    logs.write("metrics", rows[1])
    assert logs.read("metrics") == rows
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(rows[0]) + "\n"
    assert lengths == {"metrics": (tmp_path / "metrics.jsonl").stat().st_size}
    assert logs.read("other") == []


def test_logs_without_a_folder_stay_in_memory():
    logs = Logs(None, {})
    logs.write("metrics", {"step": 0})
    assert logs.flush(sync=True) == {}
    assert logs.read("metrics") == [{"step": 0}]


def test_nan_and_inf_are_null_in_a_log():
    logs = Logs(None, {})
    logs.write("metrics", {"loss": float("nan"), "norm": float("inf"), "lr": 0.5})
    assert logs.read("metrics") == [{"loss": None, "norm": None, "lr": 0.5}]


def test_logs_are_cut_to_the_lengths_of_a_checkpoint(tmp_path):
    logs = Logs(tmp_path, {})
    logs.write("metrics", {"step": 0})
    lengths = logs.flush(sync=True)
    for name in ("metrics", "late"):
        logs.write(name, {"step": 1})
    logs.flush()
    again = Logs(tmp_path, lengths)
    again.write("metrics", {"step": 2})
    again.write("late", {"step": 3})  # no checkpoint knew this log
    again.flush()
    assert again.read("metrics") == [{"step": 0}, {"step": 2}]
    assert again.read("late") == [{"step": 3}]


def test_a_folder_of_another_run_is_refused_naming_the_differences(tmp_path):
    description = {"train": {"lr": 0.1, "betas": (0.9, 0.99)}, "model": {"shapes": {"w": [2, 3]}}}
    RunFolder(tmp_path, description).close()
    RunFolder(tmp_path, description).close()
    other = {"train": {"lr": 0.2, "betas": (0.9, 0.99)}, "model": {"shapes": {"w": [2, 5]}}}
    with pytest.raises(RunConflictError) as raised:
        RunFolder(tmp_path, other)
    message = str(raised.value)
    assert "train.lr: 0.1 there, 0.2 given" in message
    assert "model.shapes.w: [2, 3] there, [2, 5] given" in message
    assert "betas" not in message
    assert "give another folder, or delete this one" in message


def test_a_folder_in_use_is_refused_until_closed(tmp_path):
    first = RunFolder(tmp_path, {})
    with pytest.raises(RunConflictError, match="another process is training in this folder"):
        RunFolder(tmp_path, {})
    first.close()
    RunFolder(tmp_path, {}).close()


def test_what_a_killed_process_left_is_removed(tmp_path):
    RunFolder(tmp_path, {}).close()
    (tmp_path / ".config.json.x7.tmp").write_text("{")
    (tmp_path / "checkpoints" / ".step-000500.99.tmp").mkdir()
    RunFolder(tmp_path, {}).close()
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == ["checkpoints", "config.json"]


def test_files_of_no_run_are_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunConflictError, match=r"no config\.json that says of what"):
        RunFolder(tmp_path, {})


def test_a_broken_description_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunConflictError, match="restore it, or delete the folder"):
        RunFolder(tmp_path, {})


def save(folder, step, length):
    parent = folder / "checkpoints"
    parent.mkdir(exist_ok=True)
    trainer = {"random_states": [random_states()]}
    write_checkpoint(parent, nn.Linear(2, 3), trainer, step=step, logs={"metrics": length})
    return parent / f"step-{step:06d}"


def test_broken_checkpoints_are_passed_over(tmp_path):
    assert last_good_checkpoint(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("x" * 20)
    old, new = save(tmp_path, 9, 10), save(tmp_path, 10, 20)
    assert last_good_checkpoint(tmp_path).step == 10
    (new / "trainer.pt").write_bytes(b"")
    with pytest.warns(
        UserWarning, match=r"passed over a broken checkpoint: .*trainer\.pt: 0 bytes"
    ):
        assert last_good_checkpoint(tmp_path).step == 9
    shutil.rmtree(new)
    save(tmp_path, 10, 21)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: 20 bytes; expected at least the 21"):
        assert last_good_checkpoint(tmp_path).step == 9
    (old / "manifest.json").unlink()
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(
            CheckpointError, match=r"no other checkpoint is intact: delete .* to start over"
        ),
    ):
        last_good_checkpoint(tmp_path)


def test_another_number_of_threads_is_announced(tmp_path):
    save(tmp_path, 9, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"threads {threads} -> {threads + 1}.*last digits"):
            last_good_checkpoint(tmp_path)
    finally:
        torch.set_num_threads(threads)


def test_the_fingerprint_of_a_batch_sees_names_types_shapes_and_values():
    base = {"tokens": torch.arange(6).view(2, 3), "mask": torch.ones(2, 3)}
    others = [
        {"token": base["tokens"], "mask": base["mask"]},
        {**base, "tokens": base["tokens"].int()},
        {**base, "tokens": base["tokens"].view(3, 2)},
        {**base, "tokens": base["tokens"].flip(0)},
    ]
    found = {first_batch_sha256(batch) for batch in (base, *others)}
    assert len(found) == 5
    assert first_batch_sha256(dict(reversed(base.items()))) in found


def test_hidden_files_of_others_are_left_alone(tmp_path):
    (tmp_path / ".mine.tmp").mkdir()
    (tmp_path / ".mine.tmp" / "notes").write_text("kept")
    RunFolder(tmp_path, {}).close()
    assert (tmp_path / ".mine.tmp" / "notes").read_text() == "kept"


def test_logs_of_no_run_are_not_taken_for_its_own(tmp_path):
    (tmp_path / "tracking.jsonl").write_text('{"step": 7}\n')
    with pytest.raises(RunConflictError, match=r"checkpoints or logs but no config\.json"):
        RunFolder(tmp_path, {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"loss": torch.tensor(1.5)},
            r"row\['loss'\] of log 'mine' is torch.float32 \[\], .* float\(x\)",
        ),
        (
            {"all": [1.0, float("nan")]},
            r"row\['all'\] of log 'mine' is \[1.0, nan\], which JSON cannot",
        ),
        ({1.5, 2.5}, "a row of log 'mine' must be a dict, got {"),
    ],
)
def test_a_row_that_is_no_json_is_explained(row, message):
    logs = Logs(None, {})
    jaxtyping.config.update("jaxtyping_disable", True)  # as for a user: our own messages come out
    try:
        with pytest.raises(TypeError, match=message):
            logs.write("mine", row)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert logs.read("mine") == []


def test_callbacks_write_into_logs_of_their_own(tmp_path):
    logs = Logs(tmp_path / "run", {})
    logs.folder.mkdir()
    logs.write_for_callback("mine-2.0", {"step": 3})
    for name in ("metrics", "evaluation", "timing"):
        with pytest.raises(
            ValueError, match=f"'{name}', ….*are training's own logs; give the rows"
        ):
            logs.write_for_callback(name, {"step": 3})
    for name in ("../b", "a/b", "", ".hidden", "/a"):
        with pytest.raises(ValueError, match="a log is named by letters, digits, '_', '-' and"):
            logs.write_for_callback(name, {"step": 3})
    logs.flush()
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["mine-2.0.jsonl"]
