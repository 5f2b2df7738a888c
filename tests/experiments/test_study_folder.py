"""The folder of a study: what starting over deletes, and when; what `result.json` may hold."""

import json
import math
from dataclasses import asdict, dataclass

import pytest

from smearlens import cli
from smearlens.experiments.claims import Estimate
from smearlens.experiments.study import as_json, open_study, starting_over
from smearlens.viz.page import markdown, spoken, stored_estimate


@dataclass(frozen=True)
class Config:
    steps: int


def finished(out, config):
    open_study(out, config)
    (out / "runs" / "one").mkdir(parents=True)
    (out / "tables").mkdir()
    for name in ("runs/one/weights", "tables/a.md", "report.html", "split-small.json", "notes.txt"):
        (out / name).write_text("x")


def test_starting_over_deletes_what_studies_write_and_nothing_else(tmp_path):
    finished(tmp_path / "real", Config(1))
    out = tmp_path / "linked"
    out.symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match=r"another configuration.*--force"):
        open_study(out, Config(2))
    assert (out / "runs" / "one" / "weights").exists()
    with starting_over(True):
        open_study(out, Config(2))
    assert sorted(p.name for p in out.iterdir()) == ["notes.txt", "study.json"]
    with pytest.raises(ValueError, match="another configuration"):
        open_study(out, Config(1))  # the block is over


def test_starting_over_leaves_a_folder_alone_that_holds_no_study(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "report.html").write_text("mine")
    with starting_over(True):
        open_study(tmp_path, Config(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "runs", "study.json"]


@pytest.mark.parametrize("name", ["pig-latin", "mamba-pig-latin", "smeared-keys", "long-context"])
def test_data_that_is_not_there_costs_no_earlier_study(tmp_path, name, capsys):
    out = tmp_path / "out"
    finished(out, Config(1))
    before = sorted(out.rglob("*"))
    command = ["experiment", name, "--data", str(tmp_path / "nowhere"), "--out", str(out)]
    with pytest.raises(SystemExit):
        cli.main([*command, "--force"])
    assert "nowhere" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before
    fresh = tmp_path / "fresh"
    with pytest.raises(SystemExit):
        cli.main([*command[:-1], str(fresh)])
    assert not (fresh / "study.json").exists()  # the right data may follow


def test_json_knows_no_infinity():
    text = as_json({"a": [math.inf, (math.nan, 1.5)], "b": {"c": -math.inf}, "d": "x"})
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"a": [None, [None, 1.5]], "b": {"c": None}, "d": "x"}


def test_one_run_has_no_interval():
    alone = Estimate(0.25, -math.inf, math.inf, 1)
    assert spoken(alone) == "0.25, n = 1: no interval"
    assert stored_estimate(json.loads(as_json(asdict(alone)))) == alone


def test_a_cell_with_a_pipe_stays_one_cell():
    assert markdown([["|w|", "b"], ["1", "2"]]).splitlines()[0] == r"| \|w\| | b |"
