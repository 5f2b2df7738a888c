"""Audits of broken models, of models in half precision, and of models of one's own."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from smearlens import ConvAttn, ConvAttnConfig, audit
from smearlens._hooks import HookPoint
from smearlens.causal.audit import Audit, count_targets
from smearlens.causal.leaks import (
    FutureRead,
    IidFloor,
    largest_change,
    reads_future,
    streaming_gap,
)
from smearlens.data.synthetic import iid_tokens
from smearlens.models.base import HookedModel

SIZES = {"d_vocab": 13, "d_model": 12, "n_heads": 3, "n_ctx": 17}
UNSURE = "gives logits or gradients that are not finite: nothing else is certain"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def conv(**changes):
    torch.manual_seed(0)
    return ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, **changes)).eval()


# Not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "change"),
    [
        ([1.0, 2.0], [1.5, 2.25], 0.5),
        ([math.nan, 2.0], [math.nan, 2.25], 0.25),
        ([math.inf, -math.inf, 2.0], [math.inf, -math.inf, 2.0], 0.0),
        ([math.nan, 1.0], [3.0, 1.0], math.inf),
        ([3.0], [math.nan], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([-math.inf], [2.0], math.inf),
        ([math.nan], [math.inf], math.inf),
    ],
)
def test_the_largest_change_knows_what_is_not_finite(one, other, change):
    assert largest_change(torch.tensor(one), torch.tensor(other)) == change


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_logit_that_is_not_finite_is_found_and_hides_no_leak(value):
    for causal in (True, False):
        model = conv(causal=causal)
        with torch.no_grad():
            model.unembed.weight[3, 2] = value
        report = audit(model, length=9)
        assert not report.passed
        assert not report.future.finite
        assert report.findings[0] == UNSURE
        assert UNSURE in repr(report)
        assert report.future.leaks is not causal
        assert report.future.first_leak == (None if causal else "blocks.0.conv.hook_out")
        assert any("reads the future" in finding for finding in report.findings) is not causal


def test_a_number_that_is_lost_with_later_tokens_is_a_leak():
    """NaN at a position that stood finite before later tokens were changed."""
    model, name = conv(), "blocks.0.hook_attn_out"
    tokens = iid_tokens(6, 9, 13, generator=seeded(1))
    sizes = model.run_with_cache(tokens)[1][name].abs().amax((1, 2))
    limit = sizes.sort().values[2:4].mean()

    def poison(x, hook):
        return x.masked_fill(x.abs().amax((1, 2), keepdim=True) > limit, torch.nan)

    model.add_hook(name, poison)
    found = reads_future(model, tokens, generator=seeded(2))
    assert max(found.influence) == math.inf
    assert found.leaks
    assert found.first_leak == name
    assert not found.finite


def test_a_number_that_later_tokens_alone_destroy_is_found():
    """The tokens themselves give finite logits, and so do some of the others."""
    model = conv()
    rare = model.embed.weight[12]

    def poison(x, hook):
        x = x.clone()
        x[(x == rare).all(-1).any(1), 0] = torch.nan
        return x

    model.add_hook("hook_embed", poison)
    tokens = iid_tokens(3, 9, 12, generator=seeded(1))  # without token 12
    with torch.no_grad():
        assert model(tokens).isfinite().all()
    found = reads_future(model, tokens, generator=seeded(2))
    assert math.isfinite(found.jacobian)
    assert found.leaks
    assert not found.finite


@pytest.mark.parametrize("order", [1, -1])
def test_a_leak_is_one_in_whatever_order_it_comes(order):
    influence = [math.nan, 0.5, 0.0][::order]
    assert FutureRead(influence, [0, 1, 2], math.nan, 0.1, None).leaks
    assert not FutureRead([math.nan, 0.0][::order], [0, 1], math.nan, 0.1, None).leaks


def test_a_gradient_that_is_not_finite_is_found():
    model = conv()
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: x + (x * 0).sqrt())  # slope 0 · ∞
    found = reads_future(model, iid_tokens(3, 9, 13, generator=seeded(1)), generator=seeded(2))
    assert math.isnan(found.jacobian)
    assert not found.finite


def test_tokens_are_changed_even_if_the_generator_draws_them_again():
    tokens = iid_tokens(3, 9, 13, generator=seeded(1))
    found = reads_future(conv(causal=False), tokens, generator=seeded(1))
    assert min(found.influence) > 1e-4
    assert found.first_leak == "blocks.0.conv.hook_out"


def judged(future=None, iid=None, targets=None, streaming=0.0):
    future = future or FutureRead([0.0, 0.0], [0, 1], 0.0, 1e-3, None)
    return Audit("a model", future, iid or IidFloor(2.0, 2.0, 0.01), streaming, targets)


@pytest.mark.parametrize(
    ("found", "finding"),
    [
        (judged(FutureRead([0.0], [0], 0.0, 0.1, None, False)), UNSURE),
        (judged(FutureRead([0.0, 0.05], [0, 1], 0.25, 0.1, None)),
         "reads the future: gradients from later embeddings are up to 0.25"),
        (judged(FutureRead([0.0, 0.5], [0, 1], 0.0, 0.1, None)),
         "reads the future: later tokens change logits by up to 0.5 (first at the logits)"),
        (judged(iid=IidFloor(2.0, 2.0, 0.01, math.nan, math.nan, 5)),
         "its loss on independent tokens is nan"),
        (judged(streaming=math.inf), "step by step its logits differ by inf from one run"),
    ],
)  # fmt: skip
def test_findings_in_words(found, finding):
    assert found.findings == [finding]
    assert "first at None" not in repr(found)


def test_the_floor_is_beaten_by_the_loss_that_is_a_number():
    found = judged(iid=IidFloor(2.0, 1.5, 0.01, math.nan, math.nan, 5))
    assert found.findings == [
        "its loss on independent tokens is nan",
        "beats the floor: loss 1.5000 on independent tokens, ln V = 2.0000",
    ]


def test_a_model_that_only_gradients_betray():
    """Of a single token there is no other; the gradient still reaches ahead."""
    report = audit(ConvAttn(ConvAttnConfig(**{**SIZES, "d_vocab": 1}, causal=False)))
    (finding,) = report.findings
    assert finding.startswith("reads the future: gradients from later embeddings are up to 0.")
    assert "reads the future   yes (largest influence 0 over" in repr(report)


# Accuracy ----------------------------------------------------------------------------------------


def test_accuracy_of_logits_that_are_nan_is_nan():
    model = conv()
    with torch.no_grad():
        model.embed.weight[5] = torch.nan
    tokens = torch.tensor([[1, 2, 3, 4], [1, 5, 3, 4]])
    found = count_targets(model, tokens)
    assert math.isnan(found.accuracy)
    assert math.isnan(found.accuracy_with_pads)
    assert not math.isnan(count_targets(model, tokens[:1]).accuracy)
    report = judged(targets=found)
    assert report.findings == ["its logits for the given tokens are NaN"]


@pytest.mark.parametrize(
    ("length", "real"), [(1, None), (5, []), (5, [0])], ids=["one token", "none", "the first"]
)
def test_no_target_is_no_accuracy(length, real):
    tokens, mask = torch.zeros(3, length, dtype=torch.long), None
    if real is not None:
        mask = torch.zeros(3, length, dtype=torch.bool)
        mask[:, real] = True
    message = rf"tokens \[3, {length}\] and loss_mask leave no target: give sequences of at least 2"
    with pytest.raises(ValueError, match=message):
        audit(conv(), tokens, loss_mask=mask, length=5)


def test_steps_are_not_negative():
    with pytest.raises(ValueError, match="floor_steps must be at least 0, got -1"):
        audit(conv(), floor_steps=-1)


# Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_rounding_is_no_finding_and_a_leak_is_one(dtype, scale):
    for causal in (True, False):
        model = conv(causal=causal, residual=True)
        with torch.no_grad():
            model.unembed.weight *= scale
        model = model.to(dtype)
        report = audit(model)
        findings = [f for f in report.findings if not f.startswith("beats")]
        assert bool(findings) is not causal, report
        largest = model(iid_tokens(8, 17, 13, generator=seeded())).detach().abs().max()
        assert report.future.tolerance == max(1e-4, float(largest) * torch.finfo(dtype).eps)
        if causal and scale == 40:
            assert report.streaming is not None
            assert report.streaming > 1e-3  # which would be too much for float32


def test_the_coarsest_of_weights_and_logits_decides():
    model = conv()
    model.embed.to(torch.bfloat16)
    model.embed.register_forward_hook(lambda module, given, out: out.float())
    largest = model(iid_tokens(8, 9, 13, generator=seeded())).detach().abs().max()
    assert audit(model, length=9).future.tolerance == pytest.approx(float(largest) * 2**-7)


def test_a_tolerance_that_is_given_stays():
    assert audit(conv(), length=5).future.tolerance == 1e-4
    assert audit(conv().double(), length=5).future.tolerance == 1e-4
    assert audit(conv().bfloat16(), length=5, tolerance=0).future.tolerance == 0
    model = conv()
    model.add_hook("hook_embed", lambda x, hook: x * 1e5)
    with torch.no_grad():
        largest = model(iid_tokens(8, 5, 13, generator=seeded())).abs().max()
    tolerance = audit(model, length=5).future.tolerance
    assert tolerance == pytest.approx(max(1e-4, float(largest) * 2**-23))


# One's own ---------------------------------------------------------------------------------------


class Bigram(HookedModel):
    """The least that can be audited: it says of each token what follows it."""

    config_class = SimpleNamespace
    presets = {}  # noqa: RUF012

    def __init__(self, **config):
        super().__init__(SimpleNamespace(**config))
        self.embed, self.hook_embed = nn.Embedding(13, 13), HookPoint()
        self.setup()

    def forward(self, tokens):
        return self.hook_embed(self.embed(tokens))


class Wrapped(Bigram):
    """Hands all options on to a model."""

    def __init__(self):
        super().__init__(n_ctx=17, d_vocab=13)
        self.inner = conv()

    def forward(self, tokens, **options):
        self.hook_embed(self.embed(tokens))
        return self.inner(tokens, **options)


class Forgetful(Bigram):
    """Takes a state, and leaves it empty."""

    def forward(self, tokens, state=None):
        return super().forward(tokens) + torch.arange(tokens.shape[1])[:, None]


def test_a_model_of_one_s_own_is_audited():
    report = audit(Bigram(n_ctx=9, d_vocab=13), torch.zeros(2, 4, dtype=torch.long))
    assert report.passed
    assert report.streaming is None
    assert "streaming          not checked: forward takes no state, or refuses it" in repr(report)
    assert report.future.cuts == list(range(8))


def test_streaming_is_impossible_where_the_future_is_read():
    report = audit(conv(causal=False))
    assert report.streaming is None
    assert "streaming          impossible" in repr(report)


def test_streaming_is_checked_where_forward_keeps_a_state():
    tokens = iid_tokens(2, 7, 13, generator=seeded())
    gap = streaming_gap(Wrapped(), tokens)
    assert gap is not None
    assert gap < 1e-5
    assert streaming_gap(Forgetful(n_ctx=9, d_vocab=13), tokens) is None


@pytest.mark.parametrize(
    ("config", "steps", "missing"),
    [
        ({"d_vocab": 13}, 0, "an int config.n_ctx$"),
        ({"n_ctx": 9, "d_vocab": None}, 0, "an int config.d_vocab$"),
        ({}, 0, "an int config.n_ctx and an int config.d_vocab$"),
        ({"n_ctx": 9, "d_vocab": 13}, 2,
         r'forward\(tokens, return_type="loss"\), for floor_steps$'),
        ({"n_ctx": 9, "d_vocab": 11}, 0, r"logits \[batch pos d_vocab\] = \[8, 9, 11\] from "
         r"forward\(tokens\), got torch.float32 \[8, 9, 13\]$"),
    ],
)  # fmt: skip
def test_what_a_model_lacks_is_named(config, steps, missing):
    with pytest.raises(ValueError, match=f"^audit of this Bigram needs {missing}"):
        audit(Bigram(**config), floor_steps=steps)


def test_an_embedding_must_pass_its_hook():
    class Silent(Bigram):
        def forward(self, tokens):
            return self.embed(tokens)

    class Nameless(Bigram):
        def __init__(self):
            super().__init__(n_ctx=9, d_vocab=13)
            del self.hook_embed
            self.setup()

        forward = Silent.forward

    with pytest.raises(ValueError, match="the embedding of this Silent must pass 'hook_embed'"):
        audit(Silent(n_ctx=9, d_vocab=13))
    with pytest.raises(ValueError, match="needs a hook point hook_embed, which its embedding"):
        audit(Nameless())


def test_a_model_without_any_config_is_told_what_it_lacks():
    model = Bigram()
    del model.config
    with pytest.raises(ValueError, match=r"^audit of this Bigram needs an int config\.n_ctx and"):
        audit(model)


def test_a_model_that_learns_without_reading_has_no_slope():
    class Prior(Bigram):
        def __init__(self):
            super().__init__(n_ctx=9, d_vocab=13)
            self.prior = nn.Parameter(torch.zeros(13))

        def forward(self, tokens):
            super().forward(tokens)
            return self.prior.expand(*tokens.shape, -1)

    report = audit(Prior())
    assert report.future.jacobian == 0
    assert report.passed


def test_a_model_that_reads_nothing_has_no_slope():
    class Still(Bigram):
        def forward(self, tokens):
            self.hook_embed(self.embed(tokens))
            return torch.zeros(*tokens.shape, 13)

    report = audit(Still(n_ctx=9, d_vocab=13))
    assert report.passed
    assert report.future.jacobian == 0
