"""Tracking of attention against the functions that read whole patterns, and closed forms."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import smearlens.analysis.mixing.layer_streams as layer_streams
from smearlens.analysis.behaviour import icl_score, induction_loss, per_token_loss
from smearlens.analysis.heads import induction_score, prev_token_score
from smearlens.analysis.mixing.kinds import SoftmaxMixing
from smearlens.analysis.mixing.layer_streams import cka_table, compare_layers, head_statistics
from smearlens.analysis.patterns import (
    attention_entropy,
    attention_span,
    head_diversity,
    sink_mass,
)
from smearlens.analysis.similarity import layer_similarity, linear_cka
from smearlens.data.batches import TokenBatches
from smearlens.data.synthetic import repeated_tokens
from smearlens.models.attn_attn import AttnAttn, AttnAttnConfig
from smearlens.models.mamba import Mamba
from smearlens.training.attention_tracking import AttentionTracking, GenerationTracking
from smearlens.training.config import TrainConfig
from smearlens.training.loop import train
from smearlens.training.tracking import Tracker

SIZES = AttnAttnConfig(d_vocab=23, d_model=15, n_heads=3, n_layers=4, n_ctx=37)
PAIRS = [("blocks.0", "blocks.2"), ("blocks.1", "blocks.2"), ("blocks.0", "blocks.3")]


def model_of(seed, sharp=3.0, config=SIZES):
    """A model in float64 whose attention is not near uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AttnAttn(config).double()
    for block in model.blocks:
        block.attn.in_proj.weight.data *= sharp
    return model.eval()


@pytest.fixture
def model():
    return model_of(1)


@pytest.fixture
def text(generator):
    return torch.randint(23, (5, 37), generator=generator)


def random_layers(generator, n_heads=(3, 2, 3), length=19, batch=2, causal=True):
    def draw(heads):
        q, k = torch.randn(2, batch, length, heads, 5, generator=generator, dtype=torch.float64)
        return SoftmaxMixing(2 * q, k, causal=causal)

    return {f"blocks.{i}": draw(h) for i, h in enumerate(n_heads)}


def dense(layers):
    """The same layers by their whole patterns, which the reference functions read."""
    return {f"{name}.attn.hook_pattern": m.dense() for name, m in layers.items()}


@pytest.mark.parametrize("causal", [True, False])
def test_head_statistics_equal_those_of_whole_patterns(causal, generator):
    layer = random_layers(generator, causal=causal)["blocks.0"]
    pattern = layer.dense()
    found = head_statistics(layer)
    expected = {
        "entropy": attention_entropy(pattern),
        "normalised_entropy": attention_entropy(pattern, normalised=True),
        "distance": attention_span(pattern),
        "sink": sink_mass(pattern),
        "previous": prev_token_score(pattern),
        "entropy_without_first": attention_entropy(pattern, exclude_bos=True),
        "normalised_entropy_without_first": attention_entropy(
            pattern, normalised=True, exclude_bos=True
        ),
        "distance_without_first": attention_span(pattern, exclude_bos=True),
    }
    if causal:
        expected["span"] = attention_span(pattern, kind="mass")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")
    assert found.keys() - expected.keys() <= {"span"}


def test_uniform_attention_has_the_values_of_its_formulas():
    q = torch.zeros(2, 8, 3, 5, dtype=torch.float64)
    found = head_statistics(SoftmaxMixing(q, q))
    harmonic = sum(1 / i for i in range(1, 9))
    closed = {
        "entropy": math.lgamma(9) / 8,
        "normalised_entropy": 1,
        "distance": 7 / 4,
        "sink": harmonic / 8,
        "previous": (harmonic - 1) / 7,
        "entropy_without_first": math.lgamma(8) / 7,
        "normalised_entropy_without_first": 1,
        "distance_without_first": 6 / 4,
    }
    assert found["entropy"][0, 0].item() == pytest.approx(1.325575, abs=1e-6)
    assert found["previous"][0, 0].item() == pytest.approx(0.245408, abs=1e-6)
    for name, value in closed.items():
        torch.testing.assert_close(found[name], torch.full((2, 3), value, dtype=torch.float64))
    compared = compare_layers({"a": SoftmaxMixing(q, q), "b": SoftmaxMixing(q, q)})
    assert compared.js[:, 0, 1].tolist() == pytest.approx([1, 1])
    assert compared.cosine[:, 0, 1].tolist() == pytest.approx([1, 1])
    assert compared.centred[:, 0, 1].isnan().all()
    assert compared.diversity.abs().max() < 1e-12


