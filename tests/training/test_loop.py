"""`train` against a bare loop, and what it promises its caller."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from smearlens.data.batches import PaddedBatches
from smearlens.training.checkpoint import list_checkpoints
from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.randomness import random_states
from smearlens.training.run import RunConflictError
from smearlens.training.update import adamw


def config(**changes):
    return TrainConfig(**{"steps": 12, "lr": 0.01, "warmup": 3, **changes})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_it_equals_a_bare_loop(make_model, data):
    """Float64 and no dropout, against torch's plain AdamW, LambdaLR and clip_grad_norm_."""
    model, bare = make_model(dropout=0.0).double(), make_model(dropout=0.0).double()
    result = train(model, data, config(schedule="constant", clip=0.8, weight_decay=0.3))
    decayed = [p for p in bare.parameters() if p.ndim > 1]
    others = [p for p in bare.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 4))
    rows = []
    for step in range(12):
        loss = bare(**data.batch(step), return_type="loss")
        loss.backward()
        norm = nn.utils.clip_grad_norm_(bare.parameters(), 0.8)
        rows.append([step, loss.item(), schedule.get_last_lr()[0], norm.item()])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    found = [
        [row["step"], row["loss"], row["lr"], row["grad_norm"]] for row in result.log("metrics")
    ]
    np.testing.assert_allclose(found, rows, rtol=1e-10)
    assert any(row[3] > 0.8 for row in rows)
    assert any(row[3] < 0.8 for row in rows)
    torch.testing.assert_close(weights(model), weights(bare), rtol=1e-9, atol=1e-10)


def test_only_tensors_of_two_or_more_axes_decay():
    model = nn.Sequential(nn.Conv1d(2, 3, 5), nn.LayerNorm(7))
    model[0].bias.requires_grad_(False)
    decayed, others = adamw(model, config(weight_decay=0.2)).param_groups
    assert (decayed["weight_decay"], [p.ndim for p in decayed["params"]]) == (0.2, [3])
    assert (others["weight_decay"], [p.ndim for p in others["params"]]) == (0.0, [1, 1])
    with pytest.raises(ValueError, match="Conv1d has no parameter that requires a gradient"):
        adamw(nn.Conv1d(2, 3, 5).requires_grad_(False), config())


def test_accumulation_equals_one_large_batch(make_model, make_data):
    class Halves:
        def batch(self, step):
            whole = make_data(6).batch(step // 2)["tokens"]
            return {"tokens": whole[3 * (step % 2) :][:3]}

    models = make_model(dropout=0.0), make_model(dropout=0.0)
    one = train(models[0], make_data(6), config())
    two = train(models[1], Halves(), config(accumulation=2))
    for row, other in zip(one.log("metrics"), two.log("metrics"), strict=True):
        assert other == pytest.approx(row, rel=1e-5)
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=0, atol=1e-6)


def test_the_files_of_a_run(make_model, data, tmp_path):
    result = train(
        make_model(), data, config(checkpoint_every=5, keep_checkpoints=None), out=tmp_path
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoints", "config.json", "metrics.jsonl", "timing.jsonl"]
    steps = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert steps == ["step-000000", "step-000005", "step-000010", "step-000012"]
    assert json.loads((tmp_path / "config.json").read_text())["train"]["warmup"] == 3
    assert [row["step"] for row in result.log("metrics")] == list(range(12))
    train(make_model(), data, config(checkpoint_every=5), out=tmp_path / "few")
    few = [path.name for path in list_checkpoints(tmp_path / "few" / "checkpoints")]
    assert few == steps[-2:]
    (timing,) = result.log("timing")
    assert timing["step"] == 12
    assert timing["tokens_per_second"] == pytest.approx(12 * 15 / timing["seconds"])


def test_a_finished_run_is_loaded_and_not_touched(make_model, data, tmp_path):
    model, other = make_model(), make_model(seed=5)
    first = train(model, data, config(), out=tmp_path)
    assert first.resumed_from is None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    second = train(other, data, config(), out=str(tmp_path))
    assert second.resumed_from == second.steps == 12
    assert second.log("metrics") == first.log("metrics")
    torch.testing.assert_close(weights(other), weights(model), rtol=0, atol=0)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": config(lr=0.02)}, "train.lr: 0.01 there, 0.02 given"),
        ({"data": 4}, "data.first_batch"),
        ({"callbacks": [print]}, r"callbacks: \[\] there, \['print'\] given"),
        ({"evaluate": lambda model: {"loss": 1.0}}, "evaluate: False there, True given"),
    ],
)
def test_a_changed_call_on_the_same_folder_is_refused(
    make_model, make_data, tmp_path, changes, message
):
    train(make_model(), make_data(), config(), out=tmp_path)
    call = {"config": config(), "data": 3, **changes}
    call["data"] = make_data(call["data"])
    with pytest.raises(RunConflictError, match=message):
        train(make_model(), **call, out=tmp_path)


def test_the_caller_keeps_its_generators_modes_and_gradients_unset(make_model, data):
    model = make_model().eval()
    model.norm.train()
    states = random_states()
    result = train(model, data, config())
    assert torch.equal(random_states()["torch"], states["torch"])
    assert torch.equal(random_states()["numpy"][1], states["numpy"][1])
    assert [m.training for m in (model, model.norm, model.drop)] == [False, True, False]
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(99)  # the seed of a run is its own
    assert train(make_model(), data, config()).log("metrics") == result.log("metrics")
    other = train(make_model(), data, config(seed=1))
    assert other.log("metrics")[0]["loss"] != result.log("metrics")[0]["loss"]


def test_gradients_from_before_do_not_count(make_model, data):
    model = make_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert train(model, data, config()).log("metrics") == (
        train(make_model(), data, config()).log("metrics")
    )


