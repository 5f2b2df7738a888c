"""`audit` catches every way of cheating that we plant, and passes models that do not."""

import math

import pytest
import torch

from smearlens import (
    AttnAttn,
    AttnAttnConfig,
    ConvAttn,
    ConvAttnConfig,
    Seq2Seq,
    Seq2SeqConfig,
    audit,
)
from smearlens.causal.audit import Audit, count_targets
from smearlens.causal.leaks import (
    FutureRead,
    IidFloor,
    iid_floor,
    reads_future,
    streaming_gap,
)
from smearlens.data.synthetic import iid_tokens

SIZES = {"d_vocab": 13, "d_model": 12, "n_heads": 3, "n_ctx": 17}
HONEST = {
    "conv": lambda: ConvAttn(ConvAttnConfig(**SIZES, kernel_size=4)),
    "conv on k": lambda: ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, conv_on="k")),
    "smear": lambda: ConvAttn(ConvAttnConfig(**SIZES, conv_on=None, smear=True)),
    "rotary": lambda: ConvAttn(ConvAttnConfig(**{**SIZES, "n_heads": 2}, positions="rotary")),
    "two layers": lambda: AttnAttn(AttnAttnConfig(**SIZES, n_layers=2, norm=True, mlp=True)),
}


@pytest.mark.parametrize("name", HONEST)
def test_causal_models_pass(name):
    report = audit(HONEST[name]())
    assert report.passed, report
    assert report.future.first_leak is None
    assert max(report.future.influence) == 0.0 or max(report.future.influence) < 1e-5
    assert report.streaming is not None
    assert "passed" in repr(report)


@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5])
@pytest.mark.parametrize("role", ["stream", "k", "v"])
def test_same_padding_is_caught_at_its_first_layer(kernel_size, role):
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=kernel_size, conv_on=role, causal=False))
    report = audit(model)
    assert not report.passed
    layer = "blocks.0.conv" if role == "stream" else f"blocks.0.attn.conv_{role}"
    assert report.future.first_leak == f"{layer}.hook_out"
    assert report.streaming is None
    assert "reads the future" in report.findings[0]
    assert report.to_dict()["passed"] is False


def test_a_planted_leak_inside_attention_is_located():
    model = AttnAttn(AttnAttnConfig(**SIZES, n_layers=2)).eval()
    model.add_hook("blocks.1.attn.hook_z", lambda z, hook: z + z.roll(-1, 1))
    report = audit(model)
    assert not report.passed
    assert report.future.first_leak == "blocks.1.attn.hook_z"


@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_a_leak_into_the_weights_of_earlier_keys_is_located(point):
    model = AttnAttn(AttnAttnConfig(**SIZES, n_layers=2)).eval()
    name = f"blocks.1.attn.{point}"
    model.add_hook(name, lambda weights, hook: weights.roll(-1, 2))  # those of the next query
    assert audit(model, length=9).future.first_leak == name


def test_a_mask_that_depends_on_later_tokens_is_a_leak():
    """Where one input is masked and the other is not, scores differ by infinity."""
    model = AttnAttn(AttnAttnConfig(**SIZES, n_layers=2)).eval()

    def mask(scores, hook):
        scores = scores.clone()
        first = scores[..., 0]
        first[..., 1:-1][first[..., 2:] > first[..., 1:-1]] = -torch.inf
        return scores

    model.add_hook("blocks.1.attn.hook_attn_scores", mask)
    assert audit(model, length=9).future.first_leak == "blocks.1.attn.hook_attn_scores"


@pytest.mark.parametrize("position", [0, 2, 4, 7])
def test_the_jacobian_is_taken_at_both_ends_and_between(position):
    model = AttnAttn(AttnAttnConfig(**SIZES, n_layers=1)).eval()

    def leak(x, hook):
        x = x.clone()
        x[:, position] += x[:, position + 1]
        return x

    model.add_hook("blocks.0.hook_resid_post", leak)
    generator = torch.Generator().manual_seed(1)
    tokens = iid_tokens(3, 9, 13, generator=generator)
    found = reads_future(model, tokens, generator=generator)
    assert found.jacobian > 1e-3
    assert found.first_leak == "blocks.0.hook_resid_post"  # found at the cut that shows it


def test_a_leak_that_is_tolerated_is_not_located():
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, causal=False)).eval()
    tokens = iid_tokens(3, 9, 13, generator=torch.Generator().manual_seed(1))

    def read(tolerance):
        generator = torch.Generator().manual_seed(2)
        return reads_future(model, tokens, tolerance=tolerance, generator=generator)

    largest = max(read(1e-4).influence)
    assert read(largest).first_leak is None
    assert read(largest * 0.999).first_leak == "blocks.0.conv.hook_out"
    assert audit(model, length=9, tolerance=0.5).future.tolerance == 0.5


