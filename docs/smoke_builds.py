"""Build the site with ProperDocs and with Zensical too, and compare what comes out with MkDocs'.

MkDocs is no longer maintained and its theme ends in 2027: this shows that the sources do not depend
on it. Both are installed into an environment of their own below `build`. Run `make docs` first.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "docs-smoke"
INSTALL = ["properdocs", "zensical", "mkdocs-material", "mkdocstrings[python]", "latex2mathml"]
CONFIG = ROOT / "mkdocs.smoke.yml"  # beside the other one, since its paths are relative to it
BUILDS = {
    "properdocs": ("build", "--strict", "--quiet", "--config-file", str(CONFIG)),
    "zensical": ("build", "--strict", "--clean", "--config-file", str(CONFIG)),
}
COUNTED = {  # what a page may hold -> how it looks in HTML
    "formulas": "<math",
    "documented objects": 'class="doc doc-object',
    "widgets": 'class="smearlens"',
    "figures": 'class="figure"',
}


def main() -> int:
    """Build and compare; the number of builds that failed or lost pages."""
    bin_ = environment()
    expected = contents(ROOT / "site")
    print(f"mkdocs: {summary(expected)}")
    worse = 0
    for name, arguments in BUILDS.items():
        site = BUILD / name
        CONFIG.write_text(
            f"{(ROOT / 'mkdocs.yml').read_text('utf-8')}\nsite_dir: {site}\n", "utf-8"
        )
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [bin_ / name, *arguments], cwd=ROOT, capture_output=True, text=True
            )
        finally:
            CONFIG.unlink()
        found = contents(site)
        print(f"{name}: {summary(found)} in {time.perf_counter() - start:.0f} s")
        lost, new = (sorted(a.keys() - b.keys()) for a, b in ((expected, found), (found, expected)))
        if done.returncode:
            print(f"  failed: {done.stderr[-2000:]}")
        print(f"  pages lost: {lost or 'none'}, new: {new or 'none'}")
        worse += bool(done.returncode or lost)
    return worse


def environment() -> Path:
    """The `bin` of the environment, made if it is missing."""
    bin_ = BUILD / "venv" / "bin"
    if not all((bin_ / name).exists() for name in BUILDS):
        venv.create(BUILD / "venv", with_pip=True)
        pip: Sequence[str | Path] = (bin_ / "python", "-m", "pip", "install", "--quiet")
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", *INSTALL], check=True)
    return bin_


def contents(site: Path) -> dict[str, dict[str, int]]:
    """Each page of a site, and how much of what it holds."""
    found = {}
    for file in site.rglob("*.html"):
        text = file.read_text("utf-8")
        found[file.relative_to(site).as_posix()] = {
            name: len(re.findall(re.escape(mark), text)) for name, mark in COUNTED.items()
        }
    return found


def summary(found: dict[str, dict[str, int]]) -> str:
    """The totals in a line."""
    totals = [f"{sum(page[name] for page in found.values())} {name}" for name in COUNTED]
    return ", ".join([f"{len(found)} pages", *totals])


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
