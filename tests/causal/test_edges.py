"""Corners of audits and interventions: what is reported, one example, no spread, no training."""

import math

import pytest
import torch

from smearlens import (
    AttnAttn,
    AttnAttnConfig,
    ConvAttn,
    ConvAttnConfig,
    Mamba,
    MambaConfig,
    audit,
    repeated_tokens,
)
from smearlens._hooks import HookedRootModule, HookPoint
from smearlens.causal.ablate import Component, Effect, ablate
from smearlens.causal.lags import present_only, role_without_lags
from smearlens.causal.leaks import ROUNDING, FutureRead, IidFloor, iid_floor, reads_future
from smearlens.causal.patch import Recovery, patch_activation, patch_path
from smearlens.data.synthetic import iid_tokens

SIZES = {"d_vocab": 13, "d_model": 12, "n_heads": 3, "n_ctx": 17}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model():
    return ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, residual=True)).eval()


def last(logits, tokens):
    return logits[:, -1, 0]


# Leaks -------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_stands_on_the_floor_and_not_below(model):
    with torch.no_grad():
        model.unembed.weight.zero_()
    found = iid_floor(model, 11, generator=seeded())
    assert found.floor == pytest.approx(math.log(13))
    assert found.loss == pytest.approx(math.log(13), abs=1e-5)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert (found.trained_loss, found.trained_error, found.steps) == (None, None, 0)
    assert not found.broken


def test_the_error_is_that_of_a_mean_over_examples(model):
    found = iid_floor(model, 11, generator=seeded(3))
    tokens = iid_tokens(256, 11, 13, generator=seeded(3))
    with torch.no_grad():
        logits = model(tokens)[:, :-1].double().log_softmax(-1)
    losses = -logits.gather(-1, tokens[:, 1:, None])[..., 0].mean(1)
    assert found.loss == pytest.approx(float(losses.mean()), abs=1e-5)
    assert found.error == pytest.approx(float(losses.std()) / 16, rel=1e-3)


def test_training_happens_on_a_copy_and_is_reported(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = iid_floor(model, 7, steps=2, generator=seeded())
    assert found.steps == 2
    assert found.trained_loss is not None
    assert found.trained_loss != found.loss
    assert found.trained_error is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(
    ("loss", "trained", "broken"),
    [(2.0, None, False), (1.69, None, True), (1.71, None, False), (2.0, 1.69, True),
     (2.0, 1.71, False), (1.69, 2.0, True)],
)  # fmt: skip
def test_three_standard_errors_below_the_floor_is_broken(loss, trained, broken):
    error = None if trained is None else 0.1
    assert IidFloor(2.0, loss, 0.1, trained, error).broken is broken


def test_three_standard_errors_of_either_loss_count_apart():
    assert not IidFloor(2.0, 2.0, 0.0, 1.9, 0.1).broken
    assert IidFloor(2.0, 1.9, 0.0, 2.0, 0.1).broken
    assert not IidFloor(2.0, 2.0, 0.0, 1.0, None).broken  # a loss without its error shows nothing


def test_the_least_loss_that_passes():
    """It lies three errors, and what rounds, below the floor."""
    least = 2.0 - ROUNDING - 3 * 0.25
    for loss, broken in ((least, False), (math.nextafter(least, 0), True)):
        assert IidFloor(2.0, loss, 0.25).broken is broken
        assert IidFloor(2.0, 2.0, 0.25, loss, 0.25, 7).broken is broken


@pytest.mark.parametrize(
    ("influence", "jacobian", "leaks"), [(0.1, 0.1, False), (0.2, 0.0, True), (0.0, 0.2, True)]
)
def test_a_leak_is_above_the_tolerance(influence, jacobian, leaks):
    assert FutureRead([0.0, influence], [0, 1], jacobian, 0.1, None).leaks is leaks


def test_the_influence_of_a_cut_is_what_later_tokens_change():
    leaky = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, causal=False)).eval()
    tokens = iid_tokens(3, 7, 13, generator=seeded(2))
    found = reads_future(leaky, tokens, generator=seeded(5))
    other = iid_tokens(3, 7, 13, generator=seeded(5))
    with torch.no_grad():
        for cut in found.cuts:
            changed = tokens.clone()
            changed[:, cut + 1 :] = other[:, cut + 1 :]
            moved = (leaky(changed) - leaky(tokens))[:, : cut + 1].abs().max()
            assert found.influence[cut] == pytest.approx(float(moved), abs=1e-6)


