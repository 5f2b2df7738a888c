"""Interventions and audits of models, metrics and modules that are not the library's own."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from smearlens import (
    AttnAttn,
    AttnAttnConfig,
    Component,
    ConvAttn,
    ConvAttnConfig,
    HookedModel,
    HookPoint,
    ablate,
    attribution,
    audit,
    cut_convolution,
    keep_lags,
    patch_activation,
    role_without_lags,
)
from smearlens.causal.leaks import iid_floor

SIZES = {"d_vocab": 11, "d_model": 8, "n_heads": 2, "n_ctx": 12}
TOKENS, OTHER = torch.randint(11, (2, 5, 9), generator=torch.Generator().manual_seed(0))


def seeded():
    return torch.Generator().manual_seed(1)


def last_loss(logits, tokens):
    return nn.functional.cross_entropy(logits[:, -2], tokens[:, -1], reduction="none")


@dataclasses.dataclass(frozen=True)
class Config:
    d_vocab: int = 11
    n_ctx: int = 12


class Embedding(HookedModel):
    """The next token from this one alone; `forward` of a subclass spoils it."""

    config_class = Config

    def __init__(self, config=None):
        super().__init__(config or Config())
        self.embed, self.unembed = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.hook_embed = HookPoint()
        self.setup()

    def logits(self, tokens):
        return self.unembed(self.hook_embed(self.embed(tokens)))


class Forgetful(Embedding):
    def forward(self, tokens):
        return nn.functional.dropout(self.logits(tokens), 0.1)  # in eval mode too


class Counting(Embedding):
    calls = 0

    def forward(self, tokens):
        self.calls += 1
        return self.logits(tokens) * (1 + 1e-3 * self.calls)


class Inner(nn.Module):
    def __init__(self, outer):
        super().__init__()
        self.logits = outer.logits

    def forward(self, tokens, scale=1.0):
        return scale * self.logits(tokens)


class HandingOn(Embedding):
    def forward(self, tokens, **options):
        return Inner(self)(tokens, **options)


@pytest.mark.parametrize("kind", [Forgetful, Counting])
def test_a_model_that_does_not_repeat_itself_is_no_leak(kind):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"two runs of this {kind.__name__}.*F.dropout"):
        audit(kind())


def test_options_that_are_handed_on_need_not_know_a_state():
    torch.manual_seed(0)
    report = audit(HandingOn())
    assert report.passed
    assert report.streaming is None


# Frozen, and in inference mode -----------------------------------------------------------------


def test_a_frozen_model_is_audited_like_any_other():
    torch.manual_seed(0)
    model = ConvAttn(ConvAttnConfig(**SIZES, causal=False))
    expected = iid_floor(model, 9, steps=3, generator=seeded())
    model.embed.requires_grad_(False)
    assert iid_floor(model, 9, steps=3, generator=seeded()) == expected
    model.requires_grad_(False)
    assert iid_floor(model, 9, steps=3, generator=seeded()) == expected
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("model", ["conv", "attn"])
def test_an_audit_in_inference_mode_finds_the_same(model):
    torch.manual_seed(0)
    made = {
        "conv": lambda: ConvAttn(ConvAttnConfig(**SIZES, causal=False)),
        "attn": lambda: AttnAttn(AttnAttnConfig(**SIZES)),
    }[model]()
    expected = audit(made, TOKENS)
    with torch.inference_mode():
        found = audit(made, TOKENS)
    assert found.future == expected.future
    assert (expected.future.jacobian > 0) == (model == "conv")


# Convolutions of one's own ---------------------------------------------------------------------


class PlainConv(nn.Module):
    """What a page of the documentation asks for, and no more."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, generator=seeded()))
        self.hook_in, self.hook_kernel, self.hook_out = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x):
        x, kernel = self.hook_in(x), self.hook_kernel(self.weight)
        padded = nn.functional.pad(x, (0, 0, 2, 0))
        taps = [padded[:, 2 - lag : 2 - lag + x.shape[1]] * kernel[:, lag] for lag in range(3)]
        return self.hook_out(sum(taps))