def test_the_jacobian_sees_leaks_through_logits_that_sum_to_a_constant():
    generator = torch.Generator().manual_seed(1)
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, causal=False)).eval()
    with torch.no_grad():
        model.unembed.weight.sub_(model.unembed.weight.mean(0))
    tokens = iid_tokens(3, 9, 13, generator=generator)
    assert model(tokens).sum(-1).abs().max() < 1e-4
    assert reads_future(model, tokens, generator=generator).jacobian > 1e-3


def test_the_jacobian_is_that_of_one_mix_of_the_logits():
    layers = {"kernel_size": 3, "causal": False, "norm": True, "mlp": True}
    model = ConvAttn(ConvAttnConfig(**SIZES, **layers)).eval()
    tokens = iid_tokens(3, 7, 13, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(13, generator=torch.Generator().manual_seed(0))
    by_hand = []
    for one in tokens:
        embedded = model.run_with_cache(one[None])[1]["hook_embed"].detach()

        def mixed(x, one=one):
            hooks = [("hook_embed", lambda t, hook: x)]
            return model.run_with_hooks(one[None], fwd_hooks=hooks)[0] @ w

        slopes = torch.autograd.functional.jacobian(mixed, embedded)[:, 0]  # [query pos d_model]
        by_hand.append(float(max(slopes[t, t + 1 :].abs().max() for t in (0, 1, 3, 5))))
    assert len(set(by_hand)) == 3
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        found = reads_future(model, tokens[list(order)], generator=generator).jacobian
        assert found == pytest.approx(max(by_hand[i] for i in order[:2]), rel=1e-4)


def test_an_audit_of_a_decoder_changes_what_the_decoder_reads():
    model = Seq2Seq(Seq2SeqConfig(**{**SIZES, "n_ctx": 9}, start=11, end=12)).eval()
    decoder = model.decoder_given(torch.tensor([[1, 4, 2]]))
    assert audit(decoder).passed

    def leak(x, hook):
        x = x.clone()
        x[:, 7] += x[:, 8]
        return x

    with model.hooks([("decoder.blocks.1.hook_resid_post", leak)]):
        found = audit(decoder).future
    assert found.first_leak == "decoder.blocks.1.hook_resid_post"
    model.decoder.blocks[1].attn.causal = False
    found = audit(decoder).future
    assert found.jacobian > 1e-4
    assert found.first_leak == "decoder.blocks.1.attn.hook_pattern"


def test_the_slopes_of_a_decoder_are_those_of_its_own_embedding():
    model = Seq2Seq(Seq2SeqConfig(**{**SIZES, "n_ctx": 5}, start=11, end=12)).eval()
    decoder = model.decoder_given(torch.tensor([[1, 4, 2]]))
    tokens = iid_tokens(2, 5, 13, generator=torch.Generator().manual_seed(1))
    found = reads_future(decoder, tokens, generator=torch.Generator().manual_seed(2))
    assert found.jacobian == 0


def test_the_last_position_must_be_finite_too():
    model = HONEST["conv"]().eval()

    def lost(x, hook):
        x = x.clone()
        x[0, 4] = torch.nan
        return x

    model.add_hook("blocks.0.hook_resid_post", lost)
    tokens = iid_tokens(2, 5, 13, generator=torch.Generator().manual_seed(1))
    found = reads_future(model, tokens, generator=torch.Generator().manual_seed(2))
    assert not found.finite
    assert not found.leaks


@pytest.mark.parametrize(("size", "located"), [(0.2501, True), (0.25, False), (0.2499, False)])
def test_a_leak_is_located_down_to_a_hundredth_of_the_tolerance(size, located):
    model = HONEST["conv"]().eval()
    three, known = model.embed.weight[3], []

    def small(x, hook):
        known[:] = [(x[:, -1] == three).all(-1, keepdim=True)]
        x = x.clone()
        x[:, 0, :1] = size * known[0]
        return x

    def large(x, hook):
        x = x.clone()
        x[:, 0] += 900 * known[0]
        return x

    model.add_hook("hook_embed", small)
    model.add_hook("blocks.0.hook_resid_post", large)
    tokens = torch.tensor([[1, 2, 0, 5, 3], [4, 4, 6, 0, 3]])
    generator = torch.Generator().manual_seed(2)
    found = reads_future(model, tokens, tolerance=25.0, generator=generator)
    assert found.first_leak == ("hook_embed" if located else "blocks.0.hook_resid_post")


def test_a_leak_within_the_tolerance_is_told_by_its_gradients():
    future = FutureRead([0.0, 1e-3], [0, 1], 0.25, 1e-3, None)
    (finding,) = Audit("a model", future, IidFloor(2.0, 2.0, 0.01), None, None).findings
    assert finding == "reads the future: gradients from later embeddings are up to 0.25"


def test_one_nan_in_a_row_of_logits_leaves_no_accuracy():
    model, tokens = HONEST["conv"]().eval(), torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        model.unembed.weight[3] = torch.nan
    assert math.isnan(count_targets(model, tokens).accuracy)


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_numbers_that_are_lost_do_not_make_an_audit_more_tolerant(lost):
    model = HONEST["conv"]().eval().bfloat16()
    with torch.no_grad():
        model.unembed.weight[3, 2] = lost
        logits = model(iid_tokens(8, 5, 13, generator=torch.Generator().manual_seed(0)))
    largest = float(logits[logits.isfinite()].abs().max())
    assert largest < 1
    assert audit(model, length=5).future.tolerance == pytest.approx(largest * 2**-7)


def test_an_audit_is_its_parts_on_eight_sequences():
    model, generator = HONEST["conv"]().eval(), torch.Generator().manual_seed(0)
    found = audit(model, length=9, floor_steps=2)
    tokens = iid_tokens(8, 9, 13, generator=generator)
    assert found.future == reads_future(model, tokens, generator=generator)
    assert found.iid == iid_floor(model, 9, steps=2, generator=generator)
    assert found.streaming == streaming_gap(model, tokens)


@pytest.mark.parametrize(("n_ctx", "cuts"), [(47, 46), (48, 47), (64, 47)])
def test_an_audit_reads_at_most_48_tokens(n_ctx, cuts):
    model = ConvAttn(ConvAttnConfig(**{**SIZES, "n_ctx": n_ctx}, kernel_size=3))
    assert audit(model).future.cuts == list(range(cuts))


def test_the_loss_after_training_is_that_of_adam_on_batches_of_32():
    model, generator = HONEST["conv"]().eval(), torch.Generator().manual_seed(3)
    found = iid_floor(model, 5, steps=8, generator=generator)
    generator.manual_seed(3)
    copied = ConvAttn(model.config).train()
    copied.load_state_dict(model.state_dict())
    iid_tokens(256, 5, 13, generator=generator)  # those of the loss before
    optimizer = torch.optim.Adam(copied.parameters(), lr=3e-3)
    for _ in range(8):
        tokens = iid_tokens(32, 5, 13, generator=generator)
        logits = copied(tokens)[:, :-1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    fresh = iid_tokens(256, 5, 13, generator=generator)
    with torch.no_grad():
        chosen = copied(fresh)[:, :-1].log_softmax(-1).gather(-1, fresh[:, 1:, None])
    assert found.trained_loss == pytest.approx(-float(chosen.double().mean()), abs=1e-5)
    assert found.steps == 8


class Stuttering(ConvAttn):
    """Says something else where it reads token 3 step by step."""

    def forward(self, tokens, *args, state=None, **kwargs):
        said = super().forward(tokens, *args, state=state, **kwargs)
        return said if state is None else said + 0.25 * (tokens == 3)[..., None]


def test_the_gap_of_streaming_is_the_largest():
    model = Stuttering(ConvAttnConfig(**SIZES, kernel_size=3)).eval()
    tokens = torch.tensor([[1, 2, 4, 5], [1, 3, 2, 1]])
    assert streaming_gap(model, tokens[:1]) == pytest.approx(0, abs=1e-5)
    assert streaming_gap(model, tokens) == pytest.approx(0.25, abs=1e-5)
    assert "step by step its logits differ by 0.25" in audit(model).findings[-1]


def test_jacobian_finds_what_discrete_changes_find():
    generator = torch.Generator().manual_seed(1)
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, causal=False)).eval()
    tokens = iid_tokens(2, 11, 13, generator=generator)
    found = reads_future(model, tokens, generator=generator)
    assert found.jacobian > 1e-3
    assert found.cuts == list(range(10))
    # "same" padding of width 3 lets position t see t + 1: every cut is visible
    assert min(found.influence) > 1e-4