def test_a_leak_into_one_channel_is_located():
    model = AttnAttn(AttnAttnConfig(**SIZES, n_layers=2)).eval()
    last_channel = torch.zeros(12)
    last_channel[-1] = 1
    name = "blocks.1.hook_attn_out"
    model.add_hook(name, lambda x, hook: x + x.roll(-1, 1) * last_channel)
    assert audit(model, length=9).future.first_leak == name


# Audit -------------------------------------------------------------------------------------------


def test_an_audit_repeats_and_says_what_it_did_not_check(model):
    found, again = audit(model, length=9), audit(model, length=9, generator=seeded(0))
    assert found.to_dict() == again.to_dict()
    assert found.future.cuts == list(range(8))
    assert "not checked: pass tokens (and loss_mask)" in repr(found)
    assert "after" not in repr(found)
    assert found.iid.trained_loss is None


def test_an_audit_of_tokens_shows_accuracy_and_pads(model):
    tokens = repeated_tokens(4, 3, 11, 13, generator=seeded())
    whole = repr(audit(model, tokens, length=9))
    assert "on 40 real targets" in whole
    assert "pads" not in whole
    mask = torch.arange(11).expand(4, -1) < 8
    padded = audit(model, tokens, loss_mask=mask, length=9, floor_steps=1)
    assert "on 28 real targets" in repr(padded)
    assert "pads               30.0% of the targets" in repr(padded)
    assert "after 1 steps on such tokens" in repr(padded)
    assert padded.passed
    assert not padded.findings


@pytest.mark.parametrize("length", [2, 18])
def test_a_length_that_does_not_fit_is_refused(model, length):
    with pytest.raises(ValueError, match=r"length must be in 3\.\.n_ctx=17, got"):
        audit(model, length=length)
    assert audit(model, length=3).future.cuts == [0, 1]


def test_an_audit_leaves_the_mode_of_the_model(model):
    for training in (True, False):
        model.train(training)
        audit(model, length=5)
        assert model.training is training


# Effects -----------------------------------------------------------------------------------------


def test_an_effect_in_numbers():
    clean, changed = torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 2, 1])
    controls = torch.tensor([[1.0, 1, 3], [1, 2, 0]])
    effect = Effect("x", clean, changed, controls)
    assert effect.values.tolist() == [-1, 0, -2]
    assert effect.mean() == -1
    assert effect.control == pytest.approx(-4 / 6)
    low, high = effect.interval()
    assert -2 <= low < -1 < high <= 0
    assert "x: 2.000 -> 1.000 (effect -1.000 [" in repr(effect)
    assert "control -0.667" in repr(effect)
    assert math.isnan(Effect("x", clean, changed).control)


def test_controls_come_from_the_generator_alone(model):
    tokens = repeated_tokens(4, 3, 11, 13, generator=seeded())
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        swapped = role_without_lags(model, tokens, "k", metric=last, generator=seeded(7))
        resampled = ablate(
            model, tokens, Component("blocks.0.attn.hook_z", (1,)), how="resample", metric=last,
            generator=seeded(7),
        )  # fmt: skip
        assert swapped.controls is not None
        assert len(swapped.controls) == 3
        assert resampled.controls is not None
        assert len(resampled.controls) == 5
        found.append((swapped.controls, resampled.controls, resampled.changed))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_controls_of_a_role_are_moved_as_far_as_the_role():
    """Where lags change nothing, nothing is moved: the controls are the clean run."""
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, residual=True)).eval()
    with torch.no_grad():
        model.blocks[0].conv.weight[:, 1:] = 0
    tokens = repeated_tokens(4, 3, 11, 13, generator=seeded())
    effect = role_without_lags(model, tokens, "qk", metric=last, generator=seeded())
    torch.testing.assert_close(effect.changed, effect.clean)
    torch.testing.assert_close(effect.controls, effect.clean.expand(3, -1))


@pytest.mark.parametrize("units", [(3,), (-1, 0)])
def test_units_that_do_not_exist_are_refused(model, units):
    tokens = repeated_tokens(2, 3, 11, 13, generator=seeded())
    component = Component("blocks.0.attn.hook_z", units)
    with pytest.raises(ValueError, match=r"of blocks.0.attn.hook_z: allowed are 0\.\.2"):
        ablate(model, tokens, component, metric=last, generator=seeded())


