"""Ablations against hand-made edits, and on models whose cause is known."""

import pytest
import torch
from jaxtyping import config as jaxtyping_config

from smearlens import (
    AttnAttn,
    AttnAttnConfig,
    ConvAttn,
    ConvAttnConfig,
    Mamba,
    MambaConfig,
    repeated_tokens,
)
from smearlens.causal.ablate import Component, Effect, _remover, ablate, measure_with
from smearlens.causal.lags import exchange_lags, keep_lags, present_only, role_without_lags
from smearlens.nn.scan import selective_scan

SIZES = {"d_vocab": 13, "d_model": 12, "n_heads": 3, "n_ctx": 17}


@pytest.fixture
def model():
    return ConvAttn(ConvAttnConfig(**SIZES, kernel_size=4, residual=True)).eval()


@pytest.fixture
def tokens(generator):
    return repeated_tokens(7, (3, 5), 11, 13, generator=generator)


def last_logit(logits, tokens):
    return logits[:, -1, 0]


def run_manually(model, tokens, name, edit):
    return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: edit(t))])[:, -1, 0]


def next_in_circle(count, seed=5):
    """For each of the examples, seated at random, who sits before it."""
    seats = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    before = {one: seats[i - 1] for i, one in enumerate(seats)}
    return [before[one] for one in range(count)]


