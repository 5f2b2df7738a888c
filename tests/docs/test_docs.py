"""The sources of the documentation: complete, linked, and true to the code. Nothing is built."""

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import smearlens
from smearlens import AttnAttn, ConvAttn, Mamba
from smearlens.analysis.stats import over_seeds
from smearlens.experiments.claims import CLAIMS
from smearlens.experiments.study import STUDIES

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"
sys.path.insert(0, str(ROOT / "docs"))

from sitegen import reference, results  # noqa: E402
from sitegen.cells import Cell, parse_page, parse_percent  # noqa: E402
from sitegen.render import to_markdown  # noqa: E402

EXAMPLES = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))
SOURCES = sorted(PAGES.rglob("*.md"))
SIZES = {"batch": 2, "pos": 7, "d_model": 24, "head": 3, "d_head": 8, "tap": 5, "d_mlp": 96,
         "query": 7, "key": 7, "d_state": 11}  # fmt: skip


CONV = {"d_model": 24, "n_heads": 3, "kernel_size": 5, "n_ctx": 9}


class Loader(yaml.SafeLoader):
    """Takes `!ENV` as a list."""


Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node))


def nav_files():
    config = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)
    found, todo = [], [config["nav"]]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            found.append(item)
        else:
            todo += item.values() if isinstance(item, dict) else item
    return found


def built_pages():
    pages = {f"tutorials/{e.stem}.md" for e in EXAMPLES}
    pages |= {f"api/{name}.md" for name in reference.api_pages()}
    return pages | {p.relative_to(PAGES).as_posix() for p in SOURCES}


def prose(page):
    """Text of a built page's source without its code."""
    if page.startswith("tutorials/"):
        cells = parse_percent((ROOT / "examples" / f"{Path(page).stem}.py").read_text("utf-8"))
    else:
        cells = parse_page((PAGES / page).read_text("utf-8"))
    return "\n".join(cell.source for cell in cells if cell.kind == "markdown")


def test_every_page_is_in_the_navigation_and_exists():
    assert len(nav_files()) == len(set(nav_files()))
    assert set(nav_files()) == built_pages()


def test_the_api_pages_hold_the_public_names():
    text = "\n".join(reference.api_pages().values())
    directives = re.findall(r"^::: (smearlens\.\S+)\.(\w+)$(?!\n    options)", text, re.MULTILINE)
    assert sorted(name for _, name in directives) == sorted(smearlens.__all__)
    for module, name in directives:
        assert name in reference.public_names(module.removeprefix("smearlens."))


def test_the_api_pages_tell_every_field_and_preset():
    pages = "\n".join(reference.api_pages().values())
    for name in smearlens.__all__:
        thing = getattr(smearlens, name)
        section = pages.split(f".{name}\n")[1].partition("\n::: ")[0]
        for preset in getattr(thing, "presets", {}):
            assert f"| `{preset}` |" in section, (name, preset)
        if name.endswith("Config"):
            rows = [
                row.strip("| ").split(" | ") for row in section.splitlines() if row[:3] == "| `"
            ]
            told = {cells[0].strip("`"): cells for cells in rows}
            assert list(told) == [field.name for field in dataclasses.fields(thing)]
            for field in dataclasses.fields(thing):
                _, takes, default, meaning = told[field.name]
                assert takes, (name, field.name)
                assert meaning, (name, field.name)
                required = field.default is dataclasses.MISSING
                assert (
                    default == "required" if required else eval(default.strip("`")) == field.default
                )


def test_the_results_on_the_api_pages_exist():
    for homes in reference.RESULTS_OF.values():
        for home in homes:
            module, _, name = home.rpartition(".")
            assert inspect.isclass(getattr(importlib.import_module(f"smearlens.{module}"), name))


def test_modules_below_the_public_names_exist():
    for modules in reference.MODULES.values():
        assert all(reference.public_names(module) for module in modules)


def test_a_source_archive_holds_what_tests_and_pages_read():
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]
    sdist = settings["build"]["targets"]["sdist"]
    assert all(pattern.startswith("/") for pattern in sdist["include"] + sdist["exclude"])
    assert not [name for name in sdist["include"] if not (ROOT / name[1:]).exists()]
    read = {"src", "tests", "examples", "docs", "benchmarks", "results", "mkdocs.yml", "README.md",
            "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt",
            ".ci"}  # fmt: skip
    assert {name[1:] for name in sdist["include"]} == read
    assert sdist["exclude"] == ["/docs/built"]


