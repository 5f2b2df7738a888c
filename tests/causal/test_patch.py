"""Patching against its definition: all patched is the clean run, nothing patched the corrupt."""

import pytest
import torch

from smearlens import AttnAttn, AttnAttnConfig, repeated_tokens
from smearlens.causal.ablate import Component
from smearlens.causal.patch import Recovery, attribution, patch_activation, patch_path

SIZES = {"d_vocab": 13, "d_model": 12, "n_heads": 3, "n_ctx": 17, "n_layers": 2}


@pytest.fixture
def setting(generator):
    model = AttnAttn(AttnAttnConfig(**SIZES)).eval()
    clean, corrupt = (repeated_tokens(19, (3, 5), 11, 13, generator=generator) for _ in range(2))
    return model, clean, corrupt


def target_logit(logits, tokens):
    return logits[:, -1].gather(-1, tokens[:, -1:])[:, 0]


def shifted_logit(logits, tokens):
    """Differs between clean and corrupt far beyond noise: depends on the last token's embedding."""
    return logits[:, -1].square().sum(-1) + 10 * (logits[:, -1].argmax(-1) == tokens[:, -1])


def test_patching_the_last_residual_recovers_everything(setting):
    model, clean, corrupt = setting
    found = patch_activation(model, clean, corrupt, "blocks.1.hook_resid_post", metric=target_logit)
    torch.testing.assert_close(found.patched, found.clean)
    assert not torch.allclose(found.corrupt, found.clean)
    if found.defined:
        assert found.recovered == pytest.approx(1.0)


def test_patching_one_position_equals_a_hand_made_edit(setting):
    model, clean, corrupt = setting
    _, cache = model.run_with_cache(clean)

    def edit(z, hook):
        z[:, [2, 5], 1] = cache["blocks.0.attn.hook_z"][:, [2, 5], 1]
        return z

    expected = model.run_with_hooks(corrupt, fwd_hooks=[("blocks.0.attn.hook_z", edit)])
    found = patch_activation(
        model, clean, corrupt, Component("blocks.0.attn.hook_z", (1,)), positions=[2, 5],
        metric=target_logit,
    )  # fmt: skip
    torch.testing.assert_close(found.patched, target_logit(expected, clean))


def test_positions_of_a_pattern_are_its_queries(setting):
    model, clean, corrupt = setting
    name = "blocks.0.attn.hook_pattern"
    stored = model.run_with_cache(clean)[1][name]

    def edit(pattern, hook):
        pattern = pattern.clone()
        pattern[:, 1, [2, 5]] = stored[:, 1, [2, 5]]
        return pattern

    expected = model.run_with_hooks(corrupt, fwd_hooks=[(name, edit)])
    seen = []

    def metric(logits, tokens):
        seen.append(logits)
        return logits[:, -1, 0]

    patch_activation(model, clean, corrupt, Component(name, (1,)), positions=[2, 5], metric=metric)
    torch.testing.assert_close(seen[2], expected)


def test_sequences_of_one_token_are_patched(setting):
    model, clean, corrupt = setting
    found = patch_activation(
        model, clean[:, :1], corrupt[:, :1], "blocks.1.hook_resid_post", metric=target_logit
    )
    torch.testing.assert_close(found.patched, found.clean)


def test_recovery_is_undefined_within_noise(setting):
    model, clean, _ = setting
    found = patch_activation(model, clean, clean, "hook_embed", metric=target_logit)
    assert not found.defined
    assert found.recovered != found.recovered
    assert "nan" in repr(found)


def test_a_path_changes_the_receiver_only_through_the_sender(setting):
    model, clean, corrupt = setting
    sender, receiver = "blocks.0.hook_attn_out", "blocks.1.attn.hook_k"
    _, cache = model.run_with_cache(clean)
    _, told = model.run_with_cache(corrupt)
    with model.hooks([(sender, lambda t, hook: cache[sender])]):
        _, told = model.run_with_cache(corrupt)
    expected = model.run_with_hooks(corrupt, fwd_hooks=[(receiver, lambda t, hook: told[receiver])])
    found = patch_path(model, clean, corrupt, sender, receiver, metric=target_logit)
    torch.testing.assert_close(found.patched, target_logit(expected, clean))
    whole = patch_activation(model, clean, corrupt, sender, metric=target_logit)
    assert not torch.allclose(whole.patched, found.patched)


def test_attribution_is_exact_where_the_model_is_linear(setting):
    """The last residual reaches the logits linearly, so the estimate equals the patch."""
    model, clean, corrupt = setting
    name = "blocks.1.hook_resid_post"
    estimate = attribution(model, clean, corrupt, [name], metric=target_logit)[name]
    found = patch_activation(model, clean, corrupt, name, metric=target_logit)
    torch.testing.assert_close(estimate, found.patched - found.corrupt, atol=1e-5, rtol=1e-4)
    frozen = model.requires_grad_(False)
    again = attribution(frozen, clean, corrupt, [name], metric=target_logit)[name]
    torch.testing.assert_close(again, estimate)


