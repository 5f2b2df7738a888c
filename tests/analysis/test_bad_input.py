"""Whatever a user can get wrong stops with a sentence: what was given, what to write instead."""

import re

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from tests.analysis import reference as ref

from smearlens import (
    alignment_mass,
    ar_split,
    attention_entropy,
    attention_span,
    duplicate_token_score,
    future_mass,
    head_diversity,
    icl_score,
    induction_accuracy,
    induction_loss,
    induction_score,
    kernel_profile,
    lag_profile,
    layer_similarity,
    linear_cka,
    mixings,
    per_token_loss,
    prefix_matching_score,
    prev_token_score,
    self_mass,
    smear_coefficient,
    smear_evidence,
    stripe_score,
)  # fmt: skip
from smearlens.analysis.mixing.kinds import BandMixing, ComposedMixing, DenseMixing, SoftmaxMixing

NAME = "blocks.0.attn"
PATTERN = torch.from_numpy(ref.random_pattern(2, 2, 3, 7))
TOKENS = torch.arange(14).view(2, 7) % 5
SQUARE = torch.eye(7).bool()
CROSS = {"decoder.blocks.0.cross_attn.hook_pattern": PATTERN[:, :, :5]}
LAYERS = {f"blocks.{i}.attn.hook_pattern": PATTERN for i in range(2)}
SHORT = {**LAYERS, "blocks.1.attn.hook_pattern": PATTERN[:, :, :5, :5]}
KERNELS = {f"blocks.{i}.conv.hook_kernel": torch.ones(5, 3) for i in range(2)}
PARTS = {1: torch.ones(2, 3, 7, 7)}
LOGITS = torch.zeros(2, 7, 5)


