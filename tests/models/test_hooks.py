"""Hooks and caches: what they may do, what they must not, and how wrong use is explained."""

import logging
import re

import pytest
import torch
from tests.models.zoo import SIZES, TOKENS, every_model
from torch import nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.head_detector import detect_head
from transformer_lens.model_protocol import TransformerLensModel

from smearlens import AttnAttn, AttnAttnConfig, ConvAttn, ConvAttnConfig, HookPoint
from smearlens._hooks import caching_hook, is_hooked

PATTERN = "blocks.0.attn.hook_pattern"


@pytest.fixture
def model(variant):
    return variant.factory().eval()


@pytest.fixture
def small():
    return ConvAttn(ConvAttnConfig(**SIZES, kernel_size=5, smear=True, residual=True)).eval()


@pytest.fixture
def deep():
    return AttnAttn(AttnAttnConfig(**SIZES, n_layers=2, mlp=True)).eval()


def zero_in_place(tensor, hook):
    tensor.zero_()


def enlarge_in_place(tensor, hook):
    tensor.mul_(1.5)


# Caches --------------------------------------------------------------------------------------


@every_model
def test_edits_in_place_act_on_the_model_and_not_on_what_was_cached(variant, model):
    before, after, seen_before, seen_after = {}, {}, {}, {}
    hooks = []
    for name in model.hook_dict:
        hooks += [
            (name, caching_hook(before)),
            (name, lambda t, hook: seen_before.update({hook.name: t.clone()})),
            (name, enlarge_in_place),
            (name, caching_hook(after)),
            (name, lambda t, hook: seen_after.update({hook.name: t.clone()})),
        ]
    edited = model.run_with_hooks(*variant.inputs, fwd_hooks=hooks)
    for name in model.hook_dict:
        assert torch.equal(before[name], seen_before[name]), name
        assert torch.equal(after[name], seen_after[name]), name
        torch.testing.assert_close(after[name], before[name] * 1.5, msg=name)
    returned = [(lambda name: True, lambda t, hook: t * 1.5)]
    assert torch.equal(edited, model.run_with_hooks(*variant.inputs, fwd_hooks=returned))
    assert not torch.allclose(edited, model(*variant.inputs))


class TwoNames(HookedRootModule):
    """A module of TransformerLens with our points: two names for one tensor."""

    def __init__(self):
        super().__init__()
        self.hook_one, self.hook_two = HookPoint(), HookPoint()
        self.setup()

    def forward(self, x):
        return self.hook_two(self.hook_one(x)) + 1


def test_the_public_hook_point_protects_caches_in_a_module_of_transformer_lens():
    model, x = TwoNames(), torch.rand(2, 3, 5)
    with model.hooks([("hook_two", zero_in_place)]):
        out, cache = model.run_with_cache(x)
    assert torch.equal(cache["hook_one"], x)
    assert torch.equal(out, torch.ones(2, 3, 5))


def test_the_next_block_cannot_reach_into_the_cached_output_of_the_last(deep):
    _, clean = deep.run_with_cache(TOKENS)
    with deep.hooks([("blocks.1.hook_resid_pre", zero_in_place)]):
        _, cache = deep.run_with_cache(TOKENS)
    last = "blocks.0.hook_resid_post"
    assert torch.equal(cache[last], clean[last])
    assert not cache["blocks.1.hook_resid_pre"].any()