def test_bf16_trains_near_float32_and_leaves_the_model_as_it_was(make_model, data):
    models = make_model(dropout=0.0), make_model(dropout=0.0)
    exact = train(models[0], data, config()).log("metrics")
    coarse = train(models[1], data, config(precision="bf16")).log("metrics")
    losses = [(row["loss"], other["loss"]) for row, other in zip(exact, coarse, strict=True)]
    assert all(0 < abs(a - b) < 0.05 for a, b in losses)
    assert {p.dtype for p in models[1].parameters()} == {torch.float32}
    assert "forward" not in vars(models[1])
    again = make_model(dropout=0.0)
    assert train(again, data, config()).log("metrics") == exact  # the precision did not stick


def test_fp16_needs_a_device_that_can_scale(make_model, data):
    if torch.cuda.is_available():
        pytest.skip("this machine can")
    with pytest.raises(
        ValueError, match="precision='fp16' needs a GPU, and the device is cpu; use"
    ):
        train(make_model(), data, config(precision="fp16"))


def test_evaluation_before_during_and_after(make_model, data):
    seen = []

    def evaluate(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return {"loss": model(**data.batch(99), return_type="loss"), "draw": torch.rand(())}

    plain = train(make_model(), data, config()).log("metrics")
    result = train(make_model(), data, config(eval_every=5), evaluate=evaluate)
    assert [row["step"] for row in result.log("evaluation")] == [0, 5, 10, 12]
    assert seen == [(False, False)] * 4
    assert result.log("metrics") != []
    assert result.log("metrics") == plain
    ends = train(make_model(), data, config(), evaluate=evaluate).log("evaluation")
    assert [row["step"] for row in ends] == [0, 12]


def test_a_plateau_lowers_the_rate(make_model, data):
    plan = config(schedule="plateau", eval_every=1, warmup=0, final_lr_fraction=0.25)
    result = train(make_model(), data, plan, evaluate=lambda model: {"loss": 1.0})
    rates = [row["lr"] for row in result.log("metrics")]
    assert rates == [0.01] * 4 + [0.005] * 4 + [0.0025] * 4
    with pytest.raises(ValueError, match="pass evaluate"):
        train(make_model(), data, plan)
    with pytest.raises(
        ValueError, match=r"follows evaluate\(model\)\['loss'\], got \['accuracy'\]"
    ):
        train(make_model(), data, plan, evaluate=lambda model: {"accuracy": 1.0})


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (None, TypeError, r"evaluate must return numbers by name, as in \{'loss': 1.5\}, got None"),
        (
            {"step": 3},
            ValueError,
            "evaluate returned a value called 'step', which is the row's own",
        ),
        (
            {"f1": torch.ones(2, 3)},
            TypeError,
            r"evaluate returned torch.float32 \[2, 3\] as 'f1', wh",
        ),
    ],
)
def test_an_evaluation_that_makes_no_row_is_explained(make_model, data, found, error, message):
    with pytest.raises(error, match=message):
        train(make_model(), data, config(), evaluate=lambda model: found)


def test_a_callback_does_not_write_into_the_logs_of_training(make_model, data):
    with pytest.raises(ValueError, match="are training's own logs"):
        train(
            make_model(), data, config(), callbacks=[lambda m: m.write("metrics", {"step": m.step})]
        )


def test_a_run_that_comes_to_a_batch_without_a_target_is_refused(make_model):
    lines = [torch.arange(n) for n in (1, 3, 0, 1, 5)]
    data = PaddedBatches(lines, batch_size=2, length=5, pad=0, seed=2)
    first = data.batch_without_target(60)
    with pytest.raises(
        ValueError, match=rf"data.batch\({first}\) has no target, .*larger batch_si"
    ):
        train(make_model(), data, config(steps=60))


class Impure:
    def batch(self, step):
        return {"tokens": torch.randint(13, (3, 5))}


class NoTensors:
    def batch(self, step):
        return {"tokens": [1, 2]}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (Impure(), ValueError, "gave two different batches: it must be a pure function"),
        (NoTensors(), TypeError, r"data.batch\(0\) must be a dict of tensors, got \{'tokens'"),
    ],
)
def test_data_that_cannot_be_resumed_is_refused(make_model, source, error, message):
    with pytest.raises(error, match=message):
        train(make_model(), source, config())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: x, r"must return a scalar tensor with a gradient, got \(3, 5, 7\)"),
        (lambda x: x.mean().detach(), r"must return a scalar tensor with a gradient, got \(\)"),
        (lambda x: 0.5, "must return a scalar tensor with a gradient, got float"),
    ],
)
def test_a_model_without_a_scalar_loss_is_refused(data, loss, message):
    class Wrong(nn.Embedding):
        def forward(self, tokens, return_type):
            return loss(super().forward(tokens))

    with pytest.raises(TypeError, match=message):
        train(Wrong(13, 7), data, config())


def test_the_progress_bar_shows_loss_speed_and_time_left(make_model, data, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = {}
    for value in ("1", "0"):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("SMEARLENS_PROGRESS", value)
        result = train(make_model(), data, config())
        shown[value] = sys.stderr.getvalue()
    assert f"loss {result.log('metrics')[-1]['loss']:.4f}" in shown["1"]
    assert "tokens/s" in shown["1"]
    assert "12/12" in shown["1"]
    assert shown["0"] == ""


def test_the_environment_does_not_scale_gradients(make_model, data, monkeypatch):
    norms = []
    for steps in (None, "4"):
        if steps:
            monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        norms.append(
            [row["grad_norm"] for row in train(make_model(), data, config()).log("metrics")]
        )
    assert norms[0] == norms[1]
