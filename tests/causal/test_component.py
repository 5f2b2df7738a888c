"""Which units of which activation: axes of every hook, hooks of one's own, and weights."""

import re

import pytest
import torch
from tests.models.zoo import VARIANTS

from smearlens import (
    ConvAttn,
    ConvAttnConfig,
    ablate,
    attribution,
    induction_loss,
    patch_activation,
    patch_path,
    repeated_tokens,
)
from smearlens._hooks import HookedRootModule, HookPoint
from smearlens.causal.component import AXES, Component
from smearlens.models.base import HookedModel

SIZES = {"d_vocab": 13, "d_model": 12, "n_heads": 3, "n_ctx": 17}
KERNEL, WEIGHT = "blocks.0.conv.hook_kernel", "blocks.0.attn.smear.hook_weight"


class Own(HookedRootModule):
    """Uniform weights on the past behind a hook that the library does not know."""

    def __init__(self):
        super().__init__()
        self.my_pattern = HookPoint()  # [batch head query key]
        self.setup()

    def forward(self, tokens):
        (batch, length), heads = tokens.shape, torch.arange(1.0, 4)
        uniform = torch.ones(batch, 3, length, length).tril().cumsum(-1) * heads[:, None, None]
        self.seen = self.my_pattern(uniform * (tokens[:, None, None] + 1))
        return self.seen


