"""Induction in Mamba: the exchange of lags on known cases, both rules, and the study, tiny."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from smearlens import ConvAttn, ConvAttnConfig, Mamba, MambaConfig, repeated_tokens
from smearlens.causal.lags import exchange_lags
from smearlens.experiments import measures
from smearlens.experiments.state_space.mamba_induction import (
    MambaInductionConfig,
    cells,
    judge,
    run,
)
from smearlens.experiments.state_space.mamba_measures import exchanged, reordered
from smearlens.experiments.study import as_json

TINY = MambaInductionConfig(seeds=2, steps=2, deep_steps=2, d_model=8, d_state=3)
ALL = ("u", "B", "C", "delta")


@pytest.fixture
def model():
    return Mamba(
        MambaConfig(d_vocab=13, d_model=16, n_layers=1, n_ctx=17, d_state=5, kernel_size=3)
    ).eval()


@pytest.fixture
def tokens(generator):
    return repeated_tokens(7, (3, 5), 11, 13, generator=generator)


# Exchange of lags ------------------------------------------------------------------------------


def conv_by_hand(conv, x, past):
    """Lag 0 from `x`, the other lags from `past`, position by position."""
    y = conv.bias + conv.weight[:, 0] * x
    for lag in range(1, conv.weight.shape[1]):
        for t in range(lag, x.shape[1]):
            y[:, t] = y[:, t] + conv.weight[:, lag] * past[:, t - lag]
    return y


def test_an_exchanged_role_reads_its_lags_from_the_other_example(model, tokens):
    other = tokens.flip(0)
    block, point = model.blocks[0], "blocks.0.conv.hook_in"
    with torch.no_grad():
        x, past = (model.run_with_cache(t)[1][point] for t in (tokens, other))
        u = torch.nn.functional.silu(conv_by_hand(block.conv, x, past))
        _, expected, _ = block.ssm.x_proj(u).split([block.ssm.low, 5, 5], dim=-1)
        own = model.run_with_cache(tokens)[1]
        with model.hooks(exchange_lags(model, tokens, other, ["B"])):
            _, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(cache["blocks.0.ssm.hook_B"], expected)
    for kept in ("u", "C", "delta"):
        name = f"blocks.0.ssm.hook_{kept}"
        assert torch.equal(cache[name], own[name])


def test_lags_exchanged_with_oneself_change_nothing(model, tokens):
    with torch.no_grad():
        clean = model(tokens)
        with model.hooks(exchange_lags(model, tokens, tokens, ALL)):
            torch.testing.assert_close(model(tokens), clean)
        with model.hooks(exchange_lags(model, tokens, tokens.flip(0), ["B"])):
            assert not torch.allclose(model(tokens), clean)


def test_lags_of_attention_are_exchanged_too(tokens):
    """With no lags in either example, nothing is exchanged."""
    config = ConvAttnConfig(d_vocab=13, d_model=12, n_heads=3, n_ctx=17, kernel_size=4)
    model = ConvAttn(config).eval()
    with torch.no_grad():
        clean = model(tokens)
        with model.hooks(exchange_lags(model, tokens, tokens.flip(0), ["k"])):
            assert not torch.allclose(model(tokens), clean)
        model.blocks[0].conv.weight[:, 1:] = 0
        clean = model(tokens)
        with model.hooks(exchange_lags(model, tokens, tokens.flip(0), ["k"])):
            torch.testing.assert_close(model(tokens), clean)


def test_exchange_needs_a_convolution_and_a_role(model, tokens):
    with pytest.raises(ValueError, match=re.escape("roles must be some of 'u', 'B', 'C', 'delta'")):
        exchange_lags(model, tokens, tokens, ["k"])
    with pytest.raises(ValueError, match=r"'blocks.7' of this Mamba"):
        exchange_lags(model, tokens, tokens, ["B"], block="blocks.7")


def test_reordered_repeats_and_the_answers_they_ask_for(generator):
    tokens = repeated_tokens(5, (3, 6), 17, 23, generator=generator)
    shuffled, answers = reordered(tokens, generator=generator)
    assert not torch.equal(shuffled, tokens)
    for given, other, answer in zip(
        tokens.tolist(), shuffled.tolist(), answers.tolist(), strict=True
    ):
        period = given[1:].index(given[0]) + 1
        assert set(given) == set(other)
        assert other[period:] == other[:-period]
        for query, wanted in zip(given, answer, strict=True):
            after = other.index(query) + 1  # where a token stands behind the query, in the other
            assert wanted == given[after]


def test_answers_are_counted_where_the_two_examples_differ(model, tokens, generator, monkeypatch):
    """Logits that name the answer by either order are right each time, and by the other never."""
    _, answers = reordered(tokens, generator=torch.Generator().manual_seed(3))
    for right, logits in (("own", tokens.roll(-1, 1)), ("other", answers)):
        monkeypatch.setattr(
            "smearlens.experiments.state_space.mamba_measures.measure_with",
            lambda model, tokens, hooks, metric, logits=logits: metric(
                torch.nn.functional.one_hot(logits, 13).float(), tokens
            ),
        )
        found = exchanged(model, tokens, generator=torch.Generator().manual_seed(3))
        assert set(found) == {"u", "B", "C", "delta", "u+B+C+delta"}
        wrong = {"own": "other", "other": "own"}[right]
        assert all(each == {right: 1.0, wrong: 0.0} for each in found.values())


# Verdicts --------------------------------------------------------------------------------------


def world(*, none=0.2, four=0.9, deep=0.2, on_b=0.1, other=0.8, own=0.1, rules=None):
    """Measures of the usual outcome; `rules` are the accuracies of the discretisations."""
    rules = {"zoh": 0.9, "bilinear": 0.9, "bilinear-clamped": 0.9} | (rules or {})
    accuracy = {
        "2 layers, kernel 1": deep, "kernel 1": none, "kernel 2": 0.9, "kernel 3": 0.9,
        "kernel 4": four, **{f"kernel 4, {rule}": value for rule, value in rules.items()},
    }  # fmt: skip
    without = {"u": 0.6, "B": on_b, "C": 0.8, "delta": 0.8}
    runs = []
    for seed, shift in enumerate((-0.005, 0.001, 0.006)):
        for name, value in accuracy.items():
            runs.append({
                "name": name, "seed": seed, "accuracy": value + shift, "negative_decays": 0.1,
                "without_lags": {k: v + shift for k, v in without.items()},
                "exchanged_lags": {"B": {"other": other + shift, "own": own + shift}},
            })  # fmt: skip
    return runs


@pytest.mark.parametrize(
    ("changes", "outcome", "said"),
    [
        ({}, "supported", "depth is no way around it"),
        ({"deep": 0.9}, "refuted", "the state of the first layer can carry"),
        ({"none": 0.88}, "refuted", "One layer that smears nothing does as well"),
        ({"deep": 0.8}, "undecided", "reach 0.80 against 0.90"),
        ({"on_b": 0.7}, "undecided", "too close to tell"),
        ({"other": 0.1, "own": 0.8}, "undecided", "of the cases: not told apart"),
        ({"four": 0.4, "none": 0.39}, "undecided", "0.40: not told apart"),
    ],
)
def test_each_outcome_on_the_convolution_can_be_reached(changes, outcome, said):
    verdict = judge(world(**changes))[0]
    assert verdict.outcome == outcome
    assert said in verdict.because
    assert verdict.n_seeds == 3
    assert len(verdict.findings) == 11


@pytest.mark.parametrize(
    ("rules", "outcome"),
    [
        ({"bilinear": 0.95}, "supported"),
        ({"bilinear": 0.85}, "refuted"),
        ({}, "refuted"),
        ({"bilinear": 0.9, "zoh": 0.8}, "refuted"),  # ahead of one of the two alone
        ({"bilinear": 0.95, "zoh": 0.4}, "undecided"),
    ],
)
def test_each_outcome_on_bilinear_can_be_reached(rules, outcome):
    verdict = judge(world(rules=rules))[1]
    assert (verdict.claim.number, verdict.outcome) == (17, outcome)
    assert "10.0% of its decays are negative" in verdict.because


def test_noise_leaves_bilinear_undecided():
    runs = world()
    for m in runs:
        if m["name"] == "kernel 4, bilinear":
            m["accuracy"] += (-0.1, 0.05, 0.09)[m["seed"]]
    assert judge(runs)[1].outcome == "undecided"


# The whole -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study, measured on few examples."""
    out = tmp_path_factory.mktemp("induction")
    few = partial(repeated_tokens, 5, (4, 12), 32, 32, torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "evaluation_tokens", lambda *a, **k: few())
        return run(TINY, out, command="smearlens experiment mamba-induction --tiny"), out