def test_two_layers_that_look_apart():
    """One looks at itself, the other at the token before: JS is log 2 on rows from 1 on."""
    at = 40 * torch.eye(8, dtype=torch.float64)[None, :, None]
    before = at.roll(1, 1)
    itself, previous = SoftmaxMixing(at, at), SoftmaxMixing(at, before.roll(-2, 1))
    assert head_statistics(previous)["previous"].item() == pytest.approx(1)
    compared = compare_layers({"itself": itself, "previous": previous})
    assert compared.js[0, 0, 1].item() == pytest.approx(0, abs=1e-9)
    assert compared.cosine[0, 0, 1].item() == pytest.approx(1 / 8)  # they agree in row 0 alone
    uniform = SoftmaxMixing(torch.zeros_like(at), at)
    compared = compare_layers({"itself": itself, "uniform": uniform})
    assert compared.cosine[0, 0, 1].item() == pytest.approx(0.582865, abs=1e-6)


@pytest.mark.parametrize("entries", [1, 900, 2**22])
@pytest.mark.parametrize("causal", [True, False])
def test_compared_layers_equal_those_of_whole_patterns(causal, entries, generator, monkeypatch):
    monkeypatch.setattr(layer_streams, "ENTRIES", entries)
    layers = random_layers(generator, (3, 3, 3), causal=causal)
    cache = dense(layers)
    found = compare_layers(layers)
    assert found.layers == ["blocks.0", "blocks.1", "blocks.2"]
    for i, each in enumerate(head_diversity(cache).values()):
        torch.testing.assert_close(found.diversity[:, i], each)
    kinds = {
        "js": {"kind": "js"},
        "cosine": {"kind": "cosine", "centred": False},
        "centred": {"kind": "cosine"},
        "matched": {"kind": "cosine", "heads": "match"},
    }
    for name, options in kinds.items():
        expected = layer_similarity(cache, **options).values
        torch.testing.assert_close(getattr(found, name).mean(0), expected)


def test_layers_may_differ_in_heads_and_one_head_has_no_diversity(generator):
    layers = random_layers(generator, (1, 4, 2))
    found, cache = compare_layers(layers), dense(layers)
    assert found.diversity.isnan().tolist() == [[True, False, False]] * 2
    torch.testing.assert_close(found.js.mean(0), layer_similarity(cache).values)
    matched = layer_similarity(cache, kind="cosine", heads="match").values
    torch.testing.assert_close(found.matched.mean(0), matched)


def test_only_the_chosen_rows_count(generator):
    layers = random_layers(generator)
    rows = slice(4, -3)
    mask = torch.zeros(19, dtype=torch.bool)
    mask[rows] = True
    pattern = layers["blocks.0"].dense()
    found = head_statistics(layers["blocks.0"], rows=rows)
    torch.testing.assert_close(found["entropy"], attention_entropy(pattern, query_mask=mask))
    torch.testing.assert_close(found["previous"], prev_token_score(pattern, query_mask=mask))
    compared = compare_layers(layers, rows=rows)
    expected = layer_similarity(dense(layers), query_mask=mask).values
    torch.testing.assert_close(compared.js.mean(0), expected)
    expected = layer_similarity(dense(layers), kind="cosine", query_mask=mask).values
    torch.testing.assert_close(compared.centred.mean(0), expected)


@pytest.mark.parametrize("n_tokens", [13, 190])
def test_cka_equals_the_one_with_gram_matrices(n_tokens, generator):
    streams = [
        torch.randn(2, n_tokens, width, generator=generator, dtype=torch.float64)
        for width in (7, 11, 5)
    ]
    streams[1][..., :7] += streams[0]
    table = cka_table(streams)
    for i, x in enumerate(streams):
        for j, y in enumerate(streams):
            expected = linear_cka(x.flatten(0, 1), y.flatten(0, 1))
            assert table[i, j].item() == pytest.approx(expected if i != j else 1)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64)).Q
    assert cka_table([streams[0], 3 * streams[0] @ turn])[0, 1].item() == pytest.approx(1)


def test_layers_of_other_sequences_are_refused(generator):
    layers = random_layers(generator) | {"blocks.9": random_layers(generator, length=7)["blocks.0"]}
    with pytest.raises(ValueError, match="over the same sequences, got"):
        compare_layers(layers)