def total(values, tokens):
    return values.flatten(1).sum(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_axis_of_every_hook_is_known_and_has_its_units(variant):
    model: HookedModel = variant.factory().eval()
    _, cache = model.run_with_cache(*variant.inputs)
    sizes = {"hook_pattern": 3, "hook_attn_scores": 3, "hook_q": 3, "hook_k": 3, "hook_v": 3,
             "hook_z": 3, "hook_weight": 3}  # fmt: skip
    channels = {"hook_A_bar", "hook_B_bar", "hook_write", "hook_state"}
    for name in model.hook_dict:
        component, value = Component(name), cache[name]
        assert component.axis == AXES[component.point]
        units = value.shape[component.unit_axis(value)]
        if component.point in channels:
            assert units == cache[f"{name.rpartition('.')[0]}.hook_u"].shape[-1]
        else:
            assert units == sizes.get(component.point, value.shape[-1])


def test_units_of_one_s_own_hook_need_an_axis():
    message = r"units of 'my_pattern': no layer of this library.*\('my_pattern', \.\.\., axis=\)"
    with pytest.raises(ValueError, match=message):
        Component("my_pattern", (0,))
    own, tokens = Own(), torch.tensor([[4, 1, 2, 5], [3, 0, 2, 2]])
    plain = own(tokens).clone()
    given = {"metric": total, "generator": seeded()}
    effect = ablate(own, tokens, Component("my_pattern", (0,), axis=1), **given)
    torch.testing.assert_close(effect.changed, plain[:, 1:].flatten(1).sum(1))
    assert effect.controls is not None
    assert effect.controls.shape == (5, 2)
    keys = ablate(own, tokens, Component("my_pattern", (0,), axis=-1), **given)
    torch.testing.assert_close(keys.changed, plain[..., 1:].flatten(1).sum(1))
    mean = ablate(own, tokens, Component("my_pattern", axis=-3), how="mean", **given)
    torch.testing.assert_close(mean.changed, plain.mean(0).sum().expand(2))


def test_an_axis_is_a_number():
    with pytest.raises(TypeError, match="axis must be an int or None, got 'head'"):
        Component("my_pattern", (0,), "head")  # pyrefly: ignore
    with pytest.raises(TypeError, match="Component: name must be str, got 3"):
        Component(3)  # pyrefly: ignore


def test_what_depends_on_the_axes_of_one_s_own_hook_asks_for_them():
    own, tokens = Own(), torch.tensor([[4, 1, 2, 5], [3, 0, 2, 2]])
    with pytest.raises(ValueError, match=r"^the mean of 'my_pattern': no layer"):
        ablate(own, tokens, "my_pattern", how="mean", metric=total, generator=seeded())
    other = tokens.flip(0)
    with pytest.raises(ValueError, match=r"^positions of 'my_pattern': no layer"):
        patch_activation(own, tokens, other, "my_pattern", metric=total, positions=[1])
    found = patch_activation(
        own, tokens, other, Component("my_pattern", axis=1), metric=total, positions=[1]
    )
    mixed = own(other).clone()
    mixed[:, :, 1] = own(tokens)[:, :, 1]
    torch.testing.assert_close(found.patched, total(mixed, None))
    with pytest.raises(ValueError, match=r"axis=4 of my_pattern: its 4 axes are \[2, 3, 4, 4\]"):
        ablate(own, tokens, Component("my_pattern", (0,), axis=4), metric=total, generator=seeded())


def test_a_patch_of_units_that_do_not_exist_is_refused():
    own, tokens = Own(), torch.tensor([[4, 1, 2, 5], [3, 0, 2, 2]])
    with pytest.raises(ValueError, match=r"units \[3\] of my_pattern: allowed are 0\.\.2"):
        patch_activation(own, tokens, tokens, Component("my_pattern", (1, 3), 1), metric=total)


def test_one_number_per_example_has_examples_and_one_for_all_has_none():
    class Sums(Own):
        def __init__(self):
            super().__init__()
            self.my_sum, self.my_scale = HookPoint(), HookPoint()
            self.setup()

        def forward(self, tokens):
            scale = self.my_scale(torch.tensor(2.0))
            return self.my_sum(super().forward(tokens).sum((1, 2, 3)))[:, None] * scale

    own, tokens = Sums(), torch.tensor([[4, 1, 2, 5], [3, 0, 2, 2]])
    found = patch_activation(own, tokens, tokens.flip(0), "my_sum", metric=total)
    torch.testing.assert_close(found.patched, own(tokens)[:, 0])
    with pytest.raises(ValueError, match=r"a patch needs an activation of each.*my_scale \[\]"):
        patch_activation(own, tokens, tokens, "my_scale", metric=total)


def test_units_of_a_kernel_are_taps_and_of_smearing_heads():
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=4, smear=True)).eval()
    tokens = repeated_tokens(5, 3, 11, 13, generator=seeded())
    given = {"metric": lambda logits, tokens: logits[:, -1, 0], "generator": seeded()}
    tap = ablate(model, tokens, Component(KERNEL, (1,)), **given)
    head = ablate(model, tokens, Component(WEIGHT, (2,)), **given)
    assert tap.controls is not None
    assert head.controls is not None
    with torch.no_grad():
        before = model.blocks[0].conv.weight[:, 1].clone()
        model.blocks[0].conv.weight[:, 1] = 0
        torch.testing.assert_close(tap.changed, model(tokens)[:, -1, 0])
        model.blocks[0].conv.weight[:, 1] = before
        model.blocks[0].attn.smear.alpha[2] = 200.0
        torch.testing.assert_close(head.changed, model(tokens)[:, -1, 0])


@pytest.mark.parametrize("name", [KERNEL, WEIGHT])
@pytest.mark.parametrize("batch", [3, 12])  # as many as heads, as channels
def test_weights_have_no_examples(name, batch):
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=4, smear=True)).eval()
    tokens = repeated_tokens(batch, 3, 11, 13, generator=seeded())
    message = re.escape(f"needs an activation of each example; {name} ") + r".*keep_lags"
    for how in ("mean", "mean_by_position", "resample"):
        with pytest.raises(ValueError, match=f"how='{how}' {message}"):
            ablate(model, tokens, name, how=how, generator=seeded())
    for call in (
        lambda: patch_activation(model, tokens, tokens, name, metric=induction_loss),
        lambda: patch_path(model, tokens, tokens, "hook_embed", name, metric=induction_loss),
        lambda: patch_path(model, tokens, tokens, name, "hook_embed", metric=induction_loss),
        lambda: attribution(model, tokens, tokens, [name], metric=induction_loss),
    ):
        with pytest.raises(ValueError, match=f"a patch {message}"):
            call()