def test_the_version_of_torch_is_the_one_that_was_tested():
    tested = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    for text in ((ROOT / "README.md").read_text("utf-8"), prose("index.md")):
        assert f"install `{tested[0]}`" in " ".join(text.split())


def test_a_release_has_one_date_everywhere():
    released = "date-released" in (ROOT / "CITATION.cff").read_text("utf-8")
    version = (ROOT / "CHANGELOG.md").read_text("utf-8").split("\n## ")[1].partition("\n")[0]
    assert released != version.endswith("(unreleased)")


def test_the_start_page_names_every_tutorial():
    start = prose("index.md")
    assert [e.stem for e in EXAMPLES if f"](tutorials/{e.stem}.md)" not in start] == []


def test_the_answers_to_questions_are_functions_that_exist():
    table = prose("metrics/index.md").split("## From a question")[1].split("\n## ")[0]
    links = re.findall(r"\[((?:`[^`]*`(?:, )?)+)\]\(([^)#]*)#?([^)]*)\)", table)
    known = {*smearlens.__all__, *reference.public_names("analysis.states")}
    for names, page, anchor in links:
        for name in re.findall(r"`(\w+)", names):
            assert name in known, name
            if page.startswith("../api/"):
                assert name in reference.api_names()[Path(page).stem]
            elif not anchor and "tutorials" not in page:
                assert name in re.findall(r"\w+", "".join(re.findall(
                    r"^## .*$", prose(f"metrics/{page}"), re.MULTILINE)))  # fmt: skip
    assert len(links) > 20


def test_links_between_pages_resolve():
    pages = built_pages()
    for page in pages:
        if page.startswith("api/"):
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            assert not target.startswith(("http:", "//")), (page, target)
            if target.startswith("https:"):
                continue
            path, _, anchor = target.partition("#")
            parts = []
            for part in [*Path(page).parent.parts, *Path(path).parts] if path else [page]:
                parts = parts[:-1] if part == ".." else [*parts, part]
            there = "/".join(parts)
            assert there in pages, (page, target)
            if anchor:
                titles = re.findall(r"^#+ (.*)$", prose(there), re.MULTILINE)
                assert anchor in {t.lower().replace(" ", "-") for t in titles}, (page, target)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_parse_and_name_their_kernel(path):
    text = path.read_text("utf-8")
    assert re.match(r"# ---\n# jupyter:\n#   kernelspec:\n#     name: python3\n", text)
    cells = parse_percent(text)
    assert cells[0].kind == "markdown"
    assert cells[0].source.startswith("# ")
    code = [cell.source for cell in cells if cell.kind == "run"]
    assert len(code) >= 5
    for source in code:
        compile(source, str(path), "exec")


def reading_cells(path):
    """The cells of an example that read committed results."""
    cells = [c.source for c in parse_percent(path.read_text("utf-8")) if c.kind == "run"]
    return [source for source in cells if "read_text" in source]


READERS = [path for path in EXAMPLES if reading_cells(path)]


@pytest.mark.parametrize("where", [".", ROOT], ids=["an empty folder", "the repository"])
@pytest.mark.parametrize("path", READERS, ids=lambda p: p.stem)
def test_examples_run_where_no_results_are(path, where, tmp_path, monkeypatch, capsys):
    """A tutorial that was downloaded has no `results` beside it."""
    monkeypatch.chdir(tmp_path / where)
    plt = pytest.importorskip("matplotlib.pyplot")
    scope = {"json": json, "Path": Path, "plt": plt, "over_seeds": over_seeds}
    for source in reading_cells(path):
        exec(source, scope)
        told = capsys.readouterr().out
        assert ("none here: run the command above" in told) == (where == ".")
    plt.close("all")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PAGES).as_posix())
def test_code_on_pages_compiles(path):
    cells = parse_page(path.read_text("utf-8"))
    for cell in cells:
        if cell.kind == "markdown":
            assert "```python" not in cell.source  # shown, but never run
        else:
            compile(cell.source, str(path), "exec")


