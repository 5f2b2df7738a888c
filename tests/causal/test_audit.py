"""`audit` catches every way of cheating that we plant, and passes models that do not."""

import math

import pytest
import torch

from smearlens import AttnAttn, AttnAttnConfig, ConvAttn, ConvAttnConfig, audit
from smearlens.causal.audit import count_targets
from smearlens.causal.leaks import iid_floor, reads_future
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


def test_jacobian_finds_what_discrete_changes_find():
    generator = torch.Generator().manual_seed(1)
    model = ConvAttn(ConvAttnConfig(**SIZES, kernel_size=3, causal=False)).eval()
    tokens = iid_tokens(2, 11, 13, generator=generator)
    found = reads_future(model, tokens, generator=generator)
    assert found.jacobian > 1e-3
    assert found.cuts == list(range(10))
    # "same" padding of width 3 lets position t see t + 1: every cut is visible
    assert min(found.influence) > 1e-4


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
