"""A nan or inf stops training before it reaches the weights, and its origin is named."""

import math
import pickle

import pytest
import torch
from torch import nn

from smearlens.data.batches import TokenBatches
from smearlens.models.conv_attn import ConvAttn, ConvAttnConfig
from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.nonfinite import NonFiniteError
from smearlens.training.update import Updater, make_accelerator

CONFIG = TrainConfig(steps=12, lr=0.01, checkpoint_every=2, accumulation=2)


class Scaled:
    """Counts forward passes through `module` and multiplies its output by `factor` from `since`."""

    def __init__(self, module, factor, since, until=math.inf):
        self.calls, self.factor, self.since, self.until = 0, factor, since, until
        module.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        self.calls += 1
        return output * self.factor if self.since < self.calls <= self.until else output


def test_the_first_bad_layer_is_named_with_step_and_checkpoint(make_model, data, tmp_path):
    model = make_model()
    Scaled(model.up, math.inf, since=10)  # two passes per update: in update 5
    with pytest.raises(NonFiniteError) as raised:
        train(model, data, CONFIG, out=tmp_path)
    error = raised.value
    assert (error.step, error.layer, error.checkpoint.name) == (5, "up", "step-000004")
    assert [len(module._forward_hooks) for module in (model.embed, model.up)] == [0, 1]
    assert math.isnan(error.loss)
    message = str(error)
    for part in ("step 5: loss nan", "first bad layer 'up'", "step-000004", "skip_nonfinite=n"):
        assert part in message
    assert all(p.isfinite().all() for p in model.parameters())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert str(pickle.loads(pickle.dumps(error))).startswith("step 5: loss nan")
    with pytest.raises(
        NonFiniteError, match="step 4: "
    ):  # resumes at 4; the hook is past its count
        train(model, data, CONFIG, out=tmp_path)


def test_a_bad_parameter_is_named(make_model, data):
    model = make_model()
    model.norm.weight.data[3] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"first bad layer 'norm', first bad parameter 'norm.we"
    ):
        train(model, data, CONFIG)


def test_a_bad_parameter_is_named_although_the_model_could_not_be_saved(tmp_path):
    """The first checkpoint holds it: what is wrong comes from the update, which knows the place."""
    model = ConvAttn(ConvAttnConfig(d_vocab=13, d_model=8, n_heads=2, kernel_size=3, n_ctx=7))
    model.unembed.weight.data[3] = math.nan
    data = TokenBatches(torch.arange(13), batch_size=3, length=5, seed=0)
    with pytest.raises(NonFiniteError, match=r"first bad parameter 'unembed.weight'"):
        train(model, data, CONFIG, out=tmp_path)


class RootAtZero(nn.Linear):
    """A finite loss whose gradient is not: the square root at 0."""

    def forward(self, x, return_type):
        return (super().forward(x) * 0).sqrt().mean()


class Zeros:
    def batch(self, step):
        return {"x": torch.zeros(2, 3)}


def test_a_bad_gradient_is_named_with_its_operation():
    model = RootAtZero(3, 5)
    with pytest.raises(NonFiniteError) as raised:
        train(model, Zeros(), CONFIG)
    error = raised.value
    assert (error.step, error.loss, error.layer) == (0, 0.0, None)
    assert error.parameter == "bias"  # behind the weight, so nearer to the loss
    assert not math.isfinite(error.grad_norm)
    assert "MulBackward0" in error.operation or "SqrtBackward0" in error.operation
    assert "gradient norm nan" in str(error)
    assert error.checkpoint is None


@pytest.mark.parametrize("hook", ["hook_q", "hook_attn_scores", "hook_z"])
def test_a_hook_of_a_model_is_named(hook):
    """And not the scores, which are -inf where masked, for what goes wrong behind them."""
    torch.manual_seed(0)
    sizes = ConvAttnConfig(d_vocab=13, d_model=8, n_heads=2, kernel_size=3, n_ctx=7)
    model = ConvAttn(sizes)
    model.add_hook(f"blocks.0.attn.{hook}", lambda value, hook: value / 0)
    tokens = torch.randint(13, (3, 7))

    class Same:
        def batch(self, step):
            return {"tokens": tokens}

    with pytest.raises(NonFiniteError) as raised:
        train(model, Same(), CONFIG)
    assert raised.value.layer == f"blocks.0.attn.{hook}"


