"""The check of the built site sees what is broken, and finds nothing in a page that is not."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from smearlens.viz import circuitsvis_adapter, widgets
from smearlens.viz.page import frame

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from sitegen import crawl, results  # noqa: E402
from sitegen.browser import CANDIDATES, Browser, find_browser  # noqa: E402

pytestmark = pytest.mark.skipif(not find_browser(), reason=f"no browser: {CANDIDATES}")

HOME = "<a id=here href='#here'>.</a><a href='broken.html#there'>.</a><a href='sub/'>.</a>"
BROKEN = """<p id=there style='width:1300px'>wide</p><canvas></canvas><img src='gone.png'>
<a href='index.html#nowhere'>.</a><a href='gone.html'>.</a><a href='https://example.org/x'>.</a>
<img src='http://localhost:1/'><div class=smearlens></div><script>undefined.x</script>"""


@pytest.fixture(scope="module")
def browser():
    with Browser(find_browser()) as browser:
        yield browser


def test_every_defect_is_found_where_it_is(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(crawl, "DRAWN_WITHIN", 0.1)
    site = tmp_path / "site"
    (site / "sub").mkdir(parents=True)
    (site / "index.html").write_text(frame("home", [HOME]))
    (site / "sub" / "index.html").write_text(frame("below", ["<a href='../'>up</a>"]))
    (site / "broken.html").write_text(frame("broken", [BROKEN]))
    visits = {visit.path: visit for visit in crawl.crawl(site, browser, tmp_path / "shots")}
    assert visits["index.html"].problems == visits["sub/index.html"].problems == []
    found = "\n".join(visits["broken.html"].problems)
    for scheme in crawl.SCHEMES:
        for problem in (
            "1 canvases are blank", "gone.png is broken", "1 of 1 widgets are not drawn",
            "asks the network for http://localhost:1/", "console: TypeError", "404",
            "at 1100 px the page scrolls sideways", "at 390 px the page scrolls sideways",
        ):  # fmt: skip
            assert any(p.startswith(scheme) and problem in p for p in found.splitlines()), problem
    assert "dead link to index.html#nowhere" in found
    assert "dead link to gone.html" in found
    assert crawl.external_links(list(visits.values())) == {"https://example.org/x"}
    assert len(list((tmp_path / "shots").glob("*.jpg"))) == 9


def test_reports_of_committed_results_and_both_kinds_of_widgets_pass(browser, tmp_path):
    names = []
    for source in results.result_files():
        target = tmp_path / source.parent.name / "report.html"
        target.parent.mkdir()
        results.write_report_of(source, target)
        assert target.stat().st_size < 3_000_000
        names += [
            f"claim {v['claim']['number']}" for v in json.loads(source.read_text())["verdicts"]
        ]
        assert all(name in target.read_text() for name in names[-1:])
    pattern = np.eye(5)[None]
    ours = widgets.attention_heads(pattern, list("abcde")).to_html("page")
    theirs = circuitsvis_adapter.component(
        "AttentionHeads", attention=pattern, tokens=list("abcde")
    )
    both = [
        ours,
        theirs.to_html("page"),
        widgets.page_bundle(),
        circuitsvis_adapter.embed_bundle().html,
    ]
    (tmp_path / "both.html").write_text(frame("both", both))
    visits = {visit.path: visit for visit in crawl.crawl(tmp_path, browser, tmp_path / "shots")}
    assert {path: visit.problems for path, visit in visits.items()} == {path: [] for path in visits}
    assert visits["both.html"].widgets == 2
    assert visits["compare/report.html"].widgets == 2
