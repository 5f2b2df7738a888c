"""What every model promises, whatever its architecture. New models are added in `zoo.py`."""

import re
from collections import Counter

import pytest
import torch
from tests.models.zoo import VARIANTS, causal_models, every_interface, every_model, over

from smearlens.nn.attention import Attention

# The interface. Module (a pattern) → hook → axes; equal words are equal sizes within a model, or
# within a module for those that `OWN` lists.
OWN = ("channel", "tap", "d_mlp", "d_state")
CONV = {
    "hook_in": "batch pos channel",
    "hook_out": "batch pos channel",
    "hook_kernel": "channel tap",
}
ATTENTION = {
    "hook_q": "batch pos head d_head",
    "hook_k": "batch pos head d_head",
    "hook_v": "batch pos head d_head",
    "hook_z": "batch pos head d_head",
    "hook_attn_scores": "batch head pos pos",
    "hook_pattern": "batch head pos pos",
}
CROSS = {
    **ATTENTION,
    "hook_k": "batch source head d_head",
    "hook_v": "batch source head d_head",
    "hook_attn_scores": "batch head pos source",
    "hook_pattern": "batch head pos source",
}
SSM = {
    **dict.fromkeys(
        ["hook_u", "hook_delta_raw", "hook_delta", "hook_gate", "hook_y"], "batch pos channel"
    ),
    **dict.fromkeys(["hook_B", "hook_C"], "batch pos d_state"),
    **dict.fromkeys(
        ["hook_A_bar", "hook_B_bar", "hook_write", "hook_state"], "batch pos channel d_state"
    ),
}
STREAM = dict.fromkeys(["hook_resid_pre", "hook_resid_post"], "batch pos d_model")
SIDE = r"((en|de)coder\.)?"  # of an encoder-decoder
TABLE = {
    r"(encoder|decoder)?": {"hook_embed": "batch pos d_model"},
    SIDE + r"blocks\.\d+": STREAM,
    SIDE + r"blocks\.\d+\.attn": ATTENTION,
    r"decoder\.blocks\.\d+\.cross_attn": CROSS,
    r"blocks\.\d+\.attn\.smear": {"hook_weight": "head"},
    r"blocks\.\d+\.attn\.conv_[qkv]": CONV,
    r"blocks\.\d+\.conv": CONV,
    r"blocks\.\d+\.ssm": SSM,
    SIDE + r"blocks\.\d+\.mlp": {"hook_post": "batch pos d_mlp"},
}
# Hooks that come with a part of the model: present exactly if the part is.
WITH_PART = {f"hook_{part}_out": part for part in ("attn", "cross_attn", "conv", "ssm", "mlp")}


@pytest.fixture
def model(variant):
    return variant.factory().eval()


def interface(names):
    """The hooks that a model with these hook names must have, by the table: name → axes."""
    modules = {name.rpartition(".")[0] for name in names}
    expected = {}
    for module in modules:
        (rows,) = [rows for pattern, rows in TABLE.items() if re.fullmatch(pattern, module)]
        expected |= {f"{module}.{hook}".lstrip("."): axes for hook, axes in rows.items()}
        if re.fullmatch(SIDE + r"blocks\.\d+", module):
            for hook, part in WITH_PART.items():
                inside = part == "conv" and f"{module}.ssm" in modules
                if f"{module}.{part}" in modules and not inside:
                    expected[f"{module}.{hook}"] = "batch pos d_model"
    return {
        name: axes.replace("pos", "source") if name.startswith("encoder.") else axes
        for name, axes in expected.items()
    }


@every_model
def test_hooks_have_the_names_and_shapes_of_the_interface(variant, model):
    expected = interface(model.hook_dict)
    stacks = {"": model} if variant.source is None else dict(model.named_children())
    stacks.pop("unembed", None)
    for side, stack in stacks.items():
        axes = "batch source d_model" if side == "encoder" else "batch pos d_model"
        if stack.pos_embed is not None:
            expected[f"{side}.hook_pos_embed".lstrip(".")] = axes
        last = f"{side}.blocks.{model.config.n_layers - 1}.hook_resid_post"
        assert last.lstrip(".") in expected
    assert set(model.hook_dict) == set(expected)
    _, cache = model.run_with_cache(*variant.inputs)
    sizes = dict(zip(("batch", "pos"), variant.tokens.shape, strict=True))
    sizes["source"] = 0 if variant.source is None else variant.source.shape[1]
    sizes |= {"d_model": model.cfg.d_model, "head": model.cfg.n_heads, "d_head": model.cfg.d_head}
    for name, axes in expected.items():
        words = axes.split()
        assert cache[name].ndim == len(words), name
        for word, size in zip(words, cache[name].shape, strict=True):
            key = (name.rpartition(".")[0], word) if word in OWN else word
            assert sizes.setdefault(key, size) == size, (name, word)