def test_the_study_writes_its_numbers_tables_and_figures(study):
    found, out = study
    assert json.loads((out / "result.json").read_text()) == json.loads(as_json(found))
    assert len(found["measures"]) == len(cells(TINY)) == 2 * 8
    page = (out / "report.html").read_text()
    assert page.count("Bars: mean, lines: lowest and highest seed.") == 3
    tables = {p.stem: p.read_text() for p in (out / "tables").glob("*.md")}
    assert set(tables) == {"models", "roles", "exchange", "rules"}
    assert "2 layers, kernel 1" in tables["models"]
    assert len(list((out / "figures").glob("*.png"))) == 5
    assert "claim 17" in (out / "report.html").read_text()
    deep = [m for m in found["measures"] if m["name"] == "2 layers, kernel 1"]
    assert all("without_lags" not in m for m in deep)


def test_the_kernel_without_lags_has_none_to_lose(study):
    for m in study[0]["measures"]:
        if m["name"] == "kernel 1":
            assert set(m["without_lags"].values()) == {m["accuracy"]}


def test_running_again_trains_nothing(study, monkeypatch):
    found, out = study
    monkeypatch.setattr("smearlens.experiments.grid.train", lambda *a, **k: pytest.fail("trained"))
    assert run(TINY, out, command="smearlens experiment mamba-induction --tiny") == found
    with pytest.raises(ValueError, match=r"'steps': \(2, 3\).*--force"):
        run(replace(TINY, steps=3), out)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="d_state must be at least 1, got 0"):
        MambaInductionConfig(d_state=0)
    assert MambaInductionConfig().quick().seeds == 2
