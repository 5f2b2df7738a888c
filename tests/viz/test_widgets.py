"""Widgets without a browser: what is packed, escaped, refused, and how large it gets."""

import base64
import inspect
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from smearlens import kernel_profile as kernel_profile_of
from smearlens import layer_similarity as similarity_of
from smearlens.viz import circuitsvis_adapter, widgets
from smearlens.viz._payload import visible

HOSTILE = [
    "</script>",
    "</script><script>window.hacked=1</script>",
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<!--",
    "<!--<script ",
    "-->",
    "<![CDATA[",
    "]]>",
    "<svg/onload=window.hacked=1>",
    '"',
    "'",
    "\"><b onmouseover='window.hacked=1'>",
    "&lt;b&gt;",
    "&",
    "&#60;script&#62;",
    "\\",
    "\\u003c",
    "${window.hacked=1}",
    "`",
    "\u2028",
    "\u2029",
    "\u202eabc",
    "\x00",
    "\r\n\n",
    "\ud800",
    "</div></div>",
    "javascript:window.hacked=1",
    "{{7*7}}",
    "",
]


class Page(HTMLParser):
    """Tags, attributes, the data of each widget and the source of each script."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.images, self.scripts, self.inside = [], [], [], False
        self.views = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag == "script"
        if tag == "script":
            self.scripts.append("")
        if tag == "img":
            self.images.append(dict(attrs))
        self.views += [value for name, value in attrs if name == "data-view"]

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def payload(widget):
    return json.loads(Page(widget.to_html("page")).views[0])


def decoded(fields):
    """The numbers of a payload, value by value."""
    raw = zlib.decompress(base64.b64decode(fields["data"]))
    count = np.prod(fields["shape"])
    integers = struct.unpack(f"<{count}{'B' if fields['bits'] == 8 else 'H'}", raw)
    return np.array([fields["low"] + fields["step"] * n for n in integers]).reshape(fields["shape"])


def picture(widget):
    source = Page(widget.to_html("page")).images[0]["src"]
    return base64.b64decode(source.removeprefix("data:image/png;base64,"))


def softmax_rows(*shape, causal=False, seed=0):
    scores = np.random.default_rng(seed).normal(size=shape) * 2
    if causal:
        scores = np.where(np.tri(*shape[-2:], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def names(count):
    return [f"t{i}" for i in range(count)]


def one_of_each():
    generator = np.random.default_rng(1)
    return {
        "attention_heads": widgets.attention_heads(softmax_rows(3, 7, 7), names(7)),
        "attention_pattern": widgets.attention_pattern(softmax_rows(5, 11), names(5), names(11)),
        "evolution": widgets.evolution(softmax_rows(2, 3, 7, 7), [0, 500], names(7)),
        "layer_similarity": widgets.layer_similarity(np.corrcoef(generator.normal(size=(5, 9)))),
        "state_map": widgets.state_map(generator.normal(size=(3, 11, 5)), names(11)),
        "tokens": widgets.tokens(names(13), generator.normal(size=(2, 13))),
        "delta_strip": widgets.delta_strip(generator.random(13), names(13)),
        "kernel_profile": widgets.kernel_profile([0.1, 0.7, 0.3], [-1, 1, 0], null=(0.0, 0.2)),
    }


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_payload_tells_each_value_within_half_a_step(bits, signed):
    values = torch.rand(2, 3, 7, 11, dtype=torch.float64) - (0.4 if signed else 0)
    values[0, 1, 2, 3] = 0
    widget = widgets.attention_heads(
        values, names(7), names(11), normalised=False, exact=bits == 16
    )
    fields = payload(widget)
    top = values.abs().max().item()
    assert fields["bits"] == bits
    assert fields["step"] == pytest.approx(
        top * (2 if signed else 1) / (2**bits - (2 if signed else 1))
    )
    assert np.abs(decoded(fields) - values.numpy()).max() <= fields["step"] * 0.501
    assert decoded(fields)[0, 1, 2, 3] == pytest.approx(0, abs=1e-12)


def test_tensors_of_any_kind_are_read_and_left_alone():
    pattern = torch.softmax(torch.randn(3, 5, 5), -1)
    expected = decoded(payload(widgets.attention_heads(pattern, names(5))))
    before = pattern.clone()
    for same in (pattern.requires_grad_(), pattern.detach().numpy(), pattern.tolist()):
        np.testing.assert_array_equal(
            decoded(payload(widgets.attention_heads(same, names(5)))), expected
        )
    rounded = decoded(payload(widgets.attention_heads(pattern.bfloat16(), names(5))))
    np.testing.assert_allclose(rounded, expected, atol=0.01)
    torch.testing.assert_close(pattern.detach(), before.detach(), rtol=0, atol=0)


def test_hostile_strings_are_data_everywhere():
    length = len(HOSTILE)
    pattern = softmax_rows(2, length, length)
    for widget in (
        widgets.attention_heads(pattern, HOSTILE, labels=HOSTILE[:2], title=HOSTILE[1]),
        widgets.attention_heads(pattern, HOSTILE, HOSTILE[::-1], title=HOSTILE[11]),
        widgets.tokens(HOSTILE, np.arange(length), title=HOSTILE[3]),
        widgets.layer_similarity(np.eye(length), HOSTILE),
    ):
        html = widget.to_html("page")
        page = Page(html)
        assert page.tags == ["div", "img"]
        assert html.isascii()
        assert "\n" not in html
        assert not set("<>&'") & set(page.views[0])
        fields = json.loads(page.views[0])
        shown = fields["rows"] if len(fields["rows"]) > 1 else fields["cols"]
        assert shown == [visible(token) for token in HOSTILE]


def test_saved_page_escapes_its_title_and_forbids_the_network(tmp_path):
    title = "</title><script>window.hacked=1</script>\ud800"
    path = widgets.tokens(["a"], [1.0], title=title).save_html(tmp_path / "w.html")
    page = Page(path.read_text("utf-8"))
    assert page.tags.count("script") == 1
    assert "default-src 'none'" in path.read_text("utf-8")
    assert not re.search(r"https?:|//cdn|@import|url\(", path.read_text("utf-8"))


def test_visible_marks_what_cannot_be_seen():
    shown = [visible(t) for t in ["  ", "a b", "\r", "\t", "e\u0301", "👩\u200d💻", "\u200b"]]
    assert shown == ["␣␣", "a b", "⟨000D⟩", "⇥", "e\u0301", "👩\u200d💻", "⟨200B⟩"]


P = softmax_rows(3, 7, 7)
NAN = np.where(np.eye(7, dtype=bool), np.nan, 0.5)


def plain(function):
    """The function without run-time type checks, as users have it."""
    return inspect.unwrap(function)


def heads(pattern=P, count=7, *keys, **options):
    return plain(widgets.attention_heads)(pattern, names(count), *map(names, keys), **options)


def kernel(profile, lags, **options):
    return widgets.kernel_profile(profile, lags, **options)


def component(name, **props):
    return plain(circuitsvis_adapter.component)(name, **props)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heads(P[0]), r"\[head query key\].*\(7, 7\)"),
        (lambda: heads(P[None, None]), r"\(1, 1, 3, 7, 7\).*pattern\[0\]"),
        (lambda: widgets.attention_pattern(P, names(7)), r"\[query key\].*\(3, 7, 7\)"),
        (lambda: heads(P[:0]), "without empty axes"),
        (lambda: heads(P, 5), "query_tokens has 5.*query axis has 7"),
        (lambda: heads(P, 7, 5), "key_tokens has 5.*key axis has 7"),
        (lambda: heads(P[:, :5], 5), "5 queries and 7 keys; pass key_tokens"),
        (lambda: heads(NAN[None]), r"7 non-finite.*pattern\[0, 0, 0\].*nan_to_num"),
        (lambda: heads(mask="upper"), "'none' or 'causal', got 'upper'"),
        (lambda: heads(P[:, :5], 5, 7, mask="causal"), "square pattern, got 5 x 7"),
        (lambda: heads(labels=["a"]), "labels has 1 entries.*head axis has 3"),
        (lambda: heads(scale="log"), "'linear' or 'sqrt', got 'log'"),
        (lambda: widgets.evolution(P[None], [1, 2], names(7)), "steps has 2.*1 checkpoints"),
        (lambda: widgets.delta_strip([-1.0, 2.0], names(2)), "hook_delta, not hook_delta_raw"),
        (lambda: widgets.state_map(np.ones(5), names(5)), r"\[pos d_state\].*\(5,\)"),
        (lambda: kernel([1.0, 2.0], [0]), r"2 different integers, got \[0\]"),
        (lambda: kernel([1.0, 2.0], [1, 1]), r"2 different integers, got \[1, 1\]"),
        (lambda: kernel([1.0], [0], low=[0.0]), "low and high must be given together"),
        (lambda: kernel([1.0], [0], low=[2.0], high=[1.0]), r"above the upper one at \[0, 0\]"),
        (lambda: kernel([1.0, 2.0], [0, 1], null=([0, 0, 0], 1.0)), r"null must fit.*\(3,\)"),
        (lambda: plain(widgets.Widget.to_html)(heads(), "cdn"), "'inline' or 'page', got 'cdn'"),
        (lambda: component("Heads"), "no component 'Heads'.*AttentionHeads"),
        (lambda: component("AttentionHeads", mask="x"), "'none' or 'causal', got 'x'"),
        (lambda: component("ColoredTokens", values=[np.nan]), "values must be finite, got nan"),
    ],
)
def test_bad_input_is_told_what_to_write_instead(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: widgets.tokens("abc", [1.0, 2.0, 3.0]), "one str of length 3; use list"),
        (lambda: widgets.tokens(["a"], np.array([1j])), "real numbers, got dtype complex128"),
        (lambda: widgets.tokens(["a"], np.array(["x"])), "real numbers, got dtype <U1"),
        (lambda: circuitsvis_adapter.component("ColoredTokens", tokens={1}), "tokens must hold"),
    ],
)
def test_wrong_types_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 513, 2), r"513 x 2 positions, more than 512.*pattern\[\.\.\., -512:, -512:\]"),
        ((65, 2, 3), r"65 heads, more than 64.*pattern\[\.\.\., :64, :, :\]"),
        ((2, 64, 512, 400), r"26,214,400 cells.*first of its 2 maps: pattern\[:1\]"),
    ],
)
def test_too_large_says_how_to_slice(shape, message):
    pattern = np.broadcast_to(np.float32(1 / shape[-1]), shape)
    with pytest.raises(ValueError, match=message):
        widgets.attention_heads(pattern, names(shape[-2]), names(shape[-1]))


def test_rows_that_do_not_sum_to_one_warn():
    pattern = softmax_rows(2, 5, 5)
    pattern[1, 2] *= 1.5
    with pytest.warns(UserWarning, match=r"head 1, query 2 sums to 1\.5; pass normalised=False"):
        widgets.attention_heads(pattern, names(5))
    widgets.attention_heads(pattern, names(5), normalised=False)


def test_a_mask_that_hides_something_warns():
    with pytest.warns(UserWarning, match=r"hides up to 0\.\d+ of a row .* pass mask='none'"):
        widgets.attention_heads(softmax_rows(2, 5, 5), names(5), mask="causal")
    widgets.attention_heads(softmax_rows(2, 5, 5, causal=True), names(5), mask="causal")


def noise(*shape):
    rows = np.random.default_rng(2).random(shape)  # the worst that can be compressed
    return rows / rows.sum(-1, keepdims=True)


def test_size_budgets(tmp_path):
    small = widgets.attention_heads(noise(8, 64, 64), names(64))
    large = widgets.attention_heads(noise(8, 256, 256), names(256))
    assert small.save_html(tmp_path / "small.html").stat().st_size <= 60_000
    assert large.save_html(tmp_path / "large.html").stat().st_size <= 1_000_000
    pages = widgets.page_bundle() + 20 * small.to_html("page")
    assert len(pages) <= 2_000_000
    assert len(widgets.page_bundle()) <= 10_000


@pytest.mark.parametrize("shape", [(2, 5, 7), (8, 64, 64), (64, 40, 40), (3, 512, 512)])
def test_static_picture_is_small_and_not_blank(shape):
    picture_bytes = picture(
        widgets.attention_heads(noise(*shape), names(shape[1]), names(shape[2]))
    )
    assert len(picture_bytes) <= 20_000
    image = Image.open(io.BytesIO(picture_bytes)).convert("RGBA")
    assert image.width <= 740
    assert len(image.getcolors(image.width * image.height)) > 5


@pytest.mark.parametrize("kind", one_of_each())
def test_every_kind_has_a_picture_a_summary_and_both_forms(kind):
    widget = one_of_each()[kind]
    bundle = widget._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert bundle["text/plain"] == repr(widget) == Page(bundle["text/html"]).images[0]["alt"]
    assert repr(widget).startswith(kind + ": ")
    assert bundle["text/html"] == widget.to_html("page") + widgets.page_bundle()
    image = Image.open(io.BytesIO(picture(widget))).convert("RGBA")
    assert len(image.getcolors(image.width * image.height)) > 4


def test_thin_stripes_survive_in_the_static_picture():
    pattern = np.zeros((2, 500, 500), np.float32)
    pattern[0, np.arange(500), np.maximum(0, np.arange(500) - 100)] = 1
    pattern[1, :, 0] = 1
    image = Image.open(io.BytesIO(picture(widgets.attention_heads(pattern, names(500)))))
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    first = alpha[23:107, 2:86] == 255
    rows = np.arange(30, 84)
    assert all(first[row, max(0, row * 1 - 17 - 2) : row - 17 + 3].any() for row in rows)
    assert (alpha[23:107, 94] == 255).all()


def test_png_file_is_opaque_and_zoomed(tmp_path):
    widget = one_of_each()["attention_heads"]
    sizes = []
    for zoom in (1, 3):
        image = Image.open(widget.save_png(tmp_path / "w.png", zoom=zoom)).convert("RGBA")
        assert np.asarray(image)[..., 3].min() == 255
        sizes.append(image.width)
    assert sizes[1] == pytest.approx(3 * sizes[0], abs=16)


def test_notes_name_the_strongest_stripe():
    length, rng = 12, np.random.default_rng(3)
    pattern = softmax_rows(4, length, length) * 0.2
    for query in range(length):
        pattern[0, query, max(0, query - 1)] += 0.8
        pattern[1, query, max(0, query - 5)] += 0.8
        pattern[2, query, 0] += 0.8
        pattern[3, query, min(length - 1, query + 2)] += 0.8
    notes = payload(widgets.attention_heads(pattern, names(length)))["notes"][0]
    assert [note.split(":")[0] for note in notes] == ["lag 1", "lag 5", "key 0", "lag −2"]
    mean = np.mean([pattern[1, q, q - 5] for q in range(5, length)])
    assert notes[1].endswith(f"{mean:.2f}")
    cross = widgets.attention_heads(pattern, names(length), list(rng.permutation(names(length))))
    assert payload(cross)["notes"] == [["", "", "", ""]]


def test_kernel_is_sorted_by_lag_and_says_its_numbers():
    widget = widgets.kernel_profile(
        [[0.3, 0.7, 0.1], [0.2, 0.5, 0.4]],
        [0, 1, -1],
        low=[[0.2, 0.6, 0.0], [0.1, 0.4, 0.3]],
        high=[[0.4, 0.9, 0.2], [0.3, 0.6, 0.5]],
        null=(0.0, [0.05, 0.06, 0.07]),
    )
    fields = payload(widget)
    assert fields["cols"] == ["−1", "0", "1"]
    assert fields["future"] == 1
    assert fields["says"][0][0] == "lag −1: 0.1 in [0, 0.2], null [0, 0.07] (future)"
    assert fields["says"][1][2] == "lag 1: 0.5 in [0.4, 0.6], null [0, 0.06]"
    assert (fields["low"], fields["high"]) == (0, pytest.approx(0.9))
    np.testing.assert_allclose(decoded(fields)[1, 0, 0], [0.4, 0.2, 0.5], atol=1e-4)


def test_a_kernel_profile_is_shown_as_it_is_with_its_interval_and_null():
    profile = kernel_profile_of(torch.randn(11, 3), lags=[1, 0, -1])
    numbers = {
        "low": profile.low,
        "high": profile.high,
        "null": (profile.null_rms, profile.null_high),
    }
    expected = widgets.kernel_profile(profile.rms, profile.lags, **numbers)
    assert payload(widgets.kernel_profile(profile)) == payload(expected)
    other = payload(widgets.kernel_profile(profile, null=(0.0, 0.1), title="conv"))
    assert (other["title"], other["says"][0][0][-20:]) == ("conv", ", null [0, 0.1] (future)"[-20:])
    for given in ((profile, [0, 1, 2]), ([0.1, 0.2],)):
        with pytest.raises(ValueError, match="lags belong to numbers, one for each; a KernelPro"):
            widgets.kernel_profile(*given)


def test_a_similarity_names_its_layers_its_measure_and_its_null():
    def layers(seed):
        return {
            f"blocks.{i}.attn.hook_pattern": torch.tensor(softmax_rows(2, 3, 7, 7, seed=i + seed))
            for i in range(3)
        }

    found = similarity_of(layers(0), null=layers(5))
    fields = payload(widgets.layer_similarity(found))
    assert fields["rows"] == [f"blocks.{i}.attn" for i in range(3)]
    null = sorted(pair[-1] for pair in found.pairs())
    assert fields["title"] == f"js, heads by mean; null {null[0]:.3g} to {null[-1]:.3g}"
    np.testing.assert_allclose(decoded(fields)[0, 0], found.values, atol=1e-4)
    assert payload(widgets.layer_similarity(similarity_of(layers(0))))["title"] == found.name
    named = payload(widgets.layer_similarity(found, ["a", "b", "c"], title="mine"))
    assert (named["rows"], named["title"]) == (["a", "b", "c"], "mine")


def test_one_example_of_a_cache_is_shown_as_it_is():
    pattern = softmax_rows(1, 3, 7, 7)
    whole, alone = (payload(widgets.attention_heads(p, names(7))) for p in (pattern, pattern[0]))
    assert whole == alone


CALLER = """
import warnings
import torch
from smearlens.viz import widgets

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    widgets.attention_heads(torch.ones(2, 3, 3), list("abc"))
    widgets.attention_pattern(torch.full((3, 3), 1 / 3), list("abc"), mask="causal")
    widgets.evolution(torch.ones(1, 2, 3, 3), [5], list("abc"))