def test_every_number_is_that_of_its_definition(model, text, generator):
    metric = AttentionTracking(text, generator=generator, windows=3)
    with torch.no_grad():
        found = metric(model)
        logits, cache = model.run_with_cache(text)
    first = {name: value[:3] for name, value in cache.items() if value.ndim > 2}
    for name, scores in {
        "entropy": attention_entropy(first),
        "distance_without_first": attention_span(first, exclude_bos=True),
        "span": attention_span(first, kind="mass"),
        "previous": prev_token_score(first),
    }.items():
        for layer, values in scores.mean().items():
            short = layer.removesuffix(".attn")
            assert found[f"{name}/{short}"] == pytest.approx(values.mean().item())
            for head, value in enumerate(values.tolist()):
                assert found[f"{name}/{short}/head.{head}"] == pytest.approx(value)
    js, cka = layer_similarity(first), layer_similarity(first, kind="cka")
    centred = layer_similarity(first, kind="cosine")
    for one, other in PAIRS:
        i, j = int(one[-1]), int(other[-1])
        pair = f"{one}-{other}"
        assert found[f"js/{pair}"] == pytest.approx(js.values[i, j].item())
        assert found[f"centred_cosine/{pair}"] == pytest.approx(centred.values[i, j].item())
        assert found[f"cka/{pair}"] == pytest.approx(cka.values[i, j].item())
    diversity = head_diversity(first)["blocks.2.attn"].mean().item()
    assert found["head_diversity/blocks.2"] == pytest.approx(diversity)
    losses = per_token_loss(logits, text)
    assert found["loss"] == pytest.approx(losses.mean().item())
    for window, position in enumerate(metric.positions[:, 0].tolist()):
        assert found[f"token_loss/{window}"] == pytest.approx(losses[window, position].item())
    assert found["icl_score"] == pytest.approx(icl_score(logits, text).mean())
    assert all(math.isfinite(value) for value in found.values())


def test_the_null_of_shuffled_tokens(model, text, generator):
    metric = AttentionTracking(text, generator=generator, windows=3)
    assert not torch.equal(metric.shuffled, text[:3])
    assert torch.equal(metric.shuffled.sort(1).values, text[:3].sort(1).values)
    with torch.no_grad():
        found = metric(model)
        logits, cache = model.run_with_cache(metric.shuffled)
    expected = layer_similarity(cache).values[1, 2].item()
    assert found["shuffled/js/blocks.1-blocks.2"] == pytest.approx(expected)
    expected = icl_score(logits, metric.shuffled).mean()
    assert found["shuffled/icl_score"] == pytest.approx(expected)


def test_the_null_of_an_untrained_model_is_measured_once(model, text, generator):
    untrained = model_of(2).train()
    metric = AttentionTracking(text, generator=generator, untrained=untrained)
    with torch.no_grad():
        first, again = metric(model), metric(model_of(3))
        _, cache = untrained.run_with_cache(text)
    expected = layer_similarity(cache).values[0, 3].item()
    for found in (first, again):
        assert found["untrained/js/blocks.0-blocks.3"] == pytest.approx(expected)
        assert "untrained/entropy/blocks.3" in found
    assert first["js/blocks.0-blocks.3"] != again["js/blocks.0-blocks.3"]
    assert untrained.training


def test_repeats_show_induction(model, text, generator):
    repeats = repeated_tokens(7, (5, 11), 33, 23, generator=generator)
    with torch.no_grad():
        found = AttentionTracking(text, generator=generator, repeats=repeats)(model)
        logits, cache = model.run_with_cache(repeats)
    scores = induction_score(cache, repeats)
    for layer, values in scores.mean().items():
        short = layer.removesuffix(".attn")
        assert found[f"induction/{short}"] == pytest.approx(values.mean().item())
        assert found[f"induction/{short}/head.2"] == pytest.approx(values[2].item())
        control = scores.control[layer].mean().item()
        assert found[f"induction_control/{short}"] == pytest.approx(control)
    expected = induction_loss(logits, repeats).mean().item()
    assert found["induction_loss"] == pytest.approx(expected)
    expected = attention_entropy(cache).mean()["blocks.1.attn"].mean().item()
    assert found["repeats/entropy/blocks.1"] == pytest.approx(expected)


