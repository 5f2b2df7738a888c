"""State patching against the recurrence by hand, and against what the state alone can carry."""

import re

import pytest
import torch

from smearlens import AttnAttn, AttnAttnConfig, ConvAttn, ConvAttnConfig, Mamba, MambaConfig
from smearlens.causal.states import (
    cut_convolution,
    freeze_delta,
    hold_states,
    read_states,
    set_states,
    state_patch,
)

SIZES = {"d_vocab": 13, "d_model": 6, "d_state": 5, "n_ctx": 23}
LAYER = "blocks.0.ssm"
RULES = pytest.mark.parametrize("rule", ["mamba", "zoh", "bilinear"])


def mamba(**changes):
    config = MambaConfig(**{**SIZES, "n_layers": 2, "kernel_size": 4, **changes})
    return Mamba(config).double().eval()


def pair():
    """Words of 4 and 6 tokens, a separator each, and the same 7 tokens after it."""
    first, second = torch.randint(1, 13, (3, 4)), torch.randint(1, 13, (3, 6))
    eos, rest = torch.zeros(3, 1, dtype=torch.long), torch.randint(1, 13, (3, 7))
    return torch.cat((first, eos, rest), 1), torch.cat((second, eos, rest), 1)


def squares(logits, tokens):
    return logits[:, -1].square().sum(-1)


@RULES
@pytest.mark.parametrize("channels", [None, [0, 4, 11]])
def test_later_states_follow_the_recurrence(rule, channels):
    model, (tokens, _) = mamba(n_layers=1, rule=rule), pair()
    _, cache = model.run_with_cache(tokens)
    new = torch.randn(3, 12, 5, dtype=torch.float64)
    chosen = range(12) if channels is None else channels
    A_bar, write, expected = (cache[f"{LAYER}.{p}"].clone() for p in
                              ("hook_A_bar", "hook_write", "hook_state"))  # fmt: skip
    index = torch.tensor([4, 7, 2])
    for b, e in enumerate(index.tolist()):
        for c in chosen:
            expected[b, e, c] = new[b, c]
            for t in range(e + 1, 12):
                expected[b, t, c] = A_bar[b, t, c] * expected[b, t - 1, c] + write[b, t, c]
    with model.hooks(set_states(model, {LAYER: new}, index, channels=channels)):
        _, found = model.run_with_cache(tokens)
    torch.testing.assert_close(found[f"{LAYER}.hook_state"], expected)
    read_out = set_states(model, {LAYER: new}, index, channels=channels, propagate=False)
    moved = model.run_with_hooks(tokens, fwd_hooks=read_out) - model(tokens)
    changed = moved.abs().amax(-1) > 1e-9
    assert torch.equal(changed, torch.arange(12) == index[:, None])


@RULES
@pytest.mark.parametrize("method", ["fused", "doubling", "logspace"])
def test_where_only_the_state_looks_back_it_carries_everything(rule, method):
    """Kernel of one tap: after the patch, the other word may as well have been this one."""
    model, (clean, corrupt) = mamba(kernel_size=1, rule=rule, scan=method), pair()
    target = model(clean)[:, 4:]
    assert not torch.allclose(model(corrupt)[:, 6:], target)
    hooks = set_states(model, read_states(model, clean, 4), 6)
    torch.testing.assert_close(model.run_with_hooks(corrupt, fwd_hooks=hooks)[:, 6:], target)
    found = state_patch(model, clean, corrupt, donor=4, recipient=6, metric=squares)
    torch.testing.assert_close(found.patched, found.clean)
    assert not torch.allclose(found.corrupt, found.clean)
    assert not torch.allclose(found.control, found.clean)
    one = state_patch(model, clean, corrupt, LAYER, donor=4, recipient=6, metric=squares)
    assert not torch.allclose(one.patched, found.clean)  # the other layer remembers its own word


@pytest.mark.parametrize(("n_layers", "hide_position"), [(1, False), (1, True), (2, True)])
def test_the_convolution_carries_the_rest_until_it_is_cut(n_layers, hide_position):
    model, (clean, corrupt) = mamba(n_layers=n_layers), pair()
    moved = set_states(model, read_states(model, clean, 4), 6)
    leaking = model.run_with_hooks(corrupt, fwd_hooks=moved)[:, 7:]
    assert not torch.allclose(leaking, model(clean)[:, 5:])
    with model.hooks(cut_convolution(model, 4, hide_position=hide_position)):
        states, target = read_states(model, clean, 4), model(clean)[:, 5:]
    hooks = [
        *cut_convolution(model, 6, hide_position=hide_position),
        *set_states(model, states, 6),
    ]
    torch.testing.assert_close(model.run_with_hooks(corrupt, fwd_hooks=hooks)[:, 7:], target)


