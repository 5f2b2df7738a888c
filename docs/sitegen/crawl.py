"""Look at every page of a folder in a browser, from a local server: what is broken, what is linked.

Leaves out which folders those are and what is said about them (`docs/check_site.py`).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

from sitegen.browser import INKED, Browser, Page

SCHEMES = ("light", "dark")
WIDTH, NARROW = 1100, 390  # CSS pixels: a small laptop, a phone
DRAWN_WITHIN = 2.0  # seconds of processor time, for all widgets of a page
TALLEST = 12_000  # CSS pixels of a screenshot

LINKS = "[...document.querySelectorAll('a[href], area[href]')].map(a => a.href)"
ANCHORS = "[...document.querySelectorAll('[id], a[name]')].flatMap(e => [e.id, e.name || ''])"
WIDGETS = """({
  ours: [...document.querySelectorAll('.smearlens')].map(
    w => !!w.querySelector('sl-say')?.textContent),
  theirs: [...document.querySelectorAll('[id^=sl-]')].map(w => w.children.length > 0),
})"""
BROKEN = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
ARRIVED = """new Promise((done, fail) => (function wait(tries) {
  if (location.href == "%s") setTimeout(done, 300);
  else if (tries) setTimeout(wait, 20, tries - 1);
  else fail("did not arrive");
})(500))"""
SIZE = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"


@dataclass
class Visit:
    """What a page showed.

    Attributes:
        path: below the folder
        widgets: how many it has
        seconds: of processor time until all of them were drawn
        problems: what is wrong with it
        links: absolute addresses it points to
        anchors: places in it that can be pointed to
    """

    path: str
    widgets: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    links: set[str] = field(default_factory=set)
    anchors: set[str] = field(default_factory=set)


class _Handler(SimpleHTTPRequestHandler):
    """Serves a site as if it had been built for this address."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """The file; the site's map with the addresses that the pages have here."""
        if self.path == "/favicon.ico":  # asked for by the browser, not by the page
            self.send_response(204)
            return self.end_headers()
        if self.path != "/sitemap.xml":
            return super().do_GET()
        text = Path(self.translate_path(self.path)).read_text("utf-8")
        home = min(re.findall("<loc>(.*?)</loc>", text), key=len)
        content = text.replace(f"<loc>{home}", f"<loc>http://{self.headers['Host']}/").encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address, ending in a slash, under which `folder` is served meanwhile."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def crawl(folder: Path, browser: Browser, shots: Path) -> list[Visit]:
    """Visit every page of `folder` in both schemes; screenshots go into `shots`."""
    shots.mkdir(parents=True, exist_ok=True)
    visits = []
    with served(folder) as start:
        for file in sorted(folder.rglob("*.html")):
            path = file.relative_to(folder).as_posix()
            visits.append(_visit(browser, start, path, shots))
        _judge_links(visits, start, folder)
    return visits


def walk(folder: Path, browser: Browser, paths: Sequence[str]) -> list[str]:
    """Click from the first page to each of `paths` and back to the first of them; what went wrong.

    With the theme's instant navigation the scripts run once and the widgets arrive later.
    """
    found = []
    with served(folder) as start:
        page = Page(browser, WIDTH)
        page.open(start)
        page.js("window.sameDocument = true")
        for path in [*paths, *paths[:1]]:
            click = f"[...document.querySelectorAll('a')].find(a => a.href == '{start + path}')"
            if not page.js(f"!!{click} && ({click}.click(), true)"):
                found.append(f"walk: no link to {path} on {page.js('location.pathname')}")
                continue
            page.js(ARRIVED % (start + path))
            page.drawn(10 * DRAWN_WITHIN)
            found += [f"walk to {path}: {p}" for p in _undrawn(page, Visit(path))]
        if not page.js("window.sameDocument"):
            found.append("walk: navigation is not instant")
        found += [f"walk: {problem}" for problem in _noise(page, start)]
        page.close()
    return found