def test_there_is_no_control_for_more_than_half_of_the_units(model):
    tokens = repeated_tokens(2, 3, 11, 13, generator=seeded())
    for units, some in (((0,), True), ((0, 2), False), (None, False)):
        component = Component("blocks.0.attn.hook_z", units)
        effect = ablate(model, tokens, component, metric=last, generator=seeded())
        assert (effect.controls is not None) is some


def test_the_axis_of_a_component():
    axes = {"hook_pattern": 1, "hook_attn_scores": 1, "hook_q": 2, "hook_k": 2, "hook_v": 2,
            "hook_z": 2, "hook_resid_post": -1, "hook_out": -1}  # fmt: skip
    assert {point: Component(f"blocks.0.x.{point}").axis for point in axes} == axes


# Recovery ----------------------------------------------------------------------------------------


def recovery(gaps, patched):
    zero = torch.zeros(len(gaps), dtype=torch.float64)
    clean, moved = (torch.tensor(x, dtype=torch.float64) for x in (gaps, patched))
    return Recovery("x", clean + 5, zero + 5, moved + 5, zero + 5)


def test_a_recovery_in_numbers():
    found = recovery([4.0, 3, 5], [2.0, 1, 3])
    assert found.defined
    assert found.recovered == pytest.approx(0.5)
    assert found.control_recovered == 0
    low, high = found.interval()
    assert 0.25 <= low < 0.5 < high <= 0.75
    assert "x: recovered 0.500 [" in repr(found)


@pytest.mark.parametrize(
    ("gaps", "defined"),
    [([3.0, 1.0], False), ([3.0, 1.1], True), ([-3.0, -1.1], True), ([0.0, 0.0], False),
     ([2.0], False)],
)  # fmt: skip
def test_a_recovery_is_defined_where_the_gap_is_more_than_twice_its_error(gaps, defined):
    found = recovery(gaps, [0.0] * len(gaps))
    assert found.defined is defined
    assert math.isnan(found.recovered) is not defined
    if len(gaps) > 1:
        assert math.isnan(found.interval()[0]) is not defined


def test_the_control_of_a_patch_is_another_clean_example():
    model = AttnAttn(AttnAttnConfig(**SIZES, n_layers=2)).eval()
    clean, corrupt = (iid_tokens(3, 7, 13, generator=seeded(s)) for s in (1, 2))
    name = "blocks.0.hook_resid_post"
    found = patch_activation(model, clean, corrupt, name, metric=last)
    _, cache = model.run_with_cache(clean)
    moved = cache[name].roll(1, 0)
    with torch.no_grad():
        other = model.run_with_hooks(corrupt, fwd_hooks=[(name, lambda t, hook: moved)])
    torch.testing.assert_close(found.control, other[:, -1, 0])
    torch.testing.assert_close(found.patched, found.clean)
    with torch.no_grad():
        torch.testing.assert_close(found.clean, model(clean)[:, -1, 0])
        torch.testing.assert_close(found.corrupt, model(corrupt)[:, -1, 0])


def test_an_interval_narrows_with_its_level():
    found = recovery([4.0, 3, 5, 4, 6], [2.0, 1, 3, 0, 4])
    wide, narrow = found.interval(), found.interval(0.5)
    assert wide[0] < narrow[0] < found.recovered < narrow[1] < wide[1]
    effect = Effect("x", torch.zeros(5), torch.tensor([2.0, 1, 3, 0, 4]))
    wide, narrow = effect.interval(), effect.interval(0.5)
    assert wide[0] < narrow[0] < effect.mean() < narrow[1] < wide[1]


def test_the_control_of_a_path_is_another_clean_example():
    model = AttnAttn(AttnAttnConfig(**SIZES, n_layers=2)).eval()
    clean, corrupt = (iid_tokens(3, 7, 13, generator=seeded(s)) for s in (1, 2))
    sender, receiver = "blocks.0.hook_resid_post", "blocks.1.attn.hook_v"
    found = patch_path(model, clean, corrupt, sender, receiver, metric=last)
    with torch.no_grad():
        torch.testing.assert_close(found.clean, model(clean)[:, -1, 0])
        torch.testing.assert_close(found.corrupt, model(corrupt)[:, -1, 0])
    for shift, expected in ((0, found.patched), (1, found.control)):
        moved = model.run_with_cache(clean)[1][sender].roll(shift, 0)
        with model.hooks([(sender, lambda t, hook, moved=moved: moved)]):
            told = model.run_with_cache(corrupt)[1][receiver]
        with torch.no_grad():
            logits = model.run_with_hooks(
                corrupt, fwd_hooks=[(receiver, lambda t, hook, v=told: v)]
            )
        torch.testing.assert_close(expected, logits[:, -1, 0])


