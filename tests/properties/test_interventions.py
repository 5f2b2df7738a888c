"""Properties of interventions: what an edit must do on any model, and what it must leave alone."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.strategies import fewer, generator, seeds, sizes

from smearlens import ConvAttn, ConvAttnConfig, Mamba, MambaConfig
from smearlens.causal.ablate import Component, ablate, measure_with
from smearlens.causal.audit import count_targets
from smearlens.causal.lags import exchange_lags, keep_lags, present_only, role_without_lags
from smearlens.causal.leaks import reads_future, streaming_gap
from smearlens.causal.patch import Recovery, attribution, patch_activation
from smearlens.causal.states import (
    cut_convolution,
    freeze_delta,
    hold_states,
    read_states,
    set_states,
    state_patch,
)

close = torch.testing.assert_close
V = 7


@cache
def conv(causal=True):
    torch.manual_seed(3)
    sizes = {"d_vocab": V, "d_model": 6, "n_heads": 3, "n_ctx": 12}
    config = ConvAttnConfig(**sizes, kernel_size=3, residual=True, causal=causal)
    return ConvAttn(config).double().eval()


@cache
def mamba():
    torch.manual_seed(4)
    return Mamba(MambaConfig(d_vocab=V, d_model=4, n_layers=2, d_state=3, n_ctx=12)).double().eval()


def draw_tokens(seed, batch, length):
    return torch.randint(V, (batch, length), generator=generator(seed))


def last(logits, tokens):
    return logits[:, -1, 0]


POINTS = st.sampled_from(("attn.hook_z", "attn.hook_v", "hook_attn_out", "attn.hook_pattern"))


@fewer(0.05)
@given(POINTS, sizes(2, 4), sizes(3, 8), seeds)
def test_patching_from_itself_does_nothing_and_patching_all_brings_the_clean_run(point, b, n, seed):
    clean, corrupt = draw_tokens(seed, b, n), draw_tokens(seed + 1, b, n)
    name = f"blocks.0.{point}"
    same = patch_activation(conv(), clean, clean, name, metric=last)
    close(same.patched, same.clean)
    whole = patch_activation(conv(), clean, corrupt, "blocks.0.hook_resid_post", metric=last)
    close(whole.patched, whole.clean)
    nowhere = patch_activation(conv(), clean, corrupt, name, metric=last, positions=[0])
    parts = patch_activation(conv(), clean, corrupt, name, metric=last, positions=range(n))
    every = patch_activation(conv(), clean, corrupt, name, metric=last)
    close(parts.patched, every.patched)
    close(nowhere.corrupt, every.corrupt)


@fewer(0.05)
@given(
    sizes(2, 5),
    sizes(3, 8),
    st.sampled_from(("zero", "mean", "mean_by_position", "resample")),
    seeds,
)
def test_ablating_all_heads_is_ablating_each_and_controls_have_their_size(batch, n, how, seed):
    tokens, name = draw_tokens(seed, batch, n), "blocks.0.attn.hook_z"

    def effect(component):
        return ablate(conv(), tokens, component, how=how, metric=last, generator=generator(seed))

    close(effect(name).changed, effect(Component(name, (0, 1, 2))).changed)
    one = effect(Component(name, (1,)))
    assert one.controls is not None
    others = [effect(Component(name, (head,))).changed for head in (0, 2)]
    for control in one.controls:
        assert any(torch.allclose(control, other) for other in others)


@fewer(0.05)
@given(sizes(1, 3), sizes(3, 8), seeds)
def test_keeping_all_lags_changes_nothing_and_keeping_some_adds_up(batch, n, seed):
    tokens, layer = draw_tokens(seed, batch, n), "blocks.0.conv"

    def output(keep):
        model, name = conv(), f"{layer}.hook_out"
        with model.hooks(keep_lags(model, layer, keep)):
            return model.run_with_cache(tokens, names_filter=name)[1][name]

    close(sum(output([lag]) for lag in range(3)), output([0, 1, 2]))
    close(output([0, 1, 2]), output((1, 1, 2, 0)))
    close(output([]), torch.zeros_like(output([0])))


@fewer(0.05)
@given(sizes(2, 3), sizes(3, 8), st.sets(st.sampled_from("qkv"), min_size=1), seeds)
def test_exchanging_lags_with_the_same_tokens_changes_nothing(batch, n, roles, seed):
    tokens, other = draw_tokens(seed, batch, n), draw_tokens(seed + 1, batch, n)
    plain = measure_with(conv(), tokens, [], last)
    same = exchange_lags(conv(), tokens, tokens, sorted(roles))
    close(measure_with(conv(), tokens, same, last), plain)
    effect = role_without_lags(conv(), tokens, "qkv", metric=last, generator=generator(seed))
    close(effect.clean, plain)
    mixed = measure_with(conv(), tokens, exchange_lags(conv(), tokens, other, "qkv"), last)
    assert bool(mixed.isfinite().all())


@fewer(0.05)
@given(sizes(1, 3), sizes(4, 9), seeds)
def test_causal_models_do_not_read_the_future_and_centred_kernels_do(batch, n, seed):
    tokens = draw_tokens(seed, batch, n)
    for model in (conv(), mamba()):
        found = reads_future(model, tokens, generator=generator(seed))
        assert not found.leaks
        assert found.first_leak is None
        gap = streaming_gap(model, tokens)
        assert gap is not None
        assert gap < 1e-9
    leaky = reads_future(conv(causal=False), tokens, tolerance=1e-9, generator=generator(seed))
    assert leaky.leaks


@fewer(0.05)
@given(sizes(2, 3), sizes(4, 9), sizes(0, 8), seeds)
def test_states_put_back_where_they_were_change_nothing(batch, n, where, seed):
    tokens, where = draw_tokens(seed, batch, n), where % n
    plain = mamba()(tokens)
    states = read_states(mamba(), tokens, where)
    for propagate in (True, False):
        hooks = set_states(mamba(), states, where, propagate=propagate)
        close(mamba().run_with_hooks(tokens, fwd_hooks=hooks), plain)
    moved = state_patch(mamba(), tokens, tokens, donor=where, metric=last)
    close(moved.patched, moved.clean)
    close(moved.corrupt, moved.clean)


@fewer(0.05)
@given(sizes(2, 3), sizes(4, 9), sizes(1, 8), seeds)
def test_what_is_held_or_cut_leaves_the_tokens_before_alone(batch, n, where, seed):
    tokens, where = draw_tokens(seed, batch, n), 1 + where % (n - 1)
    plain = mamba()(tokens)
    for hooks in (hold_states(mamba(), where), cut_convolution(mamba(), where - 1)):
        found = mamba().run_with_hooks(tokens, fwd_hooks=hooks)
        close(found[:, :where], plain[:, :where])
    held = read_hooked(tokens, hold_states(mamba(), where))
    for state in held.values():
        close(state[:, where:], state[:, where - 1 : where].expand_as(state[:, where:]))
    frozen = freeze_delta(mamba(), tokens)
    deltas = cached(tokens, frozen, "hook_delta")
    for delta in deltas.values():
        close(delta, delta[:1, :1].expand_as(delta))
    first = cached(tokens, [], "hook_delta")["blocks.0.ssm.hook_delta"]
    close(deltas["blocks.0.ssm.hook_delta"][0, 0], first.mean((0, 1)))


def cached(tokens, hooks, point):
    names = [name for name in mamba().hook_dict if name.endswith(f".{point}")]
    with mamba().hooks(hooks):
        found = mamba().run_with_cache(tokens, names_filter=names)[1]
    return {name: found[name] for name in names}


def read_hooked(tokens, hooks):
    return cached(tokens, hooks, "hook_state")


@fewer(0.1)
@given(sizes(1, 3), sizes(3, 7), seeds)
def test_attribution_is_exact_where_the_metric_is_linear(batch, n, seed):
    clean, corrupt = draw_tokens(seed, batch, n), draw_tokens(seed + 1, batch, n)
    name = "blocks.0.hook_resid_post"
    found = attribution(conv(), clean, corrupt, [name], metric=last)[name]
    with torch.no_grad():
        close(found, last(conv()(clean), clean) - last(conv()(corrupt), corrupt))


@given(st.lists(st.tuples(*(st.floats(-9, 9),) * 3), min_size=3, max_size=9), st.floats(0.1, 9),
       st.floats(-9, 9))  # fmt: skip
def test_recovery_ignores_the_units_of_the_metric(rows, scale, shift):
    clean, corrupt, patched = (
        torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)
    )
    found = Recovery("x", clean + 30, corrupt, patched, corrupt)
    moved = Recovery("x", *(scale * t + shift for t in (clean + 30, corrupt, patched, corrupt)))
    assert found.defined
    assert moved.recovered == pytest.approx(found.recovered, abs=1e-9)
    assert found.control_recovered == pytest.approx(0, abs=1e-12)
    whole = Recovery("x", clean + 30, corrupt, clean + 30, corrupt)
    assert whole.recovered == pytest.approx(1)


@fewer(0.5)
@given(sizes(1, 4), sizes(2, 9), seeds)
def test_targets_are_counted_without_their_padding(batch, n, seed):
    tokens = draw_tokens(seed, batch, n)
    mask = torch.rand(batch, n, generator=generator(seed)) < 0.7
    mask[0, 1] = True
    found = count_targets(conv(), tokens, mask)
    hit = conv()(tokens)[:, :-1].argmax(-1) == tokens[:, 1:]
    real = [
        (int(t), bool(h))
        for t, h, m in zip(
            tokens[:, 1:].flatten(), hit.flatten(), mask[:, 1:].flatten(), strict=True
        )
        if m
    ]
    values = [t for t, _ in real]
    most = max(values.count(v) for v in values)
    assert found.n_targets == len(real)
    assert found.pad_fraction == pytest.approx(1 - len(real) / hit.numel())
    assert found.accuracy == pytest.approx(sum(h for _, h in real) / len(real))
    assert found.accuracy_with_pads == pytest.approx(float(hit.double().mean()))
    assert found.unigram == pytest.approx(most / len(real))
    shares = torch.tensor([values.count(v) / len(real) for v in set(values)])
    assert found.unigram_entropy == pytest.approx(float(-(shares * shares.log()).sum()), abs=1e-6)


@fewer(0.25)
@given(seeds)
def test_present_only_is_the_zeroth_lag(seed):
    tokens = draw_tokens(seed, 2, 5)
    one = measure_with(conv(), tokens, present_only(conv()), last)
    close(one, measure_with(conv(), tokens, keep_lags(conv(), "blocks.0.conv", [0]), last))
