"""Widgets in a headless Chromium: drawn, quiet, offline, safe, resizable, usable by keyboard.

A Chromium is all these tests need; `SMEARLENS_CHROMIUM` names one that is not on the path.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smearlens.viz import circuitsvis_adapter, widgets
from smearlens.viz._payload import visible

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

from sitegen.browser import CANDIDATES, INKED, Browser, Page, find_browser

FOUND = find_browser()
pytestmark = pytest.mark.skipif(not FOUND, reason=f"no browser on the path: {CANDIDATES}")

HOSTILE = [
    "</script>",
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<img/src=x/onerror=window.hacked=1>",
    "<svg/onload=window.hacked=1>",
    "<!--",
    "<!--<script ",
    "-->",
    "<![CDATA[",
    "]]>",
    '"',
    "'",
    "`",
    "&",
    "&lt;b&gt;",
    "&#60;b&#62;",
    "\\",
    "\\u003c",
    "\"><b onmouseover='window.hacked=1'>",
    "${window.hacked=1}",
    "</div></div>",
    "</style>",
    "{{7*7}}",
    "javascript:window.hacked=1",
    "<iframe>",
    "<base href=//x>",
    "\u2028",
    "\u2029",
    "\u202e",
    "\x00",
    "\n",
    "",
    "\ud800",
]


class Tab(Page):
    """A tab with a pointer and a keyboard, and the first widget in it."""

    def wait(self, event):
        while not any(e["method"] == event for e in self.browser.events[-1:]):
            self.browser.events.append(self.browser.receive())

    def mouse(self, x, y):
        self.do("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            extra = {"text": "\r"} if name == "Enter" else {}
            self.do("Input.dispatchKeyEvent", type=kind, key=name, code=name, **extra)
        self.settle()

    def say(self):
        return self.js("document.querySelector('sl-say').textContent")

    def map(self):
        """Left, top, cell width and cell height of the large map, from where crosshairs go."""
        return self.js(MAP)

    def hover(self, query, key):
        left, top, width, height = self.map()
        self.mouse(left + (key + 0.5) * width, top + (query + 0.5) * height)

    def pixels(self):
        return np.asarray(Image.open(io.BytesIO(self.shot())).convert("RGB"))

    def open(self, path):
        return super().open(path.as_uri())

    def problems(self):
        """Console messages, exceptions and requests other than the page itself."""
        return [
            *self.messages(),
            *(url for url in self.requests() if not url.startswith("file:")),
        ]


MAP = """(() => {
  const canvas = document.querySelector("sl-row canvas"), box = canvas.getBoundingClientRect();
  const p = JSON.parse(window.payload), [, , Q, K] = p.shape;
  const width = (box.width - p.left - 4) / K, height = p.tall || width;
  return [box.x + p.left, box.y + 5, width, height];
})()"""
EARLY = """window.written = [];
const fill = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
  const m = this.getTransform();
  written.push([text, m.e, m.f, m.b]);
  return fill.call(this, text, ...rest);
};
new MutationObserver(() => {
  window.payload ||= document.querySelector(".smearlens")?.dataset.view;
}).observe(document, {childList: true, subtree: true});"""


@pytest.fixture(scope="module")
def browser():
    with Browser(FOUND) as browser:
        yield browser


@pytest.fixture
def page(browser):
    """A quiet tab: no console message, no request, whatever the test did."""
    page = Tab(browser)
    page.do("Page.addScriptToEvaluateOnNewDocument", source=EARLY)
    yield page
    assert page.problems() == []


def softmax_rows(*shape, seed=0):
    scores = np.exp(2 * np.random.default_rng(seed).normal(size=shape))
    return scores / scores.sum(-1, keepdims=True)


def names(count, word="t"):
    return [f"{word}{i}" for i in range(count)]


def one_of_each():
    generator = np.random.default_rng(1)
    return {
        "attention_heads": widgets.attention_heads(softmax_rows(3, 7, 7), names(7)),
        "layers": widgets.attention_heads(softmax_rows(2, 32, 7, 7), names(7)),
        "attention_pattern": widgets.attention_pattern(softmax_rows(5, 11), names(5), names(11)),
        "evolution": widgets.evolution(softmax_rows(2, 3, 7, 7), [0, 500], names(7)),
        "layer_similarity": widgets.layer_similarity(np.corrcoef(generator.normal(size=(5, 9)))),
        "state_map": widgets.state_map(generator.normal(size=(3, 11, 5)), names(11)),
        "tokens": widgets.tokens(names(13), generator.normal(size=(2, 13))),
        "delta_strip": widgets.delta_strip(generator.random(13), names(13)),
        "kernel_profile": widgets.kernel_profile([0.1, 0.7, 0.3], [-1, 1, 0], null=(0.0, 0.2)),
    }


@pytest.mark.parametrize("kind", one_of_each())
def test_draws_in_two_seconds_and_survives_resizing(page, kind, tmp_path):
    path = one_of_each()[kind].save_html(tmp_path / "w.html")
    assert 0 < page.open(path) <= 2
    widths = []
    for width in (800, 330, 800):
        page.resize(width)
        page.settle()
        page.settle()
        assert all(colours > 3 for colours in page.js(INKED))
        assert page.js("document.documentElement.scrollWidth") <= width
        widths.append(page.js("Math.max(...[...document.querySelectorAll('canvas, span')]"
                              ".map(e => e.getBoundingClientRect().right))"))  # fmt: skip
    assert widths[0] == widths[2]
    backgrounds = "[...document.querySelectorAll('sl-text span')].map(s => s.style.background)"
    if kind in ("tokens", "delta_strip", "kernel_profile"):
        assert len(set(page.js(backgrounds))) > 2
    else:
        assert page.js(INKED)


def test_eight_heads_of_256_tokens_draw_in_a_second(page, tmp_path):
    widget = widgets.attention_heads(softmax_rows(8, 256, 256), names(256))
    path = widget.save_html(tmp_path / "w.html")
    assert 0 < page.open(path) <= 1


def test_hostile_strings_stay_text(page, tmp_path):
    count = len(HOSTILE)
    pattern = softmax_rows(2, count, count)
    heads = widgets.attention_heads(pattern, HOSTILE, labels=HOSTILE[:2], title=HOSTILE[1])
    page.open(heads.save_html(tmp_path / "w.html"))
    texts = "[...document.querySelectorAll('sl-text span')].map(s => s.textContent)"
    assert page.js(texts) == [visible(token) for token in HOSTILE]
    for i in range(0, count, 5):
        page.hover(i, i)
        assert page.say().startswith(f"query '{visible(HOSTILE[i])}' ({i}) → key")
    assert page.js("document.querySelector('b').textContent") == HOSTILE[1]
    assert page.js("window.hacked") is None
    assert page.js("document.querySelectorAll('img, iframe, base, svg').length") == 0
    assert page.js("document.querySelectorAll('script').length") == 1


def test_rectangular_map_has_its_own_tokens_on_each_axis(page, tmp_path):
    queries, keys = names(5, "q"), names(11, "k")
    pattern = np.zeros((5, 11))
    target = [7, 0, 10, 3, 4]
    pattern[np.arange(5), target] = 1
    page.open(widgets.attention_pattern(pattern, queries, keys).save_html(tmp_path / "w.html"))
    written = page.js("written")
    rows = {text: y for text, _, y, turned in written if not turned}
    cols = {text: x for text, x, _, turned in written if turned}
    assert sorted(rows, key=rows.get) == queries
    assert sorted(cols, key=cols.get) == keys
    left, top, width, height = page.map()
    pixels = page.pixels()
    for query, key in enumerate(target):
        page.hover(query, key)
        assert page.say() == f"query 'q{query}' ({query}) → key 'k{key}' ({key}), 1.00"
        y = round(top + (query + 0.5) * height)
        dark = [pixels[y, round(left + (k + 0.5) * width)].sum() < 300 for k in range(11)]
        assert np.flatnonzero(dark).tolist() == [key]


def test_thin_stripes_survive_in_small_maps(page, tmp_path):
    pattern = np.zeros((2, 450, 450), np.float32)
    rows = np.arange(450)
    pattern[0, rows, np.maximum(0, rows - 130)] = 1
    pattern[1, rows, 0] = 1
    page.open(widgets.attention_heads(pattern, names(450)).save_html(tmp_path / "w.html"))
    dark = """(() => {
      const c = document.querySelector("button canvas"), copy = document.createElement("canvas");
      Object.assign(copy, {width: c.width, height: c.height});
      const g = copy.getContext("2d", {willReadFrequently: true});
      g.drawImage(c, 0, 0);
      const {data} = g.getImageData(0, 0, c.width, c.height);
      return [...Array(c.height).keys()].map(y => [...Array(c.width).keys()].findIndex(
        x => data[4 * (y * c.width + x)] + data[4 * (y * c.width + x) + 1] < 60));
    })()"""
    columns = page.js(dark)
    size = len(columns)
    expected = [max(0, y * 450 / size - 130) * size / 450 for y in range(size)]
    np.testing.assert_allclose(columns, expected, atol=1.5)


def test_hover_says_query_key_lag_and_weight(page, tmp_path):
    tokens = ["th", "e", " cat", " sat", "."] * 3
    pattern = np.full((2, 15, 15), 0.17 / 14)
    pattern[:, np.arange(15), np.maximum(0, np.arange(15) - 7)] = 0.83
    pattern[1] = 1 / 15
    path = widgets.attention_heads(pattern, tokens).save_html(tmp_path / "w.html")
    page.open(path)
    page.hover(13, 6)
    assert page.say() == "query ' sat' (13) → key 'e' (6), lag 7, 0.83"
    page.hover(2, 5)
    assert page.say() == "query ' cat' (2) → key 'th' (5), lag −3, 0.01"
    strip = "document.querySelectorAll('sl-text span')[12].getBoundingClientRect().toJSON()"
    box = page.js(strip)
    page.mouse(box["x"] + 5, box["y"] + 5)
    assert page.say() == "query ' cat' (12)"
    depth = "[...document.querySelectorAll('sl-text span')].map(s => s.style.backgroundColor)"
    weights = [sum(map(int, c[4:-1].split(","))) for c in page.js(depth)]
    assert np.argmin(weights) == 5


def test_two_heads_are_locked_and_compared_by_mouse_or_keyboard(page, tmp_path):
    page.open(one_of_each()["attention_heads"].save_html(tmp_path / "w.html"))
    shown = "[...document.querySelectorAll('sl-row div')].filter(d => !d.hidden)"
    shown += ".map(d => d.firstChild.textContent)"
    assert page.js(shown) == ["head 0"]
    page.js("document.querySelectorAll('button')[2].focus()")
    assert page.js(shown) == ["head 2"]
    page.key("Enter")
    page.js("document.querySelectorAll('button')[1].click()")
    assert page.js(shown) == ["head 2", "head 1"]
    pressed = "[...document.querySelectorAll('button')].map(b => b.ariaPressed)"
    assert page.js(pressed) == ["false", "true", "true"]
    page.js("document.querySelector('sl-row canvas').focus()")
    page.hover(3, 2)
    page.key("ArrowLeft")
    page.key("ArrowDown")
    assert page.say().startswith("query 't4' (4) → key 't1' (1), lag 3, 0.")
    assert page.say().count(" | ") == 1
    page.key("Escape")
    assert len(page.js(shown)) == 1


def test_slider_changes_layer(page, tmp_path):
    pattern = np.stack([np.eye(7)[None].repeat(2, 0), np.roll(np.eye(7), 2, 1)[None].repeat(2, 0)])
    page.open(widgets.attention_heads(pattern, names(7)).save_html(tmp_path / "w.html"))
    page.hover(1, 1)
    assert page.say().endswith("lag 0, 1.00")
    slide = "const s = document.querySelector('input'); s.value = 1;"
    page.js(slide + "s.dispatchEvent(new Event('input'))")
    assert page.say().endswith("lag 0, 0.00")
    assert page.js("document.querySelector('output').textContent") == "layer 1"
    assert page.js("document.querySelector('button small').textContent").startswith("lag −2: ")


def test_theme_follows_the_system_and_the_page(page, tmp_path):
    page.open(one_of_each()["attention_heads"].save_html(tmp_path / "w.html"))
    strip = "getComputedStyle(document.querySelector('i')).backgroundImage"
    page.theme("light")
    page.settle()
    light = page.js(strip)
    page.theme("dark")
    page.settle()
    dark = page.js(strip)
    assert dark != light
    page.js("document.documentElement.dataset.theme = 'light'")
    page.settle()
    assert page.js(strip) == light


def test_many_widgets_share_one_script_in_either_order(page, tmp_path):
    parts = [widget.to_html("page") for widget in one_of_each().values()] * 2
    path = tmp_path / "w.html"
    for order in ([widgets.page_bundle(), *parts], [*parts, widgets.page_bundle()]):
        path.write_text("<!doctype html><body>" + "\n".join(order), "utf-8")
        assert 0 < page.open(path) <= 4
        assert page.js("document.querySelectorAll('.smearlens sl-say').length") == len(parts)
        assert all(colours > 3 for colours in page.js(INKED))


def test_instant_navigation_draws_what_arrives_later(page, tmp_path):
    path = tmp_path / "w.html"
    hook = "<script>window.document$ = {subscribe(f) { window.arrive = f; }}</script>"
    path.write_text(f"<!doctype html>{hook}{widgets.page_bundle()}<main></main>", "utf-8")
    page.open(path)
    html = json.dumps(one_of_each()["tokens"].to_html("page"))
    page.js(f"document.querySelector('main').innerHTML = {html}; arrive()")
    page.drawn()
    assert page.js("document.querySelectorAll('sl-text span').length") == 13


def test_picture_stands_where_scripts_are_off(page, tmp_path):
    path = one_of_each()["attention_heads"].save_html(tmp_path / "w.html")
    page.do("Emulation.setScriptExecutionDisabled", value=True)
    page.do("Page.navigate", url=path.as_uri())
    page.wait("Page.loadEventFired")
    assert len(np.unique(page.pixels().reshape(-1, 3), axis=0)) > 10


def test_circuitsvis_shares_one_bundle_and_keeps_tokens_as_text(browser, tmp_path):
    page = Tab(browser)
    tokens = [token for token in HOSTILE if token and token != "\ud800"]
    pattern = softmax_rows(2, len(tokens), len(tokens))
    parts = [
        circuitsvis_adapter.component("AttentionHeads", attention=pattern, tokens=tokens),
        circuitsvis_adapter.component("ColoredTokens", tokens=tokens, values=pattern[0, 0]),
    ]
    html = "\n".join(part.to_html("page") for part in parts)
    path = tmp_path / "w.html"
    bundle = circuitsvis_adapter.embed_bundle().html
    path.write_text(f'<!doctype html><meta charset="utf-8">{html}{bundle}', "utf-8")
    page.open(path)
    page.js("new Promise(f => setTimeout(f, 500))")
    assert page.js("[...document.querySelectorAll('[id^=sl-]')].every(d => d.children.length)")
    assert page.js("window.hacked") is None
    assert page.js("document.querySelectorAll('img, iframe, base').length") == 0
    assert not [problem for problem in page.problems() if isinstance(problem, str)]