def test_hook_names_spelled_out_for_four_models():
    stream = ["hook_resid_pre", "hook_attn_out", "hook_resid_post"]
    attention = [f"attn.{hook}" for hook in ATTENTION]
    expected = {
        "ConvAttn bare": [
            "hook_embed", "hook_pos_embed",
            *(f"blocks.0.{h}" for h in [*stream, *attention, "hook_conv_out"]),
            "blocks.0.conv.hook_in", "blocks.0.conv.hook_kernel", "blocks.0.conv.hook_out",
        ],
        "ConvAttn on k, smeared": [
            "hook_embed", *(f"blocks.0.{h}" for h in [*stream, *attention]),
            "blocks.0.attn.conv_k.hook_in", "blocks.0.attn.conv_k.hook_kernel",
            "blocks.0.attn.conv_k.hook_out", "blocks.0.attn.smear.hook_weight",
        ],
        "AttnAttn 2 layers": [
            "hook_embed", "hook_pos_embed",
            *(f"blocks.{b}.{h}" for b in range(2) for h in [*stream, *attention]),
        ],
        "AttnAttn 3 layers, full block": [
            "hook_embed",
            *(
                f"blocks.{b}.{h}" for b in range(3)
                for h in [*stream, *attention, "hook_mlp_out", "mlp.hook_post"]
            ),
        ],
    }  # fmt: skip
    found = {v.name: sorted(v.factory().hook_dict) for v in VARIANTS if v.name in expected}
    assert found == {name: sorted(hooks) for name, hooks in expected.items()}


@every_model
def test_each_hook_fires_once_forward_and_once_backward(variant, model):
    calls = Counter()

    def count(direction):
        return lambda tensor, hook: calls.update([(direction, hook.name)])

    with model.hooks(
        [(lambda name: True, count("forward"))], [(lambda name: True, count("backward"))]
    ):
        model(*variant.inputs, return_type="loss").backward()
    assert calls == {(d, name): 1 for d in ("forward", "backward") for name in model.hook_dict}


@every_model
def test_every_hook_is_on_the_path(variant, model):
    model.double()
    logits = model(*variant.inputs)
    for name in model.hook_dict:
        hook = (name, lambda t, hook: t + torch.randn_like(t))
        changed = model.run_with_hooks(*variant.inputs, fwd_hooks=[hook])
        assert (changed - logits).abs().max() > 1e-8, name


def value_and_gradients(model, inputs, names=None):
    """Logits, loss and the gradient of every parameter, with `names` hooked but untouched."""
    model.zero_grad()
    watch = [(names, lambda t, hook: None)] if names else []
    logits, loss = model.run_with_hooks(*inputs, return_type="both", fwd_hooks=watch)
    (loss + logits.square().mean()).backward()
    return [logits, loss, *(p.grad for p in model.parameters())]


@every_model
def test_hooked_and_unhooked_runs_agree_in_value_and_every_gradient(variant, model):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model = model.to(dtype)
        plain = value_and_gradients(model, variant.inputs)
        hooked = value_and_gradients(model, variant.inputs, names=lambda name: True)
        assert plain[1].dtype == dtype
        assert len(plain) == 2 + len(list(model.parameters()))
        torch.testing.assert_close(plain, hooked, rtol=tolerance, atol=tolerance)
        assert all(g.abs().max() > 0 for g in plain), "a parameter has no influence"


@over(*(variant for variant in VARIANTS if "Mamba" not in variant.name))
def test_only_a_hook_on_scores_or_pattern_leaves_the_fused_path(variant, model):
    for attn in (module for module in model.modules() if isinstance(module, Attention)):
        for name in [f"{attn.name}.{hook}" for hook in ATTENTION]:
            with model.hooks([(name, lambda t, hook: None)]):
                assert attn.fused == name.endswith(("hook_q", "hook_k", "hook_v", "hook_z"))
        assert attn.fused


@causal_models
def test_the_past_ignores_the_future(variant, model):
    logits = model(*variant.inputs)
    for t in range(variant.tokens.shape[1] - 1):
        other = variant.tokens.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 1) % model.config.d_vocab
        changed = model(*variant.given(other))
        torch.testing.assert_close(changed[:, : t + 1], logits[:, : t + 1], rtol=0, atol=1e-6)
        assert not torch.allclose(changed[:, t + 1], logits[:, t + 1])


@over(*(variant for variant in VARIANTS if not variant.causal))
def test_a_centred_convolution_reads_exactly_as_far_ahead_as_its_lags_say(variant, model):
    (conv,) = [m for m in model.modules() if hasattr(m, "lags")]
    logits = model(*variant.inputs)
    last = variant.tokens.shape[1] - 1
    other = variant.tokens.clone()
    other[:, last] = (other[:, last] + 1) % model.config.d_vocab
    moved = (model(*variant.given(other)) - logits).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [t >= last + min(conv.lags) for t in range(last + 1)]
    assert min(conv.lags) < 0


@every_model
def test_a_row_of_a_batch_equals_the_row_alone(variant, model):
    together = model(*variant.inputs)
    for row in range(len(variant.tokens)):
        alone = model(*(t[row : row + 1] for t in variant.inputs))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