def test_dropout_in_the_floor_draws_from_nowhere_else():
    torch.manual_seed(5)
    model = ConvAttn(ConvAttnConfig(d_vocab=7, d_model=6, n_heads=2, n_ctx=9, dropout=0.4))
    before = torch.get_rng_state()
    once, again = (
        iid_floor(model, 9, steps=5, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert once == again
    assert torch.equal(torch.get_rng_state(), before)


def test_iid_floor_is_broken_only_by_the_leaking_model():
    generator = torch.Generator().manual_seed(0)
    floors = {}
    for causal in (True, False):
        torch.manual_seed(0)
        model = ConvAttn(ConvAttnConfig(**SIZES, residual=True, kernel_size=3, causal=causal))
        floors[causal] = iid_floor(model, 17, steps=150, generator=generator)
    assert floors[True].floor == pytest.approx(math.log(13))
    assert not floors[True].broken
    assert floors[False].broken
    assert floors[False].trained_loss < 0.9 * math.log(13)


def test_audit_leaves_the_model_as_it_was():
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, dropout=0.5)).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    audit(model, floor_steps=2)
    assert model.training
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.fwd_hooks for p in model.hook_points())
    del state


def test_an_audit_is_of_the_model_without_dropout():
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, dropout=0.5))
    assert audit(model.train(), length=9).to_dict() == audit(model.eval(), length=9).to_dict()