@every_model
def test_a_cache_does_not_follow_the_weights(variant, model):
    _, cache = model.run_with_cache(*variant.inputs)
    before = {name: tensor.clone() for name, tensor in cache.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for name, tensor in before.items():
        assert torch.equal(cache[name], tensor), name


def test_cached_gradients_do_not_follow_a_second_backward(small):
    _, cache = small.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    before = {name: tensor.clone() for name, tensor in cache.items()}
    small.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    small.zero_grad(set_to_none=False)
    assert all(torch.equal(cache[name], tensor) for name, tensor in before.items())


@every_model
def test_incl_bwd_keeps_the_gradient_of_every_hook(variant, model):
    loss, cache = model.run_with_cache(*variant.inputs, return_type="loss", incl_bwd=True)
    assert set(cache.keys()) == {f"{n}{end}" for n in model.hook_dict for end in ("", "_grad")}
    kept = {}

    def keep(tensor, hook):
        kept[hook.name] = tensor
        if not tensor.requires_grad:
            tensor.requires_grad_()

    again = model.run_with_hooks(
        *variant.inputs, return_type="loss", fwd_hooks=[(lambda name: True, keep)]
    )
    gradients = torch.autograd.grad(again, list(kept.values()))
    for name, gradient in zip(kept, gradients, strict=True):
        torch.testing.assert_close(cache[f"{name}_grad"], gradient, msg=name)
    torch.testing.assert_close(loss, again)


@pytest.mark.parametrize(
    "names",
    [PATTERN, [PATTERN], (PATTERN,), {PATTERN}, lambda name: name.endswith("hook_pattern")],
    ids=["name", "list", "tuple", "set", "predicate"],
)
def test_a_filter_keeps_what_it_names(small, names):
    logits, cache = small.run_with_cache(TOKENS, names_filter=names)
    assert list(cache.keys()) == [PATTERN]
    torch.testing.assert_close(logits, small(TOKENS))


def test_the_cache_of_one_sequence_may_drop_its_batch_axis_but_weights_have_none():
    one_head = {**SIZES, "n_heads": 1}
    model = ConvAttn(ConvAttnConfig(**one_head, smear=True)).eval()
    _, whole = model.run_with_cache(TOKENS[:1])
    _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    for name, tensor in whole.items():
        weight = name.endswith(("hook_kernel", "smear.hook_weight"))
        assert torch.equal(cache[name], tensor if weight else tensor[0]), name
    assert not cache.has_batch_dim


@pytest.mark.parametrize(
    ("pos_slice", "index"), [(2, [2]), ((1, 4), slice(1, 4)), ([5, 0], [5, 0]), (-1, [-1])]
)
def test_pos_slice_keeps_positions_of_activations_and_weights_whole(small, pos_slice, index):
    _, whole = small.run_with_cache(TOKENS)
    _, cache = small.run_with_cache(TOKENS, pos_slice=pos_slice)
    for name, tensor in whole.items():
        expected = tensor
        if name.endswith(("hook_attn_scores", "hook_pattern")):
            expected = tensor[:, :, index]  # its queries
        elif tensor.ndim > 2:
            expected = tensor[:, index]
        assert torch.equal(cache[name], expected), name


def test_pos_slice_and_one_sequence_together(small):
    _, whole = small.run_with_cache(TOKENS[:1])
    _, cache = small.run_with_cache(TOKENS[:1], pos_slice=3, remove_batch_dim=True)
    assert torch.equal(cache["hook_embed"], whole["hook_embed"][0, 3:4])
    assert torch.equal(cache[PATTERN], whole[PATTERN][0, :, 3:4])
    assert cache["hook_embed"].untyped_storage().nbytes() == 12 * 4, "the rest is still held"


def test_device_and_clear_contexts_are_passed_on(small):
    small.hook_dict["hook_embed"].ctx["old"] = 1
    _, cache = small.run_with_cache(TOKENS, device="cpu", clear_contexts=True)
    assert cache[PATTERN].device.type == "cpu"
    assert small.hook_dict["hook_embed"].ctx == {}


def test_caching_hooks_stay_if_asked_and_go_with_reset(small):
    _, cache = small.run_with_cache(TOKENS, names_filter=PATTERN, reset_hooks_end=False)
    first = cache[PATTERN]
    small(TOKENS + 1 - TOKENS)
    assert not torch.equal(cache[PATTERN], first)
    small.reset_hooks()
    assert not list(small._handles())


# Editing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_edit_in_place_counts_however_it_is_made(small, mode):
    def through_data(tensor, hook):
        tensor.data.zero_()

    with mode():
        clean = small(TOKENS)
        for hook in (zero_in_place, through_data):
            edited = small.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.conv.hook_out", hook)])
            silenced = small.run_with_hooks(
                TOKENS, fwd_hooks=[("blocks.0.conv.hook_kernel", lambda w, hook: w * 0)]
            )
            torch.testing.assert_close(edited, silenced)
            assert not torch.allclose(edited, clean)
        untouched = small.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", lambda t, hook: None)])
        assert torch.equal(untouched, clean)


def test_hooks_on_one_name_act_in_order(small):
    seen = []
    hooks = [
        ("hook_embed", lambda t, hook: t * 0 + 3),
        ("hook_embed", lambda t, hook: seen.append(float(t.detach().mean()))),
        ("hook_embed", lambda t, hook: t.add_(1)),
        ("hook_embed", lambda t, hook: seen.append(float(t.detach().mean()))),
    ]
    small.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert seen == [3.0, 4.0]


def test_a_pattern_is_replaced_by_a_hook(deep):
    def previous_only(pattern, hook):
        pattern.zero_()
        pattern[..., 1:, :-1] = torch.eye(pattern.shape[-1] - 1)
        return pattern

    with deep.hooks([(PATTERN, previous_only)]):
        _, cache = deep.run_with_cache(TOKENS)
    assert torch.equal(cache["z", 0][:, 1:], cache["v", 0][:, :-1])
    assert not cache["z", 0][:, 0].any()


def test_a_backward_hook_may_return_a_tensor_a_tuple_or_edit_in_place(small):
    def gradient(*bwd_hooks):
        small.zero_grad()
        with small.hooks(bwd_hooks=[("blocks.0.hook_attn_out", h) for h in bwd_hooks]):
            small(TOKENS, return_type="loss").backward()
        return small.blocks[0].attn.out_proj.weight.grad.clone()

    plain = gradient()
    for enlarge in (
        lambda g, hook: g * 1.5,
        lambda g, hook: (g * 1.5,),
        enlarge_in_place,
    ):
        torch.testing.assert_close(gradient(enlarge), 1.5 * plain)
    assert torch.equal(gradient(lambda g, hook: None), plain)
    torch.testing.assert_close(
        gradient(lambda g, hook: g * 1.5, lambda g, hook: None),
        1.5 * plain,
        msg="reading undid an edit",
    )


def test_a_later_edit_of_a_gradient_does_not_reach_a_cached_one(small):
    name, kept, seen = "blocks.0.attn.hook_z", {}, []
    hooks = [
        (name, caching_hook(kept, backward=True)),
        (name, lambda g, hook: seen.append(g.clone())),
        (name, enlarge_in_place),
    ]
    with small.hooks(bwd_hooks=hooks):
        small(TOKENS, return_type="loss").backward()
    assert list(kept) == [f"{name}_grad"]
    assert torch.equal(kept[f"{name}_grad"], seen[0])


@pytest.mark.parametrize("side", ["fwd_hooks", "bwd_hooks"])
def test_a_hook_that_returns_something_else_is_explained(small, side):
    def run(hook):
        with small.hooks(**{side: [(PATTERN, hook)]}):
            small(TOKENS, return_type="loss").backward()

    with pytest.raises(ValueError, match=re.escape(
        f"hook on '{PATTERN}' returned shape (2, 3, 7) for an activation of shape (2, 3, 7, 7); "
        "return a tensor of the same shape"
    )):  # fmt: skip
        run(lambda t, hook: t[..., 0])
    with pytest.raises(TypeError, match=f"hook on '{PATTERN}' returned list; return a tensor of"):
        run(lambda t, hook: [t])
    assert not is_hooked(small.hook_dict[PATTERN])


def test_a_hook_knows_its_point_and_may_keep_notes(small):
    def note(tensor, hook):
        hook.ctx["mean"] = tensor.mean()

    small.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", note)])
    assert small.hook_dict["hook_embed"].ctx.keys() == {"mean"}
    assert small.hook_dict[PATTERN].layer() == 0


# Attaching and leaving -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("blocks.0.attn.hook_patern", PATTERN),
        ("blocks.1.attn.hook_pattern", PATTERN),
        ("hook_embd", "hook_embed"),
        ("blocks.0.conv.hook_kernels", "blocks.0.conv.hook_kernel"),
        ("blocks.0.attn", "blocks.0.attn.hook_q"),  # a module, but no hook
    ],
)
def test_an_unknown_name_raises_with_the_right_one_nearby(small, wrong, right):
    attempts = [
        lambda: small.run_with_hooks(TOKENS, fwd_hooks=[(wrong, zero_in_place)]),
        lambda: small.run_with_hooks(TOKENS, bwd_hooks=[(wrong, zero_in_place)]),
        lambda: small.add_hook(wrong, zero_in_place),
        lambda: small.add_perma_hook(wrong, zero_in_place),
        lambda: small.run_with_cache(TOKENS, names_filter=wrong),
        lambda: small.run_with_cache(TOKENS, names_filter=[PATTERN, wrong]),
        lambda: small.get_caching_hooks(wrong),
        lambda: small.add_caching_hooks([wrong]),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=re.escape(f"no hook '{wrong}' in ConvAttn")) as error:
            attempt()
        assert f"'{right}'" in str(error.value).partition("nearest: ")[2]
    assert not list(small._handles())