def test_what_does_not_reach_the_metric_has_no_attribution(setting):
    model, clean, corrupt = setting
    name = "blocks.1.attn.hook_pattern"
    found = attribution(
        model, clean, corrupt, name, metric=lambda logits, tokens: logits[:, 0, 0]
    )  # at position 0 there is nothing to choose from
    torch.testing.assert_close(found[name], torch.zeros(19), atol=1e-6, rtol=0)
    weight = torch.randn(13, requires_grad=True)
    found = attribution(model, clean, corrupt, name, metric=lambda _, tokens: weight[tokens[:, 0]])
    assert found[name].tolist() == [0] * 19


def test_one_name_is_as_good_as_a_list(setting):
    model, clean, corrupt = setting
    name = "blocks.1.attn.hook_k"
    one = attribution(model, clean, corrupt, name, metric=target_logit)
    assert one[name].tolist() == (
        attribution(model, clean, corrupt, [name], metric=target_logit)[name].tolist()
    )
    with pytest.raises(ValueError, match=r"names must hold at least one hook, got \[\]"):
        attribution(model, clean, corrupt, [], metric=target_logit)


def recovered(clean, corrupt, patched):
    runs = (torch.tensor(run, dtype=torch.float64) for run in (clean, corrupt, patched, corrupt))
    return Recovery("x", *runs)


def test_the_interval_of_a_loss_is_in_order():
    """A loss falls where an accuracy rises: the same recovery, the same interval."""
    rising = recovered([5.0, 4, 6, 5], [1.0, 2, 1, 0], [3.0, 2.5, 4, 3])
    falling = recovered([-5.0, -4, -6, -5], [-1.0, -2, -1, 0], [-3.0, -2.5, -4, -3])
    assert rising.recovered == falling.recovered
    low, high = falling.interval()
    assert low < falling.recovered < high
    assert rising.interval() == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (recovered([4.5], [1.25], [3.0]), "a single pair shows no spread: give at least 2 (clean "
         "4.500, corrupt 1.250, patched 3.000)"),
        (recovered([4.0, 1], [3.0, 1], [3.0, 1]), "clean and corrupt differ by no more than twice "
         "the standard error (clean 2.500, corrupt 2.000, patched 2.000)"),
        (recovered([4.0, float("nan"), 1], [3.0, 1, 1], [3.0, 1, 1]), "the metric is not finite "
         "for 1 of 3 pairs (clean nan, corrupt 1.667, patched 1.667)"),
    ],
)  # fmt: skip
def test_why_nothing_is_recovered(found, reason):
    assert repr(found) == f"x: recovered nan, since {reason}"


def test_a_single_pair_has_no_other_example(setting):
    model, clean, corrupt = setting
    call = {"metric": target_logit}
    one, two = "blocks.0.hook_attn_out", "blocks.1.attn.hook_k"
    for found in (
        patch_activation(model, clean[:1], corrupt[:1], one, **call),
        patch_path(model, clean[:1], corrupt[:1], one, two, **call),
    ):
        assert found.control.isnan().tolist() == [True]
        assert bool(found.patched.isfinite())
        assert "since a single pair shows no spread" in repr(found)


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [
        ("blocks.0.attn.hook_z", "blocks.0.attn.hook_k"),
        ("blocks.1.attn.hook_k", "blocks.0.hook_attn_out"),
        ("hook_embed", "hook_embed"),
    ],
)
def test_a_path_leads_forward(setting, sender, receiver):
    message = f"no path: sender '{sender}' must be computed before receiver '{receiver}'"
    with pytest.raises(ValueError, match=message):
        patch_path(*setting, sender, receiver, metric=target_logit)


@pytest.mark.parametrize(
    ("positions", "fit"),
    [([10, -11], True), (range(-11, 11), True), ([], False), ([11], False), ([2, -12], False)],
)
def test_positions_are_those_of_the_tokens(setting, positions, fit):
    model, clean, corrupt = setting
    given = {"positions": positions, "metric": target_logit}
    if fit:
        assert patch_activation(model, clean, corrupt, "hook_embed", **given).patched.shape == (19,)
        return
    with pytest.raises(ValueError, match=r"positions must be some of -11\.\.10, got \["):
        patch_activation(model, clean, corrupt, "hook_embed", **given)


def test_inputs_must_pair(setting):
    model, clean, corrupt = setting
    with pytest.raises(ValueError, match=r"clean \[19, 11\] and corrupt \[19, 7\]"):
        patch_activation(model, clean, corrupt[:, :7], "hook_embed", metric=target_logit)
    with pytest.raises(ValueError, match=r"clean \[19, 11\] and corrupt \[17, 11\]"):
        patch_path(model, clean, corrupt[:17], "hook_embed", "hook_embed", metric=target_logit)
    with pytest.raises(ValueError, match=r"clean \[5, 11\] and corrupt \[19, 11\]"):
        attribution(model, clean[:5], corrupt, ["hook_embed"], metric=target_logit)