@every_model
def test_a_run_repeats_bit_for_bit_and_leaves_tokens_alone(variant, model):
    inputs = [tokens.clone() for tokens in variant.inputs]
    first, cache = model.run_with_cache(*inputs)
    again, same = model.run_with_cache(*inputs)
    assert torch.equal(first, again)
    assert all(torch.equal(cache[name], same[name]) for name in model.hook_dict)
    assert all(map(torch.equal, inputs, variant.inputs))


@causal_models
def test_pieces_with_state_equal_one_full_run(variant, model, generator):
    full, length = model(*variant.inputs), variant.tokens.shape[1]
    for _ in range(5):
        cuts = torch.randperm(length - 1, generator=generator)[:3].add(1).sort().values
        state, logits = {}, []
        for piece in variant.tokens.tensor_split(cuts, dim=1):
            logits.append(model(*variant.given(piece), state=state))
        torch.testing.assert_close(torch.cat(logits, 1), full, rtol=1e-5, atol=1e-5)
    singly, state = [], {}
    for t in range(length):
        singly.append(model(*variant.given(variant.tokens[:, t : t + 1]), state=state))
    torch.testing.assert_close(torch.cat(singly, 1), full, rtol=1e-5, atol=1e-5)


@causal_models
def test_hooks_act_alike_on_pieces_and_on_the_whole(variant, model):
    with model.hooks([(lambda name: "hook_attn_scores" not in name, lambda t, hook: t * 1.5)]):
        full, state = model(*variant.inputs), {}
        split = [variant.given(piece) for piece in variant.tokens.split(3, dim=1)]
        pieces = [model(*piece, state=state) for piece in split]
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-4)


@over(*(variant for variant in VARIANTS if variant.causal and variant.source is None))
def test_greedy_generation_equals_full_recomputation(variant, model):
    prompt = variant.tokens[:, :3]
    expected = prompt
    for _ in range(model.config.n_ctx - 3):
        best = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, best), dim=1)
    found = model.generate(prompt, model.config.n_ctx - 3, temperature=0)
    assert torch.equal(found, expected)


@over(*(variant for variant in VARIANTS if not variant.causal))
def test_a_model_that_reads_ahead_refuses_to_generate(variant, model):
    with pytest.raises(ValueError, match="causal=False reads tokens that do not exist yet"):
        model.generate(variant.tokens, 2, temperature=0)


@every_model
def test_one_token_is_a_sequence(variant, model):
    logits = model(*variant.given(variant.tokens[:, :1]))
    assert logits.shape == (len(variant.tokens), 1, model.config.d_vocab)


class Boom(Exception):
    """What the hooks below raise."""


def boom(tensor, hook):
    hook.ctx["left behind"] = tensor
    raise Boom(hook.name)


def forward_with_hooks(model, inputs, name):
    model.run_with_hooks(*inputs, fwd_hooks=[(name, boom)])


def forward_with_cache(model, inputs, name):
    with model.hooks([(name, boom)], reset_hooks_end=False):
        model.run_with_cache(*inputs, return_type="loss", incl_bwd=True, names_filter=[name])


def forward_in_a_block(model, inputs, name):
    with model.hooks([(name, lambda t, hook: t * 1), (name, boom)]):
        model(*inputs)


def backward_with_hooks(model, inputs, name):
    with model.hooks():
        loss = model.run_with_hooks(
            *inputs, return_type="loss", bwd_hooks=[(name, boom)], reset_hooks_end=False
        )
        loss.backward()


def backward_with_cache(model, inputs, name):
    with model.hooks(bwd_hooks=[(name, boom)]):
        model.run_with_cache(*inputs, return_type="loss", incl_bwd=True, names_filter=[name])


def backward_in_a_block(model, inputs, name):
    with model.hooks([(name, lambda t, hook: t * 1)], [(name, boom)]):
        model(*inputs, return_type="loss").backward()


RUNS = [
    forward_with_hooks, forward_with_cache, forward_in_a_block,
    backward_with_hooks, backward_with_cache, backward_in_a_block,
]  # fmt: skip


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@every_interface
def test_an_exception_at_any_hook_leaves_nothing_behind(variant, model, run):
    first = next(iter(model.hook_dict))
    seen = Counter()
    model.add_perma_hook(first, lambda t, hook: t * 2)
    model.add_hook(first, lambda t, hook: seen.update([hook.name]))
    model.hook_dict[first].ctx["mine"] = 1
    before, attached = model(*variant.inputs), list(model._handles())
    assert len(attached) == 2
    for name in model.hook_dict:
        with pytest.raises(Boom, match=re.escape(name)):
            run(model, variant.inputs, name)
        assert list(model._handles()) == attached
        contexts = {n: point.ctx for n, point in model.hook_dict.items() if point.ctx}
        assert contexts == {first: {"mine": 1}}
        registered = sum(
            len(p._forward_hooks) + len(p._backward_hooks) for p in model.hook_points()
        )
        assert (registered, model.context_level) == (2, 0)
    assert torch.equal(model(*variant.inputs), before)
    assert seen[first] == 2 + len(model.hook_dict)