@pytest.mark.parametrize(
    "build",
    [
        lambda: ConvAttn.from_preset("cpu", residual=True, norm=True, mlp=True, **CONV),
        lambda: ConvAttn.from_preset("cpu", conv_on="k", **CONV),
        lambda: ConvAttn.from_preset("cpu", conv_on=None, smear=True, **CONV),
        lambda: AttnAttn.from_preset("cpu", d_model=24, n_heads=3, n_ctx=9, mlp=True),
        lambda: Mamba.from_preset("cpu", d_model=24, d_state=11, kernel_size=5, n_ctx=9),
    ],
    ids=["ConvAttn", "ConvAttn, K", "ConvAttn, smeared", "AttnAttn", "Mamba"],
)
def test_the_hook_table_is_that_of_the_model(build):
    """Names, and every shape against the activation itself."""
    model = build()
    rows = reference.hook_rows(model)
    assert [name for name, _, _ in rows] == list(model.hook_dict)
    _, cache = model.run_with_cache(torch.zeros(2, 7, dtype=torch.long))
    for name, shape, meaning in rows:
        words = shape.strip("[]").split()
        assert len(words) == cache[name].ndim, name
        for word, size in zip(words, cache[name].shape, strict=True):
            if word == "channel":  # the width of whatever the layer works on
                assert size in (24, 48), name
            elif "pos_embed" in name and word == "batch":
                assert size in (1, 2), name
            else:
                assert size == SIZES[word], (name, word)
        assert len(meaning) > 8, name


def test_the_shapes_of_the_endings_are_those_of_the_models():
    table = prose("hooks.md").split("## A model of your own")[1].split("What runs")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    told = {}
    for _, _, shapes, _ in rows:
        for names, shape in re.findall(r"([\w ,]*)(`\[[^`]*\]`)", shapes):
            for name in re.findall(r"\w+", names.replace(" and ", " ")):
                told[f"hook_{name}"] = shape.strip("`")
    told |= {"hook_weight": "[head]", "hook_resid_post": "[batch pos d_model]"}
    models = (ConvAttn.from_preset("cpu", smear=True), Mamba.from_preset("cpu"))
    known = {
        name.split(".")[-1]: shape for m in models for name, shape, _ in reference.hook_rows(m)
    }
    assert told == {name: known[name] for name in told}
    assert len(told) == 18
    endings = {name for row in rows for name in re.findall(r"hook_\w+", row[1])}
    assert endings == set(told)


def test_every_error_class_has_its_entry():
    titles = re.findall(r"^## (\w+)$", prose("errors.md"), re.MULTILINE)
    assert sorted(titles) == sorted(reference.error_classes())
    for entry in prose("errors.md").split("\n## ")[1:]:
        if entry.split()[0] in titles:
            assert "**Symptom**" in entry
            assert "**Cause**" in entry
            assert "**Fix**" in entry


def test_every_metric_has_range_chance_pitfall_and_source():
    for page in SOURCES:
        if page.parent.name != "metrics" or page.stem == "index":
            continue
        entries = parse_page(page.read_text("utf-8"))
        text = "\n".join(c.source if c.kind == "markdown" else "@code" for c in entries)
        for entry in text.split("\n## ")[1:]:
            for word in ("**Range**", "**Chance**", "**Pitfall", "**Source**", "@code"):
                assert word in entry, (page.name, entry.splitlines()[0], word)


def test_every_metric_and_picture_of_the_package_is_explained():
    metrics = "".join(p.read_text("utf-8") for p in PAGES.glob("metrics/*.md"))
    analysis = [n for n, home in reference.homes().items() if ".analysis." in home]
    missing = {n for n in analysis if n not in metrics} - {"Mixing", "mixings"}
    assert not missing
    gallery = (PAGES / "gallery.md").read_text("utf-8")
    shown = [*reference.public_names("viz.widgets"), *reference.public_names("viz.plots")]
    assert not {n for n in shown if n not in gallery} - {"Widget", "page_bundle"}