def test_the_control_of_a_patch_is_the_state_of_the_example_before():
    model, (clean, corrupt) = mamba(), pair()
    states = read_states(model, clean, 4)
    moved = {layer: state[[2, 0, 1]] for layer, state in states.items()}
    logits = model.run_with_hooks(corrupt, fwd_hooks=set_states(model, moved, 6))
    found = state_patch(model, clean, corrupt, donor=4, recipient=6, metric=squares)
    torch.testing.assert_close(found.clean, squares(model(clean), clean))
    torch.testing.assert_close(found.control, logits[:, -1].square().sum(-1))


def test_a_single_pair_has_no_other_state():
    model, (clean, corrupt) = mamba(), pair()
    found = state_patch(model, clean[:1], corrupt[:1], donor=4, recipient=6, metric=squares)
    assert found.control.isnan().tolist() == [True]
    assert bool(found.patched.isfinite())


@pytest.mark.parametrize("propagate", [True, False])
def test_a_patch_propagates_or_only_reads_out(propagate):
    model, (clean, corrupt) = mamba(), pair()
    states = read_states(model, clean, 4)
    hooks = set_states(model, states, 6, channels=[1, 5], propagate=propagate)
    expected = model.run_with_hooks(corrupt, fwd_hooks=hooks)
    found = state_patch(
        model, clean, corrupt, donor=4, recipient=6, channels=[1, 5], propagate=propagate,
        metric=lambda logits, tokens: logits[:, 4:].square().sum((1, 2)),
    )  # fmt: skip
    torch.testing.assert_close(found.patched, expected[:, 6:].square().sum((1, 2)))
    assert found.name.startswith("states of blocks.0.ssm, blocks.1.ssm, ")
    assert found.name.endswith("propagating" if propagate else "read-out only")


def test_the_metric_sees_the_runs_aligned():
    model, (clean, corrupt) = mamba(), pair()
    donor, recipient = torch.tensor([4, 1, 2]), torch.tensor([6, 0, -1])
    seen = []

    def metric(logits, tokens):
        seen.append(logits)
        assert tokens is clean
        return logits[:, 1, 0]

    state_patch(model, clean, corrupt, donor=donor, recipient=recipient, metric=metric)
    _, other, patched, _ = seen
    torch.testing.assert_close(other[0], model(corrupt)[0, 2:])
    torch.testing.assert_close(other[1, 1:], model(corrupt)[1, :11])
    assert other[1, 0].isnan().all()
    torch.testing.assert_close(other[2, :3], model(corrupt)[2, 11:])
    assert other[2, 3:].isnan().all()
    assert patched.shape == (3, 12, 13)
    same = state_patch(model, clean, clean, donor=-3, metric=squares)
    torch.testing.assert_close(same.patched, same.clean)


@RULES
def test_held_states_stay(rule):
    model, (tokens, _) = mamba(rule=rule), pair()
    start = torch.tensor([5, 2, 9])
    with model.hooks(hold_states(model, start)):
        _, cache = model.run_with_cache(tokens)
    _, free = model.run_with_cache(tokens)
    for b, first in enumerate(start.tolist()):
        for i in range(2):
            states = cache[f"blocks.{i}.ssm.hook_state"][b]
            before = free[f"blocks.{i}.ssm.hook_state"][b]
            torch.testing.assert_close(states[:first], before[:first])
            kept = states[first - 1 : first].expand_as(states[first:])
            assert torch.equal(states[first:], kept)
    from_the_end, from_the_start = (
        model.run_with_hooks(tokens, fwd_hooks=hold_states(model, i)) for i in (-12, 0)
    )
    assert torch.equal(from_the_end, from_the_start)
    only = hold_states(model, 3, "blocks.1.ssm")
    assert [name for name, _ in only] == ["blocks.1.ssm.hook_delta"]


def test_frozen_steps_are_the_mean_where_it_counts():
    model, (tokens, other) = mamba(), pair()
    mask = torch.rand(3, 12) < 0.6
    _, cache = model.run_with_cache(tokens)
    with model.hooks(freeze_delta(model, tokens, mask=mask)):
        _, frozen = model.run_with_cache(other)
    for i in range(2):
        delta = cache[f"blocks.{i}.ssm.hook_delta"]
        total = torch.zeros(12, dtype=torch.float64)
        for b, t in mask.nonzero().tolist():
            total += delta[b, t]
        found = frozen[f"blocks.{i}.ssm.hook_delta"]
        torch.testing.assert_close(found, (total / mask.sum()).expand_as(found))
    with pytest.raises(ValueError, match="mask keeps no position"):
        freeze_delta(model, tokens, mask=torch.zeros(3, 12, dtype=torch.bool))