def test_some_updates_may_be_left_out(make_model, data):
    model = make_model()
    Scaled(model.up, math.nan, since=6, until=10)  # in updates 3 and 4
    config = TrainConfig(steps=12, lr=0.01, accumulation=2, skip_nonfinite=2)
    rows = train(model, data, config).log("metrics")
    assert [row["step"] for row in rows if row.get("skipped")] == [3, 4]
    assert [row["loss"] for row in rows[3:5]] == [None, None]
    assert all(p.isfinite().all() for p in model.parameters())
    strict = make_model()
    Scaled(strict.up, math.nan, since=6, until=10)
    with pytest.raises(NonFiniteError, match="step 4: "):
        train(strict, data, TrainConfig(steps=12, accumulation=2, skip_nonfinite=1))


class NanAt:
    """Ones, but nan in the batches of some steps."""

    def __init__(self, *steps):
        self.steps = steps

    def batch(self, step):
        return {"x": torch.full((2, 3), math.nan if step in self.steps else 1.0)}


class MeanOutput(nn.Linear):
    def forward(self, x, return_type):
        return super().forward(x).mean()


def test_updates_left_out_are_counted_across_a_resumption(tmp_path):
    config = TrainConfig(steps=12, checkpoint_every=4, skip_nonfinite=1)
    for _ in range(2):  # the second time from the checkpoint between the two
        with pytest.raises(NonFiniteError, match="step 9: "):
            train(MeanOutput(3, 5), NanAt(2, 9), config, out=tmp_path)


class OneOverDropout(nn.Module):
    """Infinite whenever dropout hits its single number."""

    def __init__(self):
        super().__init__()
        self.drop, self.inverse, self.weight = (
            nn.Dropout(0.1),
            Inverse(),
            nn.Parameter(torch.ones(1)),
        )

    def forward(self, x, return_type):
        return (self.inverse(self.drop(x[:1, 0])) * self.weight).mean()


class Inverse(nn.Module):
    def forward(self, x):
        return 1 / x


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_search_sees_the_same_dropout(seed):
    with pytest.raises(NonFiniteError) as raised:
        train(OneOverDropout(), NanAt(), TrainConfig(steps=200, seed=seed))
    assert raised.value.layer == "inverse"


def test_gradients_that_no_scale_can_save_are_an_error():
    config = TrainConfig(steps=30)
    accelerator = make_accelerator(config)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    updater = Updater(RootAtZero(3, 5), Zeros(), config, accelerator)
    for step in range(3):
        assert updater.update(step, 0.01, lambda loss: None)["skipped"]
    with pytest.raises(NonFiniteError, match="step 3: "):
        updater.update(3, 0.01, lambda loss: None)


def test_gradient_scaling_leaves_overflowing_updates_out_and_goes_on(make_model, data):
    """What fp16 does on a GPU, with a scaler on the CPU: its first scales are far too large."""
    config = TrainConfig(steps=30, lr=0.01)
    accelerator = make_accelerator(config)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaled, plain = make_model(dropout=0.0), make_model(dropout=0.0)
    for model in (scaled, plain):
        model.register_forward_hook(lambda module, inputs, loss: loss * 1000)
    updater = Updater(scaled, data, config, accelerator)
    rows = [updater.update(step, 0.01, lambda loss: None) for step in range(30)]
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert 0 < len(skipped) < 25
    assert skipped[0] == 0
    assert updater.skipped == 0  # these are no errors
    reference = Updater(plain, data, config, make_accelerator(config))
    for step in sorted(set(range(30)) - set(skipped)):
        row = reference.update(step, 0.01, lambda loss: None)
        assert rows[step] == pytest.approx(row, rel=1e-4)
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