def test_the_readme_and_the_pages_list_every_study():
    readme = (ROOT / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| `([a-z-]+)` \|", readme.split("## Studies")[1], re.MULTILINE)
    assert listed == list(STUDIES)
    assert [study.name for study in results.studies()] == ["compare", *STUDIES]
    assert all(study.question for study in results.studies())


def test_claims_judged_without_results_are_read_off_the_rules(monkeypatch):
    committed = {study.name: set(study.claims) for study in results.studies() if study.result}
    monkeypatch.setattr(results, "results", dict)
    bare = {study.name: set(study.claims) for study in results.studies()}
    assert bare["compare"] == committed["compare"] == {1, 6, 8, 9, 10}
    assert "No committed verdict. Judged by `smearlens compare`" in results.claims_in_full()


def test_every_claim_and_verdict_is_on_the_page():
    page = results.claims_in_full()
    for claim in CLAIMS:
        section = page.split(f"## Claim {claim.number}\n")[1].split("\n## ")[0]
        assert claim.statement in section
        for study, verdict in results.verdicts().get(claim.number, []):
            assert f'<b class="verdict {verdict["outcome"]}">' in section
            assert verdict["because"] in section
            assert f"reports/{study.name}/report.html" in section
        if claim.number not in results.verdicts():
            assert "No committed verdict" in section
    rows = results.claims_overview().splitlines()
    assert {row.count("|") for row in rows} == {4}


def test_no_page_names_a_folder_of_one_machine_or_a_code_for_a_write_up(tmp_path):
    for study in results.studies():
        if study.result:
            assert not re.search(r"--data (?!FOLDER)", study.result["command"])
            assert study.result["config"].get("data") in (None, "FOLDER")
    page = results.claims_in_full()
    assert "--data FOLDER" in page
    assert not re.search(r"--data (?!FOLDER)|\*Source\*: S\d", page)
    source = tmp_path / "a-study" / "result.json"
    source.parent.mkdir()
    command = "smearlens experiment a --data ../x/y --out z"
    found = {"study": "a", "command": command, "verdicts": [], "config": {"data": "../x/y"},
             "versions": {}, "cpu_seconds": 1.0}  # fmt: skip
    source.write_text(json.dumps(found))
    results.write_report_of(source, tmp_path / "report.html")
    report = (tmp_path / "report.html").read_text("utf-8")
    assert "--data FOLDER --out z" in report
    assert "../x/y" not in report


def test_the_model_of_the_readme_draws_its_induction_head(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text("utf-8")
    code = re.search(r"## A picture of your own model.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code.replace("range(200)", "range(100)"), scope)
    page = (tmp_path / "heads.html").read_text("utf-8")
    assert 'class="smearlens"' in page
    cache = {"blocks.0.attn.hook_pattern": scope["pattern"]}
    assert float(smearlens.induction_score(cache, scope["tokens"])["blocks.0.attn"].mean()) > 0.8


@pytest.mark.parametrize("home", ["", "me/mine/blob/gh-pages"])
def test_a_colab_link_appears_only_where_the_site_is_said_to_be(home):
    nbformat = pytest.importorskip("nbformat")
    from build_tutorials import with_downloads

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"{i}") for i in range(3)])
    page = with_downloads("# T\n\ntext\n", book, "01_x", home)
    assert page.startswith("# T\n\n[Download as a notebook](01_x.ipynb)")
    link = "https://colab.research.google.com/github/me/mine/blob/gh-pages/tutorials/01_x.ipynb"
    assert (link in page) == bool(home)
    sources = [cell.source for cell in book.cells]
    install = ["%pip install -q git+https://github.com/me/mine"] if home else []
    assert sources == ["0", *install, "1", "2"]


def test_parsers_keep_text_and_code_apart():
    text = "# ---\n# kernelspec: x\n# ---\n# %% [markdown]\n# # A\n#\n# b\n# %%\nx = 1\n\n# y\n"
    assert parse_percent(text) == [Cell("markdown", "# A\n\nb"), Cell("run", "x = 1\n\n# y")]
    page = "a\n```python raises\n1 / 0\n```\n```python\nkept\n```\n"
    assert [c.kind for c in parse_page(page)] == ["markdown", "raises", "markdown"]
    with pytest.raises(ValueError, match="starts with a header"):
        parse_percent("# %%\n1\n")


def test_outputs_become_markdown(tmp_path):
    cells = [Cell("markdown", "# T"), Cell("run", "f()"), Cell("show", "hidden()")]
    image = {"output_type": "display_data", "data": {"image/png": b"png", "text/plain": "<F>"}}
    stream = {"output_type": "stream", "name": "stdout", "text": "out\n"}
    text = to_markdown(cells, [[], [stream], [image]], tmp_path / "page.md", tmp_path)
    assert text.startswith("# T\n\n```python\nf()\n```\n\n``` { .text .output }\nout\n```\n\n![")
    assert "hidden" not in text
    assert (tmp_path / "page-1.png").read_bytes() == b"png"


def test_a_study_is_shown_with_the_command_that_made_its_results():
    for study in results.studies():
        if study.result is not None:
            with_data = bool(study.result.get("config", {}).get("data"))
            assert ("--data FOLDER" in study.command) == with_data
            assert study.command.startswith("smearlens ")
            assert "--out" not in study.command