class OwnConv(Embedding):
    def __init__(self, config=None):
        super().__init__(config)
        self.conv = PlainConv()
        self.setup()

    def forward(self, tokens):
        return self.unembed(self.conv(self.hook_embed(self.embed(tokens))))


def test_a_convolution_says_what_it_lacks_and_then_is_cut():
    torch.manual_seed(0)
    model = OwnConv().eval()
    with pytest.raises(ValueError, match=r"a module with `lags`"):
        keep_lags(model, "conv", [0])
    with pytest.raises(ValueError, match=r"'conv' lacks \['lags', 'bias'\]"):
        cut_convolution(model, 4)
    model.conv.lags, model.conv.bias = [0, 1, 2], None
    found = model.run_with_hooks(TOKENS, fwd_hooks=keep_lags(model, "conv", [0]))
    cut = model.run_with_hooks(TOKENS, fwd_hooks=cut_convolution(model, 4))
    whole = model(TOKENS)
    torch.testing.assert_close(cut[:, :5], whole[:, :5])
    with torch.no_grad():
        embedded = model.embed(TOKENS)
        embedded[:, :4] = 0
        torch.testing.assert_close(cut[:, 5:], model.unembed(model.conv(embedded))[:, 5:])
        model.conv.weight[:, 1:] = 0
    torch.testing.assert_close(found, model(TOKENS))


# Metrics that count ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3)).eval()


@pytest.mark.parametrize("kind", [torch.bool, torch.int32])
def test_hits_and_counts_are_metrics_too(model, kind):
    def hit(logits, tokens):
        return logits[:, -2].argmax(-1) == tokens[:, -1]

    def given(to):
        return {"metric": lambda logits, tokens: hit(logits, tokens).to(to)}

    for run in (
        lambda m: ablate(model, TOKENS, "blocks.0.attn.hook_z", generator=seeded(), **m),
        lambda m: role_without_lags(model, TOKENS, "k", generator=seeded(), **m),
        lambda m: patch_activation(model, TOKENS, OTHER, "blocks.0.attn.hook_z", **m),
    ):
        expected, found = run(given(torch.float64)), run(given(kind))
        for field in dataclasses.fields(expected):
            one, other = getattr(expected, field.name), getattr(found, field.name)
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other, equal_nan=True)


def test_attribution_to_masked_scores_is_the_slope(model):
    model = copy.deepcopy(model).double()
    name = "blocks.0.attn.hook_attn_scores"
    found = attribution(model, TOKENS, OTHER, [name], metric=last_loss)[name]
    clean, start = (model.run_with_cache(t)[1][name] for t in (TOKENS, OTHER))
    change = torch.where(start.isfinite(), clean - start, 0)

    def along(step):
        moved = [(name, lambda scores, hook: scores + step * change)]
        return last_loss(model.run_with_hooks(OTHER, fwd_hooks=moved), TOKENS)

    slope = (along(1e-5) - along(-1e-5)) / 2e-5
    assert found.abs().max() > 1e-4
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-9)


def test_one_lost_value_leaves_no_interval(model):
    found = patch_activation(model, TOKENS, OTHER, "blocks.0.attn.hook_z", metric=last_loss)
    clear = dataclasses.replace(found, clean=found.corrupt + 5 + 0.01 * torch.arange(5))
    assert all(map(math.isfinite, clear.interval()))
    patched = clear.patched.clone()
    patched[2] = math.nan
    lost = dataclasses.replace(clear, patched=patched)
    assert math.isnan(lost.recovered)
    assert all(map(math.isnan, lost.interval()))


def test_units_are_indices_each_once():
    import numpy as np

    assert Component("blocks.0.attn.hook_z", (np.int64(1), torch.tensor(0))).units == (1, 0)
    with pytest.raises(ValueError, match="units must differ"):
        Component("blocks.0.attn.hook_z", (1, 1))
    with pytest.raises(ValueError, match="some indices"):
        Component("blocks.0.attn.hook_z", (0.5,))