def test_a_copy_is_trained_without_the_hooks_of_the_model():
    model, seen = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3)).eval(), []
    for permanent in (True, False):
        model.add_hook("hook_embed", lambda x, hook: seen.append(hook.name), is_permanent=permanent)
    iid_floor(model, 5, steps=2, generator=torch.Generator().manual_seed(0))
    assert len(seen) == 2  # both in the one run of the model as it is
    model(torch.zeros(1, 3, dtype=torch.long))
    assert len(seen) == 4


def judged(iid=None, streaming=None, influence=0.0):
    future = FutureRead([0.0, influence], [0, 1], 0.0, 1e-3, "blocks.0.conv.hook_out")
    return Audit("a model", future, iid or IidFloor(2.0, 2.0, 0.01), streaming, None)


@pytest.mark.parametrize(
    ("found", "finding"),
    [
        (judged(), None),
        (judged(influence=0.0009, streaming=0.0099), None),
        (judged(influence=0.25),
         "reads the future: later tokens change logits by up to 0.25 (first at "
         "blocks.0.conv.hook_out)"),
        (judged(IidFloor(2.0, 1.5, 0.01)),
         "beats the floor: loss 1.5000 on independent tokens, ln V = 2.0000"),
        (judged(IidFloor(2.0, 1.5, 0.01, 1.25, 0.01, 7)),
         "beats the floor: loss 1.2500 on independent tokens, ln V = 2.0000"),
        (judged(IidFloor(2.0, 1.5, 0.01, 1.75, 0.01, 7)),
         "beats the floor: loss 1.5000 on independent tokens, ln V = 2.0000"),
        (judged(streaming=10 * 1e-3), None),
        (judged(streaming=0.0107), "step by step its logits differ by 0.011 from one run"),
        (judged(IidFloor(2.0, math.nan, math.nan)), "its loss on independent tokens is nan"),
        (judged(IidFloor(2.0, math.inf, math.nan)), "its loss on independent tokens is inf"),
    ],
)  # fmt: skip
def test_findings_in_words(found, finding):
    assert found.findings == ([] if finding is None else [finding])
    assert found.passed is (finding is None)
    assert (f"  -> {finding}" in repr(found)) is not found.passed
    where = "yes, first at blocks.0.conv.hook_out" if found.future.leaks else "no"
    assert f"reads the future   {where} (largest influence" in repr(found)


def test_a_model_that_says_nan_does_not_pass():
    model = HONEST["conv"]()
    with torch.no_grad():
        model.unembed.weight[3, 2] = torch.nan
    assert not audit(model, length=5).passed


class Constant(ConvAttn):
    """Says token 0 whatever it reads."""

    def forward(self, tokens, *args, **kwargs):
        return torch.nn.functional.one_hot(torch.zeros_like(tokens), 13).float() * 9


def test_pads_are_told_apart_from_accuracy():
    # three real tokens, then pads (id 0): a model that says "pad" looks good with pads counted
    tokens = torch.tensor([[5, 6, 7, 0, 0, 0, 0], [5, 5, 6, 0, 0, 0, 0]])
    mask = tokens != 0
    found = count_targets(Constant(ConvAttnConfig(**SIZES)), tokens, mask)
    assert found.n_targets == 4  # 6, 7 and 5, 6: the first token is never a target
    assert found.pad_fraction == pytest.approx(8 / 12)
    assert found.accuracy == 0.0
    assert found.accuracy_with_pads == pytest.approx(8 / 12)
    assert found.constant == pytest.approx(8 / 12)
    assert found.unigram == pytest.approx(2 / 4)  # "6" twice among 6, 7, 5, 6
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert found.unigram_entropy == pytest.approx(float(-(p * p.log()).sum()))


def test_audit_shows_the_padding():
    tokens = torch.tensor([[5, 6, 7, 0, 0, 0, 0], [5, 5, 6, 0, 0, 0, 0]])
    report = audit(HONEST["conv"](), tokens, loss_mask=tokens != 0)
    assert "66.7% of the targets" in repr(report)


def test_bad_input_is_named():
    model = HONEST["conv"]()
    with pytest.raises(ValueError, match=r"length must be in 3\.\.n_ctx=17, got 40"):
        audit(model, length=40)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"loss_mask \[2, 4\] must have the shape of the tokens"):
        audit(model, tokens, loss_mask=torch.ones(2, 4, dtype=torch.bool))