@pytest.mark.parametrize("point", ["hook_pattern", "hook_z"])
def test_a_mean_is_over_examples_and_for_activations_over_positions(model, point):
    tokens, name = repeated_tokens(4, 3, 11, 13, generator=seeded()), f"blocks.0.attn.{point}"
    stored = model.run_with_cache(tokens)[1][name]
    mean = stored.mean((0,) if point == "hook_pattern" else (0, 1), keepdim=True)
    found = ablate(model, tokens, name, how="mean", metric=last, generator=seeded())
    with torch.no_grad():
        edited = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: mean.expand_as(t))])
    torch.testing.assert_close(found.changed, edited[:, -1, 0])


def test_the_mean_score_of_one_example_is_its_score(model):
    tokens, name = (
        repeated_tokens(4, 3, 11, 13, generator=seeded()),
        "blocks.0.attn.hook_attn_scores",
    )
    one = repeated_tokens(1, 3, 11, 13, generator=seeded(1))
    stored = model.run_with_cache(one)[1][name]
    with torch.no_grad():
        edited = model.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda t, hook: stored.expand_as(t))]
        )
    for how in ("mean", "mean_by_position"):
        given = {"how": how, "reference": one, "metric": last, "generator": seeded()}
        torch.testing.assert_close(ablate(model, tokens, name, **given).changed, edited[:, -1, 0])


class Hiding(HookedRootModule):
    """Sums scores of 1 for every key but those of token 0, which are hidden."""

    def __init__(self):
        super().__init__()
        self.scores = HookPoint()  # [batch head query key]
        self.setup()

    def forward(self, tokens):
        hidden = (tokens == 0)[:, None, None].expand(-1, 2, tokens.shape[1], -1)
        return self.scores(torch.ones(hidden.shape).masked_fill(hidden, -torch.inf)).exp().sum(-1)


def test_a_key_that_every_reference_hides_keeps_its_score():
    tokens, reference = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 0, 0], [1, 0, 3, 0]])
    scores = Component("scores", axis=1)
    found = ablate(
        Hiding(), tokens, scores, how="mean", reference=reference, metric=lambda y, _: y[:, 0, 0],
        generator=seeded(),
    )  # fmt: skip
    torch.testing.assert_close(found.changed, found.clean)
    torch.testing.assert_close(found.clean, torch.full((1,), 4 * math.e))


def test_controls_move_each_position_as_far_as_the_lags_do(model, monkeypatch):
    tokens, seen = repeated_tokens(4, 3, 11, 13, generator=seeded()), []

    def recorded(value):
        seen.append(value)
        return lambda _, hook: value

    monkeypatch.setattr("smearlens.causal.lags.replace_with", recorded)
    name = "blocks.0.attn.hook_k"
    role_without_lags(model, tokens, "k", metric=last, n_controls=2, generator=seeded())
    now = model.run_with_cache(tokens)[1][name]
    with model.hooks(present_only(model)):
        plain = model.run_with_cache(tokens)[1][name]
    size, generator = (plain - now).norm(dim=-1), seeded()
    assert len(seen) == 2 + 1 + 2  # q and v as they were, k without lags, two controls
    for control in seen[3:]:
        torch.testing.assert_close((control - now).norm(dim=-1), size, atol=1e-5, rtol=1e-4)
        drawn = torch.randn(now.shape, generator=generator)
        along = torch.nn.functional.cosine_similarity(control - now, drawn, dim=-1)
        torch.testing.assert_close(along[size > 1e-3], torch.ones_like(along[size > 1e-3]))


def test_controls_of_steps_stay_steps(monkeypatch):
    """Δ is positive, in a random direction too."""
    model = Mamba(MambaConfig(d_vocab=13, d_model=16, n_layers=1, n_ctx=17, d_state=5)).eval()
    tokens, seen = repeated_tokens(4, 3, 11, 13, generator=seeded()), []

    def recorded(value):
        seen.append(value)
        return lambda _, hook: value

    monkeypatch.setattr("smearlens.causal.lags.replace_with", recorded)
    role_without_lags(model, tokens, ["delta"], metric=last, n_controls=2, generator=seeded())
    now = model.run_with_cache(tokens)[1]["blocks.0.ssm.hook_delta"]
    assert len(seen) == 3 + 1 + 2  # u, B and C as they were, Δ without lags, two controls
    for control in seen[4:]:
        assert (control >= 0).all()
        assert not torch.allclose(control, now)
