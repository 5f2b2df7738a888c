"""How models are run: in eval mode, undone module by module; scored example by example."""

import re

import pytest
import torch
from torch import nn

from smearlens import (
    ConvAttn,
    ConvAttnConfig,
    Mamba,
    MambaConfig,
    ablate,
    attribution,
    audit,
    freeze_delta,
    induction_accuracy,
    induction_loss,
    patch_activation,
    patch_path,
    read_states,
    repeated_tokens,
    role_without_lags,
    state_patch,
)
from smearlens._hooks import HookedRootModule, HookPoint
from smearlens.causal.audit import count_targets
from smearlens.causal.lags import exchange_lags
from smearlens.causal.leaks import iid_floor, reads_future, streaming_gap
from smearlens.causal.running import activations, measure_with, observed

SIZES = {"d_vocab": 13, "d_model": 12, "n_heads": 3, "n_ctx": 17, "dropout": 0.5}
K, Z = "blocks.0.attn.hook_k", "blocks.0.attn.hook_z"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clean():
    return repeated_tokens(5, 3, 11, 13, generator=seeded(1))


def corrupt():
    return repeated_tokens(5, 4, 11, 13, generator=seeded(2))


def models():
    torch.manual_seed(0)
    conv = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3))
    sizes = {"d_vocab": 13, "d_model": 6, "n_layers": 1, "n_ctx": 17, "d_state": 5}
    return {"conv": conv, "ssm": Mamba(MambaConfig(**sizes, dropout=0.5))}


CALLS = {  # what each says of a model, as something that can be compared
    "ablate": lambda m: repr(ablate(m["conv"], clean(), Z, how="resample", generator=seeded())),
    "measure_with": lambda m: measure_with(m["conv"], clean(), [], induction_loss).tolist(),
    "role_without_lags": lambda m: repr(
        role_without_lags(m["conv"], clean(), "k", metric=induction_loss, generator=seeded())
    ),
    "exchange_lags": lambda m: [
        hook(None, None).tolist() for _, hook in exchange_lags(m["conv"], clean(), corrupt(), "qv")
    ],
    "patch_activation": lambda m: patch_activation(
        m["conv"], clean(), corrupt(), Z, metric=induction_loss
    ).patched.tolist(),
    "patch_path": lambda m: patch_path(
        m["conv"], clean(), corrupt(), "blocks.0.conv.hook_out", K, metric=induction_loss
    ).patched.tolist(),
    "attribution": lambda m: attribution(m["conv"], clean(), corrupt(), K, metric=induction_loss)[
        K
    ].tolist(),
    "state_patch": lambda m: state_patch(
        m["ssm"], clean(), corrupt(), donor=5, metric=induction_loss
    ).patched.tolist(),
    "read_states": lambda m: read_states(m["ssm"], clean(), 5)["blocks.0.ssm"].tolist(),
    "freeze_delta": lambda m: [
        hook(torch.zeros(5, 11, 12), None).tolist() for _, hook in freeze_delta(m["ssm"], clean())
    ],
    "audit": lambda m: audit(m["conv"], clean(), length=5).to_dict(),
    "count_targets": lambda m: count_targets(m["conv"], clean()),
    "reads_future": lambda m: reads_future(m["conv"], clean(), generator=seeded()),
    "iid_floor": lambda m: iid_floor(m["conv"], 5, generator=seeded()),
    "streaming_gap": lambda m: streaming_gap(m["conv"], clean()),
}


HALF = {"ablate", "role_without_lags", "exchange_lags", "patch_activation", "patch_path",
        "attribution", "state_patch", "read_states", "freeze_delta", "audit"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HALF))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_enough(name, dtype):
    CALLS[name]({key: model.to(dtype) for key, model in models().items()})