@pytest.fixture
def unchecked():
    """Shapes unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


SOURCES = {
    "empty cache": (lambda: prev_token_score({}), r"no attention or ssm layer in a ca"),
    "cache without attention": (
        lambda: prev_token_score({"hook_embed": torch.ones(2, 3, 5)}),
        r"in a cache of 1 activations \(\['hook_embed'\]…\); cache hook_pattern, or",
    ),
    "queries without keys": (
        lambda: prev_token_score({f"{NAME}.hook_q": torch.ones(2, 3, 5, 7)}),
        r"blocks.0.attn.hook_q is cached without blocks.0.attn.hook_k; cache both",
    ),
    "unknown kind of layer": (
        lambda: prev_token_score({f"{NAME}.hook_pattern": PATTERN}, kind="convolution"),
        r"unknown kind \['convolution'\]; allowed: \['attention', 'conv', 'ssm'\]",
    ),
    "a list": (
        lambda: prev_token_score([PATTERN]), TypeError, r"source must be a cache .* got list",
    ),
    "an array": (
        lambda: prev_token_score(PATTERN.numpy()), TypeError, r"source must be .* got ndarray",
    ),
    "a vector": (
        lambda: prev_token_score(PATTERN[0, 0, 0]),
        r"a pattern is \[batch head query key\].* got shape \(7,\)",
    ),
    "five axes in a cache": (
        lambda: prev_token_score({f"{NAME}.hook_pattern": PATTERN[None]}),
        r"blocks.0.attn.hook_pattern must have 4 axes \(or 3\), got \(1, 2, 3, 7, 7\)",
    ),
    "integer pattern": (
        lambda: prev_token_score(PATTERN.long()),
        TypeError, r"a pattern holds probabilities, got dtype torch.int64",
    ),
    "float mask": (
        lambda: prev_token_score(PATTERN, key_mask=torch.ones(7)),
        TypeError, r"key_mask must be a bool tensor \(True counts\), got torch.float32",
    ),
    "short key mask": (
        lambda: prev_token_score(PATTERN, key_mask=torch.ones(5).bool()),
        r"key_mask \[1, 5\] does not fit 2 x 7 positions",
    ),
    "short query mask": (
        lambda: prev_token_score(PATTERN, query_mask=torch.ones(2, 5).bool()),
        r"query_mask \[2, 5\] does not fit 2 x 7 positions",
    ),
    "mask of another batch": (
        lambda: prev_token_score(PATTERN, query_mask=torch.ones(3, 7).bool()),
        r"query_mask \[3, 7\] does not fit 2 x 7 positions",
    ),
    "normalise": (
        lambda: prev_token_score(PATTERN, normalise="sum"),
        r"normalise must be 'abs', 'softmax', 'minmax' or 'none', got 'sum'",
    ),
    "an option that does not exist": (
        lambda: prev_token_score(PATTERN, exclude_eos=True), TypeError, r"exclude_eos",
    ),
}  # fmt: skip

HEADS = {
    "tokens too short": (
        lambda: induction_score(PATTERN, TOKENS[:, :5]),
        r"tokens \[2, 5\] do not belong to a pattern of 2 examples and 7 keys",
    ),
    "tokens too short for the diagonal": (
        lambda: induction_score(PATTERN, torch.tensor([[3, 1, 3, 1]] * 2), kind="diagonal"),
        r"tokens \[2, 4\] do not belong to a pattern",
    ),
    "tokens of another batch": (
        lambda: duplicate_token_score(PATTERN, TOKENS.repeat(2, 1)[:3]),
        r"tokens \[3, 7\] do not belong to a pattern of 2 examples",
    ),
    "several examples of tokens for one of the pattern": (
        lambda: induction_score(PATTERN[0], TOKENS),
        r"pattern of shape \[3, 7, 7\] is one example, but .* for 2; pass \[batch",
    ),
    "float tokens": (
        lambda: induction_score(PATTERN, TOKENS.float()),
        TypeError, r"tokens must be an integer tensor \[batch pos\], got 'torch.float32 \[2, 7\]'",
    ),
    "bool tokens": (
        lambda: induction_score(PATTERN, TOKENS.bool()),
        TypeError, r"tokens must be an integer tensor \[batch pos\], got 'torch.bool \[2, 7\]'",
    ),
    "tokens that are a list": (
        lambda: induction_score(PATTERN, [1, 2]), TypeError, r"tokens must be .* got \[1, 2\]",
    ),
    "kind": (
        lambda: induction_score(PATTERN, TOKENS, kind="stripe"),
        r"kind must be 'match' or 'diagonal', got 'stripe'",
    ),
    "aggregate": (
        lambda: prefix_matching_score(PATTERN, TOKENS, aggregate="max"),
        r"aggregate must be 'sum' or 'mean', got 'max'",
    ),
    "normalise_by": (
        lambda: stripe_score(PATTERN, SQUARE, normalise_by="rows"),
        r"normalise_by must be 'row', 'mul' or 'abs', got 'rows'",
    ),
    "float detection": (
        lambda: stripe_score(PATTERN, SQUARE.float()),
        TypeError, r"detection must be a bool tensor, got torch.float32; use .bool\(\)",
    ),
    "detection with too few keys": (
        lambda: stripe_score(PATTERN, SQUARE[:, :5]),
        r"detection \[7, 5\] does not fit patterns of \[7, 7\]",
    ),
    "detection with too many queries": (
        lambda: stripe_score(PATTERN, torch.ones(9, 7).bool()),
        r"detection \[9, 7\] does not fit patterns of \[7, 7\]",
    ),
    "detection of another batch": (
        lambda: stripe_score(PATTERN, SQUARE.expand(3, 7, 7)),
        r"detection \[3, 7, 7\] does not fit",
    ),
    "alignment of another length": (
        lambda: alignment_mass(CROSS, TOKENS),
        r"alignment \[2, 7\] does not fit a pattern of 2 examples and 5 queries",
    ),
    "float alignment": (
        lambda: alignment_mass(CROSS, TOKENS[:, :5].float()),
        TypeError, r"alignment must be an integer tensor",
    ),
    "previous token across two sequences": (
        lambda: prev_token_score(CROSS), r"lags are undefined between two sequences",
    ),
    "induction across two sequences": (
        lambda: induction_score(CROSS, TOKENS),
        r"give alignment_mass the alignment of target and source",
    ),
    "own position across two sequences": (
        lambda: alignment_mass(CROSS, TOKENS[:, :5], exclude_self=True),
        r"exclude_self is undefined between two sequences",
    ),
}  # fmt: skip

PATTERNS = {
    "kind of span": (
        lambda: attention_span(PATTERN, kind="far"),
        r"kind must be distance, relative, mass or effective, got 'far'",
    ),
    "mass above one": (lambda: attention_span(PATTERN, mass=1.5), r"mass must be in \(0, 1\]"),
    "no mass": (lambda: attention_span(PATTERN, mass=0), r"mass must be in \(0, 1\], got 0"),
    "kind of diversity": (
        lambda: head_diversity(PATTERN, kind="kl"), r"kind must be 'js' or 'variance', got 'kl'",
    ),
    "base": (lambda: attention_entropy(PATTERN, base=1), r"base must be positive and not 1, got 1"),
    "negative base": (lambda: attention_entropy(PATTERN, base=-2.0), r"base must be positive"),
    "max_lag": (lambda: lag_profile(PATTERN, max_lag=0), r"max_lag must be at least 1, got 0"),
    **{
        f"{metric.__name__} across two sequences": (
            lambda metric=metric: metric(CROSS), r"lags are undefined between two sequences",
        )
        for metric in (attention_span, self_mass, future_mass, lag_profile)
    },
}  # fmt: skip

MIXINGS = {
    "lags that do not match the taps": (
        lambda: BandMixing(torch.ones(3, 2), [0, 1, 2], 7), r"3 lags for 2 taps; give one lag per",
    ),
    "gain of another size": (
        lambda: ComposedMixing(DenseMixing(torch.eye(5)[None, None]), torch.ones(1, 2), [0, 1, 2]),
        r"gain must be \[head lag\] = \[1, 3\], got \[1, 2\]",
    ),
    "keys of another width": (
        lambda: SoftmaxMixing(torch.ones(2, 7, 3, 5), torch.ones(2, 7, 3, 4)).dense(),
        r"must agree in d_head",
    ),
    "key heads that do not divide the heads": (
        lambda: SoftmaxMixing(torch.ones(2, 7, 3, 5), torch.ones(2, 7, 2, 5)).dense(),
        r"must agree in batch and head",
    ),
    "unknown kind": (
        lambda: mixings({}, kind=("attention", "mamba")), r"unknown kind \['mamba'\]; allowed",
    ),
    "empty cache": (lambda: mixings({}), r"no attention or ssm layer in a cache of 0 activations"),
}  # fmt: skip

KERNEL_CASES = {
    "several kernels and no layer": (
        lambda: kernel_profile(KERNELS),
        r"hook_kernel is cached for \['blocks.0.conv', 'blocks.1.conv'\]; name one of them",
    ),
    "a layer that is not there": (
        lambda: kernel_profile(KERNELS, layer="blocks.7.conv"), r"layer='blocks.7.conv'.* name one",
    ),
    "no kernel": (
        lambda: kernel_profile({}), r"cached for no layer; run the model with that hook in names_f",
    ),
    "activations of no use": (
        lambda: kernel_profile(KERNELS, layer="blocks.1.conv"),
        r"need \['blocks.1.conv.hook_in', 'blocks.1.conv.hook_out'\] in the cache",
    ),
    "too many lags": (
        lambda: kernel_profile(torch.ones(5, 3), lags=[0, 1]), r"2 lags for 3 taps; give one lag",
    ),
    "keys of another shape": (
        lambda: smear_coefficient(torch.ones(2, 7, 3, 5), torch.ones(2, 6, 3, 5)),
        r"smeared and plain keys must both be \[batch pos head d_head\], got \[2, 7, 3, 5\] and",
    ),
    "tokens of other scores": (
        lambda: smear_evidence(PARTS, torch.ones(2, 5).long()),
        r"tokens \[2, 5\] do not belong to scores \[2, 3, 7, 7\] of lag 1",
    ),
}  # fmt: skip

SIMILARITY = {
    "one layer": (
        lambda: layer_similarity({f"{NAME}.hook_pattern": PATTERN}),
        r"at least two layers, found \['blocks.0.attn'\]",
    ),
    "kind": (lambda: layer_similarity(LAYERS, kind="l2"), r"kind='l2' \(js, cosine"),
    "heads": (
        lambda: layer_similarity(LAYERS, heads="max"), r"heads='max' \(mean, match\)",
    ),
    "sizes": (
        lambda: layer_similarity(SHORT),
        r"layers over 5 x 5 and 7 x 7 positions cannot be compared .*; use kind='cka'",
    ),
    "one activation": (
        lambda: layer_similarity({"a.hook_resid_post": torch.ones(2, 3, 5)}, kind="cka"),
        r"cka needs at least two cached activations at 'hook_resid_post'",
    ),
    "mask of another size": (
        lambda: layer_similarity(
            {f"{n}.hook_resid_post": torch.ones(2, 9, 5) for n in "ab"}, kind="cka",
            query_mask=torch.ones(2, 7).bool(),
        ),
        r"query_mask \[2, 7\] does not fit activations of \[batch pos\] = \[2, 9\]",
    ),
    "other tokens": (
        lambda: linear_cka(torch.ones(7, 3), torch.ones(5, 3)),
        r"x and y must be \[token width\] on the same tokens",
    ),
    "three tokens": (
        lambda: linear_cka(torch.ones(3, 2), torch.ones(3, 2)), r"needs at least 4 tokens, got 3",
    ),
}  # fmt: skip

BEHAVIOUR = {
    "logits of other tokens": (
        lambda: per_token_loss(LOGITS, TOKENS[:, :4]),
        r"logits must be \[batch pos d_vocab\] .* got \[2, 7, 5\] and \[2, 4\]",
    ),
    "logits without vocabulary": (
        lambda: induction_accuracy(LOGITS[..., 0], TOKENS), r"got \[2, 7\] and",
    ),
    "float tokens": (
        lambda: induction_loss(LOGITS, TOKENS.float()),
        TypeError, r"tokens must be an integer tensor, got torch.float32",
    ),
    "tokens out of the vocabulary": (
        lambda: ar_split(LOGITS, TOKENS + 1), r"tokens range over 1..5, .* over 0..4",
    ),
    "padding below zero": (
        lambda: induction_loss(LOGITS, TOKENS - 1), r"tokens range over -1..3",
    ),
    "one token": (
        lambda: per_token_loss(LOGITS[:, :1], TOKENS[:, :1]),
        r"need at least 2 tokens per example, got 1",
    ),
    "late beyond the context": (
        lambda: icl_score(LOGITS, TOKENS, late=7),
        r"need 1 <= early < late < 7 \(the context\), got early=1, late=7",
    ),
    "early at the first token": (
        lambda: icl_score(LOGITS, TOKENS, early=0), r"got early=0, late=6",
    ),
}  # fmt: skip

ALL = {
    f"{topic}: {case}": parts
    for topic, table in (
        ("source", SOURCES), ("heads", HEADS), ("patterns", PATTERNS), ("mixing", MIXINGS),
        ("kernels", KERNEL_CASES), ("similarity", SIMILARITY), ("behaviour", BEHAVIOUR),
    )
    for case, parts in table.items()
}  # fmt: skip


@pytest.mark.parametrize("case", ALL)
def test_wrong_input_is_refused_in_words(case, unchecked):
    call, *error, message = ALL[case]
    with pytest.raises(error[0] if error else ValueError, match=re.compile(message)):
        call()


def test_an_option_that_does_not_exist_is_refused_for_activations_too():
    cache = {f"{n}.hook_resid_post": torch.ones(2, 9, 5) for n in "ab"}
    with pytest.raises(TypeError, match="exclude_eos"):
        layer_similarity(cache, kind="cka", exclude_eos=True)


def test_a_reduction_that_does_not_exist(unchecked):
    scores = prev_token_score(LAYERS)
    with pytest.raises(ValueError, match=r"reduce must be 'macro' or 'micro', got 'median'"):
        scores.mean("median")  # pyrefly: ignore[bad-argument-type]