print(*[f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in caught])
"""


def test_warnings_point_at_the_line_that_called(tmp_path):
    script = tmp_path / "mine.py"  # a process of its own: run-time type checks add frames
    script.write_text(CALLER)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mine.py:8", "mine.py:9", "mine.py:10"]


def test_signed_maps_diverge_and_sqrt_lifts_small_values():
    signed = payload(widgets.layer_similarity([[1.0, -0.5], [-0.5, 1.0]]))
    assert (signed["low"], signed["high"], signed["ends"]) == (-1, 1, ["−1", "1"])
    linear, lifted = (
        [place for place, _ in payload(widgets.tokens(["a"], [1.0], scale=scale))["colors"][0]]
        for scale in ("linear", "sqrt")
    )
    assert lifted == [place**2 for place in linear]


def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    widget = widgets.tokens(["a"], [1.0])
    path = tmp_path / "w.html"
    path.write_text("old")
    umask = os.umask(0o027)
    try:
        widget.save_html(path)
    finally:
        os.umask(umask)
    assert "smearlens" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o640

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    before = path.read_text()
    with pytest.raises(OSError, match="disk full"):
        widget.save_png(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing; create it first"):
        widget.save_html(tmp_path / "missing" / "w.html")


def test_import_is_light():
    code = (
        "import sys, smearlens.viz.widgets, smearlens.viz.circuitsvis_adapter; print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"transformer_lens", "matplotlib", "PIL", "scipy", "pandas", "circuitsvis"}
    assert not heavy & set(loaded.stdout.split())


def test_circuitsvis_props_are_escaped_rounded_and_masked_only_on_request():
    tokens = [token for token in HOSTILE if token]
    html = circuitsvis_adapter.component(
        "AttentionHeads", attention=torch.full((1, 2, 2), 1 / 3), tokens=tokens, max_value=None
    ).to_html("page")
    page = Page(html)
    assert page.tags == ["div", "div", "script"]
    assert html.count("<div") == html.count("</div>") == 2
    assert html.isascii()
    assert "\n" not in html
    key, name, props = json.loads(re.search(r"push\((.*)\);window", page.scripts[0])[1])
    assert f'id="{key}"' in html
    assert name == "AttentionHeads"
    assert not any(re.search("[<&][^\u2060]", token) for token in props["tokens"])
    assert [token.replace("\u2060", "") for token in props.pop("tokens")] == tokens
    assert props == {
        "attention": [[[0.3333, 0.3333]] * 2],
        "maskUpperTri": False,
    }
    causal = circuitsvis_adapter.component("AttentionPattern", mask="causal", show_axis_labels=True)
    assert causal.props == {"showAxisLabels": True, "maskUpperTri": True}


def test_circuitsvis_bundle_comes_once_per_kernel(monkeypatch):
    monkeypatch.setattr(circuitsvis_adapter, "_shown", False)
    bundle = circuitsvis_adapter.embed_bundle()._repr_html_()
    page = Page(bundle)
    assert page.tags == ["script"]
    assert "sourceMappingURL" not in bundle
    assert bundle.rstrip().endswith("document$.subscribe(slFlush);\n</script>")
    component = circuitsvis_adapter.component("ColoredTokens", tokens=["a"], values=[1.0])
    assert component._repr_html_() == component.to_html("page") + bundle
    assert component._repr_html_() == component.to_html("page")