def test_a_hook_that_cannot_fire_in_this_configuration_raises_when_attached(deep):
    for name in ("blocks.0.conv.hook_out", "blocks.0.attn.smear.hook_weight"):
        with pytest.raises(ValueError, match=f"no hook '{name}' in AttnAttn"):
            deep.add_hook(name, zero_in_place)


@pytest.mark.parametrize("empty", [[], (), lambda name: False, lambda name: "conv9" in name])
def test_a_filter_that_accepts_nothing_raises(small, empty):
    with pytest.raises(ValueError, match=r"names_filter accepts none of the 16 hooks of ConvAttn"):
        small.run_with_cache(TOKENS, names_filter=empty)
    if callable(empty):
        with pytest.raises(ValueError, match=r"name accepts none of the 16 hooks of ConvAttn"):
            small.run_with_hooks(TOKENS, fwd_hooks=[(empty, zero_in_place)])


def test_predicates_attach_to_all_they_accept(deep):
    seen = []
    deep.run_with_hooks(
        TOKENS, fwd_hooks=[(lambda n: n.endswith("hook_z"), lambda t, hook: seen.append(hook.name))]
    )
    assert seen == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]


def test_nothing_stays_attached_when_the_second_of_two_hooks_is_wrong(small):
    for wrong in [("hook_embd", zero_in_place), ("hook_embed", None)]:
        with pytest.raises((ValueError, TypeError)):
            small.run_with_hooks(TOKENS, fwd_hooks=[(PATTERN, zero_in_place), wrong])
        assert not list(small._handles())