def test_zero_mean_and_resample_equal_hand_made_edits(model, tokens, generator):
    name, heads = "blocks.0.attn.hook_z", (0, 2)
    _, cache = model.run_with_cache(tokens)
    z = cache[name]

    def with_heads(new):
        def edit(t):
            t = t.clone()
            t[:, :, list(heads)] = new.expand_as(t)[:, :, list(heads)]
            return t

        return edit

    expected = {
        "zero": with_heads(torch.zeros_like(z)),
        "mean": with_heads(z.mean((0, 1), keepdim=True)),
        "mean_by_position": with_heads(z.mean(0, keepdim=True)),
    }
    for how, edit in expected.items():
        effect = ablate(
            model, tokens, Component(name, heads), how=how, metric=last_logit, n_controls=0,
            generator=generator,
        )  # fmt: skip
        torch.testing.assert_close(effect.changed, run_manually(model, tokens, name, edit))
        torch.testing.assert_close(effect.clean, last_logit(model(tokens), tokens))
    partner = next_in_circle(7)
    effect = ablate(
        model, tokens, Component(name, heads), how="resample", metric=last_logit, n_controls=0,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    torch.testing.assert_close(
        effect.changed, run_manually(model, tokens, name, with_heads(z[partner]))
    )


def test_what_is_stored_comes_from_the_reference(model, tokens, generator):
    """Of other sequences, and for a mean over positions of another length too."""
    name = "blocks.0.attn.hook_z"
    other = repeated_tokens(9, (3, 5), 11, 13, generator=generator)
    short = repeated_tokens(2, 3, 6, 13, generator=generator)
    z = model.run_with_cache(other)[1][name]
    expected = {
        ("mean", other): z.mean((0, 1)),
        ("mean", short): model.run_with_cache(short)[1][name].mean((0, 1)),
        ("mean_by_position", other): z.mean(0),
        ("resample", other): z[next_in_circle(9)][:7],
    }
    for (how, reference), new in expected.items():
        effect = ablate(
            model, tokens, name, how=how, reference=reference, metric=last_logit,
            generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
        edited = run_manually(model, tokens, name, lambda z, new=new: new.expand_as(z))
        torch.testing.assert_close(effect.changed, edited)
        torch.testing.assert_close(effect.clean, last_logit(model(tokens), tokens))


@pytest.mark.parametrize(
    ("how", "point", "batch", "length", "fits"),
    [
        ("mean", "hook_z", 1, 5, True),
        ("mean", "hook_pattern", 1, 11, True),
        ("mean", "hook_pattern", 7, 5, False),
        ("mean_by_position", "hook_z", 1, 11, True),
        ("mean_by_position", "hook_z", 7, 5, False),
        ("resample", "hook_z", 7, 11, True),
        ("resample", "hook_z", 6, 11, False),
        ("resample", "hook_z", 7, 5, False),
        ("zero", "hook_pattern", 1, 5, True),
    ],
)
def test_a_reference_must_fit(model, tokens, generator, how, point, batch, length, fits):
    reference = repeated_tokens(batch, 2, length, 13, generator=generator)
    name = f"blocks.0.attn.{point}"
    given = {"how": how, "reference": reference, "metric": last_logit, "generator": generator}
    if fits:
        assert ablate(model, tokens, name, **given).changed.shape == (7,)
        return
    message = (
        rf"reference \[{batch}, {length}\] does not fit tokens \[7, 11\]: how='{how}' of {name}"
    )
    with pytest.raises(ValueError, match=message) as caught:
        ablate(model, tokens, name, **given)
    assert ("no fewer than there are in tokens" in str(caught.value)) is (how == "resample")


@pytest.mark.parametrize("count", [2, 3, 8])
def test_nobody_is_resampled_by_itself(model, generator, count):
    """With the first token as metric, what comes of its own activation is the clean run."""
    tokens = torch.randperm(13, generator=generator)[:count, None].repeat(1, 5)
    for seed in range(5):
        effect = ablate(
            model, tokens, "blocks.0.hook_resid_post", how="resample", metric=last_logit,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        assert bool((effect.changed != effect.clean).all())
        assert effect.changed.sort().values.tolist() == effect.clean.sort().values.tolist()


@pytest.mark.parametrize(
    ("how", "point"),
    [("resample", "hook_z"), ("mean_by_position", "hook_z"), ("mean", "hook_pattern")],
)
def test_one_example_has_no_other(model, tokens, generator, how, point):
    name = f"blocks.0.attn.{point}"
    message = f"how='{how}' of {name} takes from other examples, got 1 in all; pass more tokens"
    with pytest.raises(ValueError, match=message):
        ablate(model, tokens[:1], name, how=how, generator=generator)
    ablate(model, tokens[:1], "blocks.0.attn.hook_z", how="mean", generator=generator)


SCORES = "blocks.0.attn.hook_attn_scores"


@pytest.mark.parametrize("how", ["zero", "mean", "mean_by_position", "resample"])
@pytest.mark.parametrize("heads", [None, (1,)])
def test_a_hidden_key_stays_hidden(model, tokens, generator, how, heads):
    seen, future = [], torch.ones(11, 11, dtype=torch.bool).triu(1)

    def look(model, tokens, hooks):
        hooks = [*hooks, ("blocks.0.attn.hook_pattern", lambda p, hook: seen.append(p))]
        return model.run_with_hooks(tokens, fwd_hooks=hooks)

    _, cache = model.run_with_cache(tokens)
    remove = ablate_hook(model, tokens, Component(SCORES, heads), how, generator)
    look(model, tokens, [(SCORES, remove)])
    assert bool((seen[0][..., future] == 0).all())
    assert bool(seen[0].isfinite().all())
    changed = (seen[0] != cache["blocks.0.attn.hook_pattern"]).flatten(2).any(-1).all(0)
    assert changed.tolist() == [heads is None or head in heads for head in range(3)]


def ablate_hook(model, tokens, component, how, generator):
    """The hook that `ablate` attaches."""
    stored = model.run_with_cache(tokens)[1][component.name]
    return _remover(component, how, stored, torch.tensor([6, 0, 1, 2, 3, 4, 5]))


def test_a_mean_of_scores_is_over_the_examples_that_show_the_key(model, tokens, generator):
    """Of keys that some examples hide, as padding does; what hides here stays hidden here."""
    hide = torch.zeros(7, 1, 1, 11, dtype=torch.bool)
    hide[:3, ..., 0], hide[:, ..., 4] = True, True
    hide[2, ..., 4] = False

    def pads(scores, hook):
        return scores.masked_fill(hide[: len(scores)], -torch.inf)

    model.add_hook(SCORES, pads)
    stored = model.run_with_cache(tokens)[1][SCORES]
    seen = []
    hooks = [(SCORES, _remover(Component(SCORES), "mean", stored, torch.arange(7))),
             (SCORES, lambda scores, hook: seen.append(scores))]  # fmt: skip
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(seen[0][5, :, 3, 0], stored[3:, :, 3, 0].mean(0))
    torch.testing.assert_close(seen[0][2, :, 6, 4], stored[2, :, 6, 4])
    assert torch.equal(seen[0].isneginf(), stored.isneginf())
    away = stored.index_fill(-1, torch.tensor([1]), -torch.inf)  # nowhere is key 1 to be seen
    new = _remover(Component(SCORES), "mean", away, torch.arange(7))(stored, None)
    assert torch.equal(new[..., 1], stored[..., 1])


def test_half_of_the_units_have_the_other_half_as_control(tokens, generator):
    four = ConvAttn(ConvAttnConfig(**{**SIZES, "n_heads": 4}, kernel_size=3)).eval()
    name = "blocks.0.attn.hook_z"
    given = {"metric": last_logit, "generator": generator}
    effect = ablate(four, tokens, Component(name, (0, 2)), n_controls=2, **given)
    other = ablate(four, tokens, Component(name, (1, 3)), **given)
    assert effect.controls is not None
    torch.testing.assert_close(effect.controls, other.changed.expand(2, -1))


@pytest.fixture
def unchecked():
    """Types unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("units", [(), [], (0, 1.0), "01", 1])
def test_units_are_indices_and_some(units, unchecked):
    with pytest.raises(ValueError, match="units must be some indices, or None for all, got"):
        Component("blocks.0.attn.hook_z", units)


def test_controls_are_other_units_of_the_same_number(model, tokens, generator):
    effect = ablate(
        model, tokens, Component("blocks.0.attn.hook_z", (1,)), metric=last_logit, n_controls=9,
        generator=generator,
    )  # fmt: skip
    singles = [
        ablate(model, tokens, Component("blocks.0.attn.hook_z", (h,)), metric=last_logit,
               n_controls=0, generator=generator).changed
        for h in (0, 2)
    ]  # fmt: skip
    assert effect.controls.shape == (9, 7)
    for control in effect.controls:
        assert any(torch.allclose(control, single) for single in singles)


def test_pattern_preserving_keeps_later_patterns(tokens, generator):
    model = AttnAttn(AttnAttnConfig(**SIZES, n_layers=2)).eval()
    _, cache = model.run_with_cache(tokens)
    frozen = cache["blocks.1.attn.hook_pattern"]

    def zero_head(z, hook):
        z[:, :, 1] = 0
        return z

    expected = model.run_with_hooks(
        tokens,
        fwd_hooks=[
            ("blocks.0.attn.hook_z", zero_head),
            ("blocks.1.attn.hook_pattern", lambda p, hook: frozen),
        ],
    )[:, -1, 0]
    effect = ablate(
        model, tokens, Component("blocks.0.attn.hook_z", (1,)), how="pattern_preserving",
        metric=last_logit, n_controls=0, generator=generator,
    )  # fmt: skip
    torch.testing.assert_close(effect.changed, expected)
    plain = ablate(model, tokens, Component("blocks.0.attn.hook_z", (1,)), metric=last_logit,
                   n_controls=0, generator=generator)  # fmt: skip
    assert not torch.allclose(plain.changed, expected)


def test_keep_lags_equals_a_kernel_with_zeroed_taps(model, tokens):
    edited = ConvAttn(model.config).eval()
    edited.load_state_dict(model.state_dict())
    with torch.no_grad():
        edited.blocks[0].conv.weight[:, [1, 3]] = 0
    hooks = keep_lags(model, "blocks.0.conv", [0, 2])
    torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), edited(tokens))


def test_roles_are_the_only_thing_that_changes(model, tokens, generator):
    """Removing the lags of K equals attention whose keys come from the lag-0 stream."""
    block = model.blocks[0]
    x = model.embed(tokens) + model.pos_embed(0, 11)
    full, bare = x + block.conv(x), x + x * block.conv.weight[:, 0]
    q, _, v = block.attn.in_proj(full).chunk(3, -1)
    _, k, _ = block.attn.in_proj(bare).chunk(3, -1)
    q, k, v = (t.view(7, 11, 3, 4).transpose(1, 2) for t in (q, k, v))
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = full + block.attn.out_proj(z.transpose(1, 2).reshape(7, 11, 12))
    expected = model.unembed(out)[:, -1, 0]
    effect = role_without_lags(model, tokens, "k", metric=last_logit, generator=generator)
    torch.testing.assert_close(effect.changed, expected)
    assert effect.controls.shape == (3, 7)


def test_exchanged_lags_reach_the_roles_that_were_named_alone(model, tokens, generator):
    """Keys of this stream with the lags of another; queries and values as they were."""
    other = repeated_tokens(7, (3, 5), 11, 13, generator=generator)
    block = model.blocks[0]

    def parts(given):
        x = model.embed(given) + model.pos_embed(0, 11)
        return x, block.conv(x) - x * block.conv.weight[:, 0]

    (x, own), (_, foreign) = parts(tokens), parts(other)
    bare = x + x * block.conv.weight[:, 0]
    q, _, v = block.attn.in_proj(bare + own).chunk(3, -1)
    _, k, _ = block.attn.in_proj(bare + foreign).chunk(3, -1)
    q, k, v = (t.view(7, 11, 3, 4).transpose(1, 2) for t in (q, k, v))
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = bare + own + block.attn.out_proj(z.transpose(1, 2).reshape(7, 11, 12))
    found = model.run_with_hooks(tokens, fwd_hooks=exchange_lags(model, tokens, other, "k"))
    torch.testing.assert_close(found, model.unembed(out))


def test_lags_are_taken_from_the_block_that_was_named(tokens, generator):
    model = Mamba(MambaConfig(d_vocab=13, d_model=16, n_layers=2, n_ctx=17, d_state=5)).eval()
    first, second = (present_only(model, f"blocks.{i}") for i in range(2))
    assert [name for name, _ in first + second] == [f"blocks.{i}.conv.hook_kernel" for i in (0, 1)]
    roles = ["u", "B", "C", "delta"]
    for block, hooks in (("blocks.0", first), ("blocks.1", second)):
        effect = role_without_lags(
            model, tokens, roles, block=block, metric=last_logit, n_controls=0, generator=generator
        )
        torch.testing.assert_close(effect.changed, measure_with(model, tokens, hooks, last_logit))


def test_all_roles_of_smeared_keys_equal_keys_alone(tokens, generator):
    model = ConvAttn(ConvAttnConfig(**SIZES, conv_on=None, smear=True)).eval()
    k, everything = (
        role_without_lags(model, tokens, roles, metric=last_logit, generator=generator).changed
        for roles in ("k", "qkv")
    )
    torch.testing.assert_close(k, everything)
    silent = ConvAttn(model.config).eval()
    silent.load_state_dict(model.state_dict())
    with torch.no_grad():
        silent.blocks[0].attn.smear.alpha.fill_(100.0)
    torch.testing.assert_close(k, last_logit(silent(tokens), tokens))


def test_a_state_space_role_changes_alone(tokens, generator):
    """Removing B's lags equals a scan whose B alone comes from the lag-0 input."""
    model = Mamba(MambaConfig(d_vocab=13, d_model=16, n_layers=1, n_ctx=17, d_state=5)).eval()
    _, now = model.run_with_cache(tokens)
    with model.hooks(present_only(model)):
        _, plain = model.run_with_cache(tokens)
    ssm, point = model.blocks[0].ssm, "blocks.0.ssm.hook_"
    u, delta, c = (now[point + name] for name in ("u", "delta", "C"))
    y, _ = selective_scan(u, delta, ssm.A, plain[point + "B"], c)
    out = (y + ssm.D * u) * now[point + "gate"]
    stream = now["blocks.0.hook_resid_pre"] + model.blocks[0].out_proj(out)
    expected = model.unembed(model.ln_final(stream))[:, -1, 0]
    effect = role_without_lags(model, tokens, ["B"], metric=last_logit, generator=generator)
    torch.testing.assert_close(effect.changed, expected)


def test_a_state_space_role_leaves_the_others_as_they_were(tokens, generator):
    """u feeds B, C and Δ: taking its lags away must not take theirs."""
    model = Mamba(MambaConfig(d_vocab=13, d_model=16, n_layers=1, n_ctx=17, d_state=5)).eval()
    _, now = model.run_with_cache(tokens)
    with model.hooks(present_only(model)):
        _, plain = model.run_with_cache(tokens)
    ssm, point = model.blocks[0].ssm, "blocks.0.ssm.hook_"
    u, (delta, b, c) = plain[point + "u"], (now[point + name] for name in ("delta", "B", "C"))
    y, _ = selective_scan(u, delta, ssm.A, b, c)
    out = (y + ssm.D * u) * now[point + "gate"]
    stream = now["blocks.0.hook_resid_pre"] + model.blocks[0].out_proj(out)
    expected = model.unembed(model.ln_final(stream))[:, -1, 0]
    effect = role_without_lags(model, tokens, ["u"], metric=last_logit, generator=generator)
    torch.testing.assert_close(effect.changed, expected)


def test_exchanged_lags_of_a_state_space_role_leave_the_others_as_they_were(tokens, generator):
    """u with the lags of other tokens; B, C and Δ, which u feeds, from these."""
    model = Mamba(MambaConfig(d_vocab=13, d_model=16, n_layers=1, n_ctx=17, d_state=5)).eval()
    other = repeated_tokens(7, (3, 5), 11, 13, generator=generator)
    _, now = model.run_with_cache(tokens)
    _, then = model.run_with_cache(other)
    conv, ssm = model.blocks[0].conv, model.blocks[0].ssm
    mixed = conv.bias + conv.weight[:, 0] * now["blocks.0.conv.hook_in"]
    for lag in range(1, 4):
        mixed[:, lag:] += conv.weight[:, lag] * then["blocks.0.conv.hook_in"][:, :-lag]
    u = torch.nn.functional.silu(mixed)
    delta, b, c, gate = (now[f"blocks.0.ssm.hook_{p}"] for p in ("delta", "B", "C", "gate"))
    y, _ = selective_scan(u, delta, ssm.A, b, c)
    stream = now["blocks.0.hook_resid_pre"] + model.blocks[0].out_proj((y + ssm.D * u) * gate)
    found = model.run_with_hooks(tokens, fwd_hooks=exchange_lags(model, tokens, other, ["u"]))
    torch.testing.assert_close(found, model.unembed(model.ln_final(stream)))


def test_an_effect_knows_its_interval():
    effect = Effect("x", torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 1.5, 2.5]))
    assert effect.mean() == pytest.approx(-0.5)
    assert effect.interval() == pytest.approx((-0.5, -0.5))
    assert effect.control != effect.control  # NaN without controls
    assert "-0.500" in repr(effect)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t, g: keep_lags(m, "blocks.0.attn", [0]), r"no convolution.*'blocks.0.conv'"),
        (
            lambda m, t, g: ablate(m, t, Component("blocks.0.attn.hook_z", (5,)), generator=g),
            r"units \[5\].*0\.\.2",
        ),
        (lambda m, t, g: ablate(m, t, "blocks.0.attn.hook_z", how="none", generator=g), "how must"),
        (lambda m, t, g: ablate(m, t, "blocks.0.attn.hook_zz", generator=g), "nearest"),
        (
            lambda m, t, g: role_without_lags(m, t, "x", generator=g),
            r"roles must be some of 'q', 'k', 'v'",
        ),
        (
            lambda m, t, g: role_without_lags(m, t, [], generator=g),
            r"roles must be some of 'q', 'k', 'v' in 'blocks.0' of this ConvAttn, got \[\]",
        ),
        (
            lambda m, t, g: role_without_lags(m, t, "k", block="blocks.1", generator=g),
            r"block 'blocks.1' of this ConvAttn has no attention.*that have one: \['blocks.0'\]",
        ),
        (
            lambda m, t, g: keep_lags(m, "blocks.0.conv", [2, 7]),
            r"keep must be some of the lags of 'blocks.0.conv', \[0, 1, 2, 3\], got \[7\] in it",
        ),
        (
            lambda m, t, g: exchange_lags(m, t, t[:3], "k"),
            r"other \[3, 11\] must be as tokens are, \[7, 11\]",
        ),
    ],
)
def test_bad_input_is_named(model, tokens, generator, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, tokens, generator)


def test_present_only_needs_something_to_remove(tokens):
    model = ConvAttn(ConvAttnConfig(**SIZES, conv_on=None))
    with pytest.raises(ValueError, match="has no convolution and no smearing"):
        present_only(model)


def test_measuring_leaves_nothing_attached(model, tokens):
    before = model(tokens)
    measure_with(model, tokens, present_only(model), last_logit)
    assert torch.equal(before, model(tokens))