@pytest.mark.parametrize("how", ["zero", "mean", "mean_by_position", "resample"])
def test_ablations_in_half_precision_are_those_in_single(how):
    m, half = models()["conv"], models()["conv"].bfloat16()
    name, given = "blocks.0.attn.hook_attn_scores", {"how": how, "metric": induction_loss}
    found = ablate(half, clean(), name, **given, generator=seeded())
    expected = ablate(m, clean(), name, **given, generator=seeded())
    torch.testing.assert_close(found.changed, expected.changed, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", CALLS)
def test_dropout_is_off_and_then_as_it_was_in_every_module(name):
    found, expected = models(), models()
    for model in found.values():
        model.train()
        model.drop.eval()  # frozen
    for model in expected.values():
        model.eval()
    modes = {key: [m.training for m in model.modules()] for key, model in found.items()}
    assert CALLS[name](found) == CALLS[name](expected)
    for key, model in found.items():
        assert [m.training for m in model.modules()] == modes[key]


def test_the_modes_are_put_back_after_a_failure():
    model = models()["conv"].train()
    model.drop.eval()
    with pytest.raises(ValueError, match="n_ctx"):
        ablate(model, torch.zeros(2, 18, dtype=torch.long), Z, generator=seeded())
    assert [m.training for m in model.modules()].count(False) == 1
    assert not model.drop.training


def test_what_is_observed_records_no_gradients():
    def look(model, x):
        assert not model.training
        return model(x)

    model = nn.Linear(3, 2).train()
    assert not observed(look)(model, torch.ones(3)).requires_grad
    assert not observed(look)(model=model, x=torch.ones(3)).requires_grad
    assert model.training
    assert observed(lambda x: x + 1)(2) == 3


METRICS = {
    "the mean": (lambda logits, tokens: induction_loss(logits, tokens).mean(), "torch.float64 []"),
    "a float": (lambda logits, tokens: 0.5, "0.5"),
    "by position": (lambda logits, tokens: logits[:, :, 0], "torch.float32 [5, 11]"),
    "one too few": (lambda logits, tokens: logits[1:, 0, 0], "torch.float32 [4]"),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_one_number_per_example(name):
    metric, shown = METRICS[name]
    m = models()
    message = "metric must return one number per example, a tensor of shape [5], got " + shown
    for call in (
        lambda: ablate(m["conv"], clean(), Z, metric=metric, generator=seeded()),
        lambda: role_without_lags(m["conv"], clean(), "k", metric=metric, generator=seeded()),
        lambda: patch_activation(m["conv"], clean(), corrupt(), Z, metric=metric),
        lambda: patch_path(m["conv"], clean(), corrupt(), K, Z, metric=metric),
        lambda: attribution(m["conv"], clean(), corrupt(), [K], metric=metric),
        lambda: state_patch(m["ssm"], clean(), corrupt(), donor=3, metric=metric),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_a_metric_to_attribute_has_a_gradient():
    message = "metric must be differentiable, such as a logit difference or induction_loss"
    with pytest.raises(ValueError, match=message):
        attribution(models()["conv"], clean(), corrupt(), [K], metric=induction_accuracy)


class Plain(HookedRootModule):
    """No `HookedModel`: an embedding that is passed on, beside a point that nothing passes."""

    def __init__(self):
        super().__init__()
        self.embed, self.hook_embed, self.hook_idle = nn.Embedding(13, 13), HookPoint(), HookPoint()
        self.setup()

    def forward(self, tokens):
        return self.hook_embed(self.embed(tokens))


def test_a_hook_that_does_not_exist_is_named_whatever_the_model():
    message = r"no hook 'hook_embd' in Plain; nearest: \['hook_embed'"
    for call in (
        lambda m: ablate(m, clean(), "hook_embd", generator=seeded()),
        lambda m: patch_activation(m, clean(), corrupt(), "hook_embd", metric=induction_loss),
        lambda m: patch_path(m, clean(), corrupt(), "hook_embd", "x", metric=induction_loss),
        lambda m: attribution(m, clean(), corrupt(), "hook_embd", metric=induction_loss),
    ):
        with pytest.raises(ValueError, match=message):
            call(Plain())


def test_interventions_run_on_any_model_with_hooks():
    model = Plain()
    whole = patch_activation(model, clean(), corrupt(), "hook_embed", metric=induction_loss)
    torch.testing.assert_close(whole.patched, whole.clean)
    effect = ablate(
        model, clean(), "hook_embed", metric=lambda o, t: o[:, 2, 1], generator=seeded()
    )
    assert effect.changed.tolist() == [0] * 5


def test_a_hook_that_nothing_passes_is_named():
    message = r"nothing passed the hooks \['hook_idle'\] of this Plain"
    with pytest.raises(ValueError, match=message):
        activations(Plain(), clean(), ["hook_embed", "hook_idle"])
    with pytest.raises(ValueError, match=message):
        ablate(Plain(), clean(), "hook_idle", generator=seeded())


def test_activations_come_in_the_order_of_computation():
    names = [Z, "hook_embed", K]
    assert list(activations(models()["conv"], clean(), names)) == ["hook_embed", K, Z]