def test_blocks_nest_and_end_in_order(small):
    clean = small(TOKENS)
    with small.hooks([("hook_embed", zero_in_place)]):
        outer = small(TOKENS)
        with small.hooks([("hook_pos_embed", zero_in_place)]):
            assert not torch.equal(small(TOKENS), outer)
        assert torch.equal(small(TOKENS), outer)
    assert torch.equal(small(TOKENS), clean)


def test_an_exception_inside_ends_the_inner_block_only(small):
    with small.hooks([("hook_embed", zero_in_place)]):
        outer = small(TOKENS)
        with pytest.raises(KeyboardInterrupt), small.hooks([(PATTERN, zero_in_place)]):
            raise KeyboardInterrupt
        assert torch.equal(small(TOKENS), outer)
        assert [point.name for point, _ in small._handles()] == ["hook_embed"]


def test_reset_hooks_spares_permanent_ones(small):
    small.add_perma_hook("hook_embed", zero_in_place)
    small.add_hook(PATTERN, zero_in_place)
    small.reset_hooks()
    assert [point.name for point, _ in small._handles()] == ["hook_embed"]
    small.reset_hooks(including_permanent=True)
    assert not list(small._handles())


def test_a_handle_remembers_the_hook_as_it_was_given(small):
    handle = small.hook_dict["hook_embed"].add_hook(zero_in_place)
    assert handle.user_hook is zero_in_place
    assert small.list_hooks() == {"hook_embed": [handle]}