def test_generated_text_is_measured_where_the_model_wrote(model, text, generator):
    prompts = text[:2, :9]
    metric = GenerationTracking(prompts, 13, generator=generator)
    found, again = metric(model), metric(model)
    assert found == again
    written = model.generate(prompts, 13, generator=torch.Generator().manual_seed(0))
    metric = GenerationTracking(prompts, 13, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(22, dtype=torch.bool)
    mask[8:21] = True  # these rows produced tokens 9 to 21
    _, cache = model.run_with_cache(written)
    found = metric(model)
    expected = attention_entropy(cache, query_mask=mask).mean()["blocks.1.attn"].mean().item()
    assert found["generated/entropy/blocks.1"] == pytest.approx(expected)
    expected = layer_similarity(cache, query_mask=mask).values[0, 3].item()
    assert found["generated/js/blocks.0-blocks.3"] == pytest.approx(expected)


def test_tracking_changes_no_byte_of_the_loss_log(text, generator, tmp_path):
    config = AttnAttnConfig(
        d_vocab=23, d_model=14, n_heads=2, n_layers=3, n_ctx=17, norm=True, dropout=0.2
    )
    data = TokenBatches(text.flatten(), batch_size=3, length=17, seed=5)
    repeats = repeated_tokens(2, (3, 5), 17, 23, generator=generator)
    metrics = [
        AttentionTracking(
            text[:, :17], generator=generator, repeats=repeats, untrained=model_of(2, config=config)
        ),
        GenerationTracking(text[:2, :3], 5, generator=generator),
    ]
    for name, callbacks in {"plain": [], "tracked": [Tracker(*metrics, at=3)]}.items():
        torch.manual_seed(4)
        result = train(
            AttnAttn(config), data, TrainConfig(steps=7, lr=0.01), out=tmp_path / name,
            callbacks=callbacks,
        )  # fmt: skip
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("plain", "tracked")]
    assert logs[0] == logs[1]
    rows = result.log("tracking")
    assert [row["step"] for row in rows] == [0, 3, 6, 7]
    assert rows[0]["entropy/blocks.1"] != rows[-1]["entropy/blocks.1"]
    assert rows[0]["untrained/js/blocks.0-blocks.1"] == rows[-1]["untrained/js/blocks.0-blocks.1"]


PEAK = """
import re, sys
from pathlib import Path
import torch
from smearlens.models.attn_attn import AttnAttn, AttnAttnConfig
from smearlens.training.attention_tracking import AttentionTracking
from smearlens.data.synthetic import repeated_tokens
length = int(sys.argv[1])
model = AttnAttn(AttnAttnConfig(d_vocab=29, d_model=48, n_heads=4, n_layers=3, n_ctx=length))
generator = torch.Generator().manual_seed(0)
text = torch.randint(29, (1, length), generator=generator)
repeats = repeated_tokens(1, (8, 20), length, 29, generator=generator)
with torch.no_grad():
    AttentionTracking(text[:, :64], generator=generator, repeats=repeats[:, :64])(model)
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")
    before = int(re.search(r"VmRSS:\\s+(\\d+)", status.read_text())[1])
    AttentionTracking(text, generator=generator, repeats=repeats)(model)
    print(int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) - before)
"""


def peak_rise(length):
    """MB that one look adds to a process that has looked before."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, str(length)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(run.stdout) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc of Linux")
def test_memory_grows_with_the_length_and_not_with_its_square():
    short, long = peak_rise(768), peak_rise(3072)
    patterns = 12 * 3072**2 * 4 / 2**20  # MB of all patterns in float32
    assert long < patterns / 4
    assert long < 4 * short


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, r"windows at least 1, got text \[5, 37\] and windows=0"),
        ({"text": torch.zeros(5, 2, dtype=torch.int64)}, "at least 3 tokens"),
        ({"text": torch.zeros(0, 7, dtype=torch.int64)}, "some windows"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, text, generator):
    with pytest.raises(ValueError, match=message):
        AttentionTracking(**{"text": text, "generator": generator, **options})


def test_a_model_without_attention_is_refused(text, generator):
    metric = AttentionTracking(text, generator=generator)
    with pytest.raises(ValueError, match="Mamba has no self-attention to track"):
        metric(Mamba.from_preset("cpu"))


class Reached(Exception):
    """The model was called."""


def test_tokens_follow_the_model_to_its_device(model, text, generator, monkeypatch):
    tracking = AttentionTracking(text, generator=generator, repeats=text, untrained=model)
    written = GenerationTracking(text[:, :3], 5, generator=generator)
    seen = []

    def called(tokens, *args, **options):
        seen.append(tokens.device.type)
        raise Reached

    monkeypatch.setattr(model, "run_with_cache", called)
    monkeypatch.setattr(model, "generate", called)
    model.to("meta")  # a device that every machine has
    looks = (tracking._on_text, tracking._on_shuffled, tracking._on_repeats, written)
    for look in (*looks, lambda _: tracking._of_untrained()):
        with pytest.raises(Reached):
            look(model)
    assert seen == ["meta"] * 5