@pytest.mark.parametrize("hide_position", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_a_cut_convolution_equals_a_loop(causal, hide_position):
    config = ConvAttnConfig(
        d_vocab=13, d_model=6, n_heads=3, n_ctx=23, kernel_size=5, causal=causal, conv_on="k"
    )
    model, (tokens, _) = ConvAttn(config).double().eval(), pair()
    name, index = "blocks.0.attn.conv_k", [4, 0, 9]
    _, cache = model.run_with_cache(tokens)
    x, kernel, expected = (cache[f"{name}.{p}"].clone() for p in
                           ("hook_in", "hook_kernel", "hook_out"))  # fmt: skip
    for b, e in enumerate(index):
        first = e + hide_position
        for t in range(e + 1, 12):
            reads = [(i, t - lag) for i, lag in enumerate(model.blocks[0].attn.conv_k.lags)]
            expected[b, t] = sum(kernel[:, i] * x[b, s] for i, s in reads if first <= s < 12)
    with model.hooks(cut_convolution(model, torch.tensor(index), hide_position=hide_position)):
        _, cut = model.run_with_cache(tokens)
    torch.testing.assert_close(cut[f"{name}.hook_out"], expected)


def test_a_cut_convolution_keeps_its_bias_and_forgets_exactly():
    model, (tokens, _) = mamba(n_layers=1), pair()
    other = tokens.clone()
    other[:, :4] = (other[:, :4] + 1) % 13
    hooks = cut_convolution(model, 4)
    outs = []
    for given in (tokens, other):
        with model.hooks(hooks):
            _, cache = model.run_with_cache(given)
        outs.append(cache["blocks.0.conv.hook_out"])
    assert torch.equal(outs[0][:, 5:], outs[1][:, 5:])
    assert not torch.allclose(outs[0][:, 4], outs[1][:, 4])  # the boundary itself still looks back
    free = model.run_with_cache(tokens)[1]["blocks.0.conv.hook_out"]
    assert torch.equal(outs[0][:, 7:], free[:, 7:])  # four taps reach no further
    assert torch.equal(outs[0][:, :5], free[:, :5])


def test_a_cut_convolution_adds_its_bias_where_the_input_is_hidden():
    model, (tokens, _) = mamba(n_layers=1), pair()
    conv = model.blocks[0].conv
    with torch.no_grad():
        conv.bias.copy_(torch.randn(12, dtype=torch.float64))
    _, cache = model.run_with_cache(tokens)
    x, expected = cache["blocks.0.conv.hook_in"], cache["blocks.0.conv.hook_out"].clone()
    for t in (5, 6, 7):
        expected[:, t] = conv.bias.detach()
        for lag in range(4):
            if t - lag >= 5:
                expected[:, t] += conv.weight.detach()[:, lag] * x[:, t - lag]
    with model.hooks(cut_convolution(model, 4, hide_position=True)):
        _, cut = model.run_with_cache(tokens)
    torch.testing.assert_close(cut["blocks.0.conv.hook_out"], expected)


def test_what_does_not_exist_is_named():
    model, (clean, corrupt) = mamba(), pair()
    known = "['blocks.0.ssm', 'blocks.1.ssm']"
    cases = [
        ({"layers": "blocks.7.ssm", "donor": 4},
         f"layers='blocks.7.ssm': layers of this Mamba with a hook_state: {known}"),
        ({"donor": 12}, "donor must be in -12..11, got 12"),
        ({"donor": 4, "recipient": torch.tensor([1, 2, 14])},
         "recipient must be in -14..13, got [1, 2, 14]"),
        ({"donor": 4, "channels": [3, 12]}, "channels must be some of 0..11, got [3, 12]"),
        ({"donor": 4, "channels": []}, "channels must be some of 0..11, got []"),
        ({"donor": 4, "channels": [2, -1]}, "channels must be some of 0..11, got [2, -1]"),
    ]  # fmt: skip
    for given, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            state_patch(model, clean, corrupt, metric=squares, **given)
    with pytest.raises(ValueError, match="clean and corrupt differ in number: 3, 2"):
        state_patch(model, clean, corrupt[:2], metric=squares, donor=4)
    with pytest.raises(ValueError, match=re.escape("mask [3, 11] must be as tokens are, [3, 12]")):
        freeze_delta(model, clean, mask=torch.ones(3, 11, dtype=torch.bool))
    wrong = set_states(model, {LAYER: torch.zeros(3, 12, 4)}, 2)
    with pytest.raises(ValueError, match=re.escape("[batch channel d_state] = [3, 12, 5], got")):
        model.run_with_hooks(clean, fwd_hooks=wrong)
    two = "start must be an int or an integer per sequence [3], got tensor([1, 2])"
    with pytest.raises(ValueError, match=re.escape(two)):
        model.run_with_hooks(clean, fwd_hooks=hold_states(model, torch.tensor([1, 2])))
    none = AttnAttn(AttnAttnConfig(d_vocab=13, d_model=6, n_heads=3, n_ctx=23, n_layers=1))
    with pytest.raises(ValueError, match=re.escape("layers of this AttnAttn with a hook_kernel")):
        cut_convolution(none, 3)
