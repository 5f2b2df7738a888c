"""Build the sources of the site: run every tutorial and every page that holds code.

`examples/NN_name.py` becomes `docs/built/tutorials/NN_name.md` and `.ipynb`, `docs/pages/**.md` the
same path under `docs/built`, `results/NAME/result.json` a report under `docs/built/reports`.
Nothing that runs is written by hand: a cell that raises fails the build. What was built from the
same sources, package included, is left as it is. Then run `mkdocs build --strict`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sitegen import reference, results
from sitegen.cells import parse_page, parse_percent
from sitegen.execute import run_page, run_tutorial
from sitegen.render import to_markdown

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BUILT = DOCS / "built"
STAMPS = BUILT / ".stamps"
WORKERS = 2

DOWNLOAD = "[Download as a notebook]({0}.ipynb){{ download='{0}.ipynb' }} · as a script it is \
`examples/{0}.py`"
COLAB = " · [Open in Colab](https://colab.research.google.com/github/{0}/tutorials/{1}.ipynb)"
INSTALL = "%pip install -q git+https://github.com/{0}"


def main() -> int:
    """Build what is out of date; the number of pages built."""
    BUILT.mkdir(exist_ok=True)
    STAMPS.mkdir(exist_ok=True)
    common = _common_hash()
    sources = [*sorted((ROOT / "examples").glob("[0-9][0-9]_*.py")),
               *sorted((DOCS / "pages").rglob("*.md"))]  # fmt: skip
    sources += results.result_files()
    wanted = {source: _stamp(source, common) for source in sources}
    stale = [source for source, stamp in wanted.items() if not stamp.exists()]
    os.environ.update(OMP_NUM_THREADS="1", SMEARLENS_PROGRESS="0", HF_HUB_OFFLINE="1")
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm would like ipywidgets
    tutorials = [[source] for source in stale if source.suffix == ".py"]
    pages = [source for source in stale if source.suffix != ".py"]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        list(pool.map(build_all, [*tutorials, pages] if pages else tutorials))
    for source in stale:
        for old in STAMPS.glob(f"{_key(source)}.*"):
            old.unlink()
        wanted[source].touch()
    _write_assets()
    _remove_orphans(sources)
    return len(stale)


def build_all(sources: list[Path]) -> None:
    """Build some pages in this process."""
    sys.path.insert(0, str(DOCS))
    for source in sources:
        os.chdir(ROOT)  # a page may have gone elsewhere
        target = target_of(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        for figure in target.parent.glob(f"{target.stem}-[0-9]*.png"):
            figure.unlink()
        {".py": build_tutorial, ".md": build_page, ".json": build_report}[source.suffix](
            source, target
        )


def build_tutorial(source: Path, target: Path) -> None:
    """A percent script as a page and a notebook."""
    import nbformat

    cells = parse_percent(source.read_text("utf-8"))
    book, outputs = run_tutorial(source.name, cells, str(ROOT))
    text = to_markdown(cells, outputs, target, BUILT)
    target.write_text(with_downloads(text, book, source.stem, colab_home()), "utf-8")
    nbformat.write(book, target.with_suffix(".ipynb"))


def with_downloads(text: str, book: Any, name: str, home: str) -> str:
    """The page with the ways to its notebook; for Colab that begins with an install line."""
    import nbformat

    title, _, rest = text.partition("\n")
    ways = DOWNLOAD.format(name)
    if home:
        ways += COLAB.format(home, name)
        install = INSTALL.format("/".join(home.split("/")[:2]))
        book.cells.insert(1, nbformat.v4.new_code_cell(install, id="install"))
    return f"{title}\n\n{ways}\n{rest}"


def build_page(source: Path, target: Path) -> None:
    """A Markdown page with its code run."""
    cells = parse_page(source.read_text("utf-8"))
    target.write_text(to_markdown(cells, run_page(source.name, cells), target, BUILT), "utf-8")


def build_report(source: Path, target: Path) -> None:
    """The report of a committed result."""
    results.write_report_of(source, target)


BUILDERS = {".py": build_tutorial, ".md": build_page, ".json": build_report}


def colab_home() -> str:
    """`extra: colab` of `mkdocs.yml`: owner/repository/blob/branch of the published site, or ""."""
    from mkdocs.utils import yaml_load

    with (ROOT / "mkdocs.yml").open("rb") as file:
        return (yaml_load(file).get("extra") or {}).get("colab") or ""


def target_of(source: Path) -> Path:
    """Where a source is built to."""
    if source.suffix == ".json":
        return BUILT / "reports" / source.parent.name / "report.html"
    if source.suffix == ".py":
        return BUILT / "tutorials" / f"{source.stem}.md"
    return BUILT / source.relative_to(DOCS / "pages")


def _common_hash() -> bytes:
    """Of everything that every page depends on: the package and the builder."""
    digest = hashlib.sha256()
    builder = (
        "benchmarks",
        "cells",
        "execute",
        "mutation",
        "reliability",
        "render",
        "reference",
        "results",
    )
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.js"),
             *(DOCS / "sitegen" / f"{name}.py" for name in builder), Path(__file__),
             ROOT / "CHANGELOG.md", ROOT / "CITATION.cff"]  # fmt: skip
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.digest()


def _key(source: Path) -> str:
    return target_of(source).relative_to(BUILT).with_suffix("").as_posix().replace("/", "-")


def _stamp(source: Path, common: bytes) -> Path:
    """A file that exists if `source` was built as it is now."""
    text = source.read_bytes()
    digest = hashlib.sha256(common + text)
    if source.suffix == ".py":
        digest.update(colab_home().encode())
    if b"from sitegen import" in text:  # the page may show them
        for file in sorted(results.RESULTS.glob("*/result.json")):
            digest.update(file.read_bytes())
    return STAMPS / f"{_key(source)}.{digest.hexdigest()[:16]}"


def _write_assets() -> None:
    """Style, the scripts of the widgets, the pages of the API."""
    from smearlens.viz import embed_bundle
    from smearlens.viz.widgets import page_bundle

    assets = BUILT / "assets"
    for name, bundle in (("widgets", page_bundle()), ("circuitsvis", embed_bundle().html)):
        script = bundle.removeprefix("<script>").removesuffix("</script>")
        _write(assets / f"{name}.js", script)
    _write(assets / "extra.css", (DOCS / "sitegen" / "extra.css").read_text("utf-8"))
    for name, text in reference.api_pages().items():
        _write(BUILT / "api" / f"{name}.md", text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def _remove_orphans(sources: list[Path]) -> None:
    """Pages whose source is gone would still be in the site."""
    known = {target_of(source) for source in sources}
    known |= {BUILT / "api" / f"{name}.md" for name in reference.api_pages()}
    for page in [*BUILT.rglob("*.md"), *BUILT.rglob("report.html")]:
        if page not in known:
            page.unlink()


if __name__ == "__main__":
    if "--clean" in sys.argv[1:]:
        shutil.rmtree(BUILT, ignore_errors=True)
    start = time.perf_counter()
    count = main()
    print(f"built {count} pages in {time.perf_counter() - start:.0f} s")