@pytest.mark.parametrize(
    "register",
    [
        lambda point: point.add_hook(zero_in_place),
        lambda point: point.add_hook(zero_in_place, "bwd"),
        lambda point: point.register_forward_hook(lambda *a: None),
        lambda point: point.register_forward_pre_hook(lambda *a: None),
        lambda point: point.register_full_backward_hook(lambda *a: None),
        lambda point: point.register_full_backward_pre_hook(lambda *a: None),
    ],
)
def test_whatever_is_attached_to_a_point_is_noticed(register):
    point = HookPoint()
    assert not is_hooked(point)
    register(point)
    assert is_hooked(point)


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_what_torch_attaches_to_a_point_runs(pre, backward):
    point, seen = HookPoint(), []
    x = torch.ones(3, requires_grad=True)
    assert point(x) is x
    direction = "full_backward" if backward else "forward"
    register = getattr(point, f"register_{direction}{'_pre' if pre else ''}_hook")
    handle = register(lambda *given: seen.append(1))
    point(x).sum().backward()
    assert seen == [1]
    handle.remove()
    assert point(x) is x


# TransformerLens -----------------------------------------------------------------------------


@every_model
def test_models_speak_the_protocol_of_transformer_lens(variant, model):
    assert isinstance(model, TransformerLensModel)
    assert isinstance(model, HookedRootModule)
    cfg, config = model.cfg, model.config
    assert (cfg.n_layers, cfg.d_model, cfg.d_vocab, cfg.n_ctx) == (
        config.n_layers, config.d_model, config.d_vocab, config.n_ctx,
    )  # fmt: skip
    assert (cfg.device, cfg.dtype) == (torch.device("cpu"), torch.float32)
    assert model.double().cfg.dtype == torch.float64


def test_the_cache_is_theirs_with_its_shorthands(deep):
    _, cache = deep.run_with_cache(TOKENS)
    assert isinstance(cache, ActivationCache)
    assert cache["pattern", 1, "attn"] is cache["blocks.1.attn.hook_pattern"]
    assert cache["resid_post", 0] is cache["blocks.0.hook_resid_post"]
    assert cache["resid_post", -1] is cache["blocks.1.hook_resid_post"]
    assert cache["embed"] is cache["hook_embed"]
    stack, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "final_post"]
    assert torch.equal(stack[1], cache["blocks.1.hook_resid_pre"])
    torch.testing.assert_close(deep.unembed(stack[-1]), deep(TOKENS))
    assert cache.stack_activation("pattern").shape == (2, 2, 3, 7, 7)
    heads = cache.stack_head_results()  # layer and head first
    torch.testing.assert_close(heads[3:].sum(0), cache["attn_out", 1])


def test_their_logit_lens_applies_the_final_norm():
    model = AttnAttn(AttnAttnConfig(**SIZES, n_layers=3, norm=True)).eval()
    logits, cache = model.run_with_cache(TOKENS)
    stack = cache.accumulated_resid(apply_ln=True)
    torch.testing.assert_close(model.unembed(stack[-1]), logits)
    assert (model.cfg.normalization_type, model.cfg.attn_only) == ("LN", True)


def test_contributions_to_the_stream_add_up(deep):
    _, cache = deep.run_with_cache(TOKENS)
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    torch.testing.assert_close(parts.sum(0), cache["resid_post", 1])


@pytest.mark.parametrize("kind", ["previous_token_head", "induction_head", "duplicate_token_head"])
def test_their_head_detector_reads_our_models(deep, kind):
    tokens = torch.tensor([[3, 1, 4, 3, 1, 4, 3, 1]])
    scores = detect_head(deep, tokens, kind)
    _, cache = deep.run_with_cache(tokens)
    lags = {"previous_token_head": [1], "induction_head": [2, 5], "duplicate_token_head": [3, 6]}
    first = int(kind == "induction_head")  # key 0 followed nothing
    for layer in range(2):
        pattern = cache["pattern", layer][0]
        mass = sum(pattern.diagonal(-lag, 1, 2)[:, first:].sum(-1) for lag in lags[kind])
        torch.testing.assert_close(scores[layer], mass / 8, rtol=0, atol=6e-4)  # theirs are rounded


def test_their_warning_about_backward_hooks_that_cannot_fire_is_kept(small, caplog):
    with caplog.at_level(logging.WARNING):
        small.run_with_hooks(TOKENS, bwd_hooks=[("hook_embed", zero_in_place)])
    assert "removes the backward hooks before a backward pass can occur" in caplog.text


def test_hook_points_are_plain_modules_without_a_model():
    point = HookPoint()
    point.add_hook(lambda t, hook: t + 1)
    assert torch.equal(point(torch.zeros(2)), torch.ones(2))
    assert isinstance(point, nn.Module)
