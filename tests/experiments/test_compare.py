"""The main job end to end, tiny: it resumes, does not depend on the number of jobs, and reports."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from smearlens.cli import main
from smearlens.experiments.grid import run_grid
from smearlens.experiments.smeared_keys import short as smeared_keys
from smearlens.experiments.smeared_keys.short import CompareConfig, cells, compare

TINY = CompareConfig(seeds=2, steps=3, text_steps=2, d_model=16, floor_steps=1)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return compare(TINY, out, command="smearlens compare --tiny")


class Links(HTMLParser):
    """Collects everything a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "srcset") or (name == "href" and tag != "a"):
                self.found.append(value)


def test_the_page_is_whole_and_asks_the_network_for_nothing(study):
    page = study.report.read_text()
    links = Links()
    links.feed(page)
    assert links.found
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert not re.search(r"@import|url\(\s*['\"]?http", page)
    assert len(page) < 3_000_000
    for verdict in study.verdicts:
        assert f"claim {verdict.claim.number}" in page
    assert "smearlens compare --tiny" in page
    assert "Bars: mean, lines: lowest and highest seed." in page
    assert "Learning curves: mean over seeds, band from lowest to highest." in page


def test_the_folder_holds_numbers_tables_and_figures(study):
    result = json.loads((study.folder / "result.json").read_text())
    assert len(result["measures"]) == len(cells(TINY))
    assert {v["claim"]["number"] for v in result["verdicts"]} == {1, 6, 8, 9, 10}
    assert sorted(p.stem for p in (study.folder / "tables").glob("*.md")) == [
        "models", "positional", "roles", "text",
    ]  # fmt: skip
    assert len(list((study.folder / "figures").glob("*.png"))) == 4
    for measures in result["measures"]:
        assert measures["steps"] == (2 if measures["task"] == "text" else 3)


def test_every_seed_starts_from_weights_of_its_own(study):
    from smearlens.models.families import family, load_model

    for cell in cells(TINY):
        if cell.task == "fixed":
            start = load_model(study.folder / "runs" / cell.folder / "checkpoints" / "step-000000")
            torch.manual_seed(cell.seed)
            expected = family(cell.model)(cell.config).state_dict()
            found = start.state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_running_again_trains_nothing(study, monkeypatch):
    monkeypatch.setattr("smearlens.experiments.grid.train", lambda *a, **k: pytest.fail("trained"))
    before = (study.folder / "result.json").read_text()
    again = compare(TINY, study.folder, command="smearlens compare --tiny")
    assert json.loads(before)["measures"] == again.measures


def test_another_configuration_is_refused(study):
    other = CompareConfig(seeds=2, steps=4, text_steps=2, d_model=16, floor_steps=1)
    with pytest.raises(ValueError, match=r"'steps': \(3, 4\).*--force"):
        compare(other, study.folder)


def test_worker_processes_give_the_same_numbers(study, tmp_path):
    few = [cell for cell in cells(TINY) if cell.task == "fixed"]
    assert len(few) == 2
    run_grid(few, _tiny_tasks, tmp_path, jobs=2)
    for cell in few:
        parts = ("runs", cell.folder, "measures.json")
        assert study.folder.joinpath(*parts).read_bytes() == tmp_path.joinpath(*parts).read_bytes()


def _tiny_tasks():
    return smeared_keys.tasks(TINY)


def test_parameters_are_matched_where_the_report_says_so():
    from smearlens.models.families import family

    grid = cells(CompareConfig())
    sizes = {(c.task, c.name): family(c.model)(c.config).n_parameters for c in grid if c.seed == 0}
    for task, narrow in (("repeats", "two layers, narrow"), ("text", "two layers")):
        assert sizes[task, narrow] == pytest.approx(sizes[task, "conv k=3"], rel=0.05)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        CompareConfig(seeds=0)
    with pytest.raises(ValueError, match="d_model must be a multiple of 16, got 20"):
        CompareConfig(d_model=20)


def test_the_command_line_audits_analyzes_and_lists(tmp_path, capsys):
    from smearlens import ConvAttn

    ConvAttn.from_preset("cpu", causal=False).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        main(["audit", str(tmp_path)])
    assert "FAILED" in capsys.readouterr().out
    main(["analyze", str(tmp_path), "--examples", "4"])
    out = capsys.readouterr().out
    assert "induction_score" in out
    assert "untrained: rms" in out
    main(["claims"])
    assert "claim 8" in capsys.readouterr().out


def test_the_command_line_trains_and_resumes(tmp_path, capsys):
    arguments = ["train", "--out", str(tmp_path / "run"), "--steps", "3", "--batch-size", "2"]
    main(arguments)
    first = capsys.readouterr().out
    main(arguments)
    assert capsys.readouterr().out == first
    assert (tmp_path / "run" / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compare", "--setps", "3"], 2, "--steps"),
        (["audit", "/nowhere/at/all"], 1, "expected a folder with config.json"),
        (["train", "--out", "x", "--model", "ConvAtn"], 1, "known: "),
        (["train", "--out", "x", "--preset", "cpuu"], 1, "nearest: \\['cpu'"),
    ],
)
def test_wrong_usage_exits_with_its_code(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
