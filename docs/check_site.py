"""Look at the built site, reports of the committed results included, in a headless Chromium.

Every page, in light and dark, wide and narrow: no request leaves the local server, the console has
no error, no link or anchor within is dead, every widget is drawn in time, nothing scrolls sideways.
Screenshots go to `build/docs-check`, for somebody to look at. Build the site first.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from sitegen import crawl
from sitegen.browser import CANDIDATES, Browser, find_browser

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "site"
OUT = ROOT / "build" / "docs-check"
WITH_WIDGETS = ["gallery/", "tutorials/01_smeared_keys/", "tutorials/03_state_space/"]
LARGEST_REPORT = 3_000_000  # bytes: it should go by mail


def main() -> int:
    """Check and print; the number of problems."""
    program = find_browser()
    if program is None:
        raise SystemExit(f"a browser is needed: install one of {CANDIDATES}")
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    with Browser(program) as browser:
        visits = crawl.crawl(SITE, browser, OUT)
        if not visits:
            raise SystemExit(f"{SITE} holds no page; run `make docs` first")
        problems = crawl.walk(SITE, browser, WITH_WIDGETS)
    problems += [f"{visit.path}: {problem}" for visit in visits for problem in visit.problems]
    problems += heavy_reports()
    for link in sorted(crawl.external_links(visits)):
        print(f"not followed: {link}")
    slow = max((visit for visit in visits if visit.widgets), key=lambda visit: visit.seconds)
    print("\n".join(problems))
    print(
        f"{len(visits)} pages, {sum(v.widgets for v in visits)} widgets, {len(problems)} problems, "
        f"{time.perf_counter() - start:.0f} s; slowest: {slow.path} with {slow.widgets} widgets, "
        f"{slow.seconds:.1f} s of processor time; screenshots: {OUT.relative_to(ROOT)}"
    )
    return len(problems)


def heavy_reports() -> list[str]:
    """Reports over their limit."""
    pages = {page: page.stat().st_size for page in (SITE / "reports").glob("*/report.html")}
    return [
        f"{page.relative_to(SITE)} weighs {size:,} bytes, allowed are {LARGEST_REPORT:,}"
        for page, size in pages.items()
        if size > LARGEST_REPORT
    ]


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