def external_links(visits: list[Visit]) -> set[str]:
    """Addresses outside the folder, which nobody follows here."""
    links = set().union(*(visit.links for visit in visits))
    return {link for link in links if not link.startswith("http://127.0.0.1")}


def _visit(browser: Browser, start: str, path: str, shots: Path) -> Visit:
    """One page in every scheme and width, each in a tab of its own."""
    visit = Visit(path)
    url = start + path.removesuffix("index.html")
    for scheme in SCHEMES:
        page = Page(browser, WIDTH)
        page.theme(scheme)
        visit.seconds = max(visit.seconds, page.open(url, limit=10 * DRAWN_WITHIN))
        visit.links |= set(page.js(LINKS))
        visit.anchors |= set(page.js(ANCHORS))
        found = [*_undrawn(page, visit), *_sideways(page, WIDTH)]
        name = path.removesuffix(".html").removesuffix("/index").replace("/", "-")
        _shoot(page, shots / f"{name}-{scheme}.jpg")
        page.resize(NARROW)
        page.settle()
        found += [*_sideways(page, NARROW), *_noise(page, start)]
        if scheme == SCHEMES[0]:
            _shoot(page, shots / f"{name}-narrow.jpg")
        visit.problems += [f"{scheme}: {problem}" for problem in found]
        page.close()
    return visit


def _undrawn(page: Page, visit: Visit) -> list[str]:
    """Widgets that are late, missing or blank; pictures that are not there."""
    widgets = page.js(WIDGETS)
    drawn = [*widgets["ours"], *widgets["theirs"]]
    visit.widgets = len(drawn)
    found = [f"picture {source} is broken" for source in page.js(BROKEN)]
    if not all(drawn):
        found.append(f"{drawn.count(False)} of {len(drawn)} widgets are not drawn")
    if drawn and visit.seconds > DRAWN_WITHIN:
        found.append(f"drawing took {visit.seconds:.1f} s of processor time")
    blank = sum(colours < 2 for colours in page.js(INKED))
    return found + ([f"{blank} canvases are blank"] if blank else [])


def _sideways(page: Page, width: int) -> list[str]:
    wide = page.js(SIZE)[0]
    return [f"at {width} px the page scrolls sideways, to {wide} px"] if wide > width else []


def _noise(page: Page, start: str) -> list[str]:
    """Requests that leave the server, and what the console says."""
    found = [f"asks the network for {url}" for url in page.requests() if not url.startswith(start)]
    for message in page.messages():
        entry = message.get("entry", message)
        level = entry.get("level") or entry.get("type") or "exception"
        if level in ("error", "assert", "exception"):
            found.append(f"console: {_said(entry)}")
    return found


def _said(entry: dict) -> str:
    if "text" in entry:
        return f"{entry['text']} {entry.get('url', '')}".strip()
    if "args" in entry:
        return " ".join(str(a.get("value", a.get("description"))) for a in entry["args"])
    details = entry["exceptionDetails"]
    return details.get("exception", {}).get("description", details["text"])


def _shoot(page: Page, path: Path) -> None:
    """The whole page, not only what fits into the window."""
    width, height = page.js(SIZE)
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, TALLEST), "scale": 1}
    path.write_bytes(page.shot(format="jpeg", quality=80, clip=clip, captureBeyondViewport=True))


def _judge_links(visits: list[Visit], start: str, folder: Path) -> None:
    """Adds to each visit the links within the folder that lead nowhere."""
    anchors = {visit.path: visit.anchors for visit in visits}
    for visit in visits:
        for link in sorted(visit.links):
            if not link.startswith(start):
                continue
            address, anchor = urldefrag(link)
            target = unquote(address.removeprefix(start).partition("?")[0])
            target += "index.html" if target.endswith("/") or not target else ""
            if not (folder / target).is_file():
                visit.problems.append(f"dead link to {target}")
            elif anchor and target in anchors and unquote(anchor) not in anchors[target]:
                visit.problems.append(f"dead link to {target}#{anchor}")
