"""The whole study end to end, tiny: tasks, resuming, the page, and running without WikiText-2."""

import json
import re
from dataclasses import replace

import pytest
import torch

from smearlens.cli import main
from smearlens.data.corpora import CorpusError
from smearlens.experiments.smeared_keys import study as smeared_keys_study
from smearlens.experiments.smeared_keys import text_measures
from smearlens.experiments.smeared_keys.grid import SmearedKeysConfig, cells
from smearlens.experiments.smeared_keys.study import run, tasks
from smearlens.experiments.study import as_json
from smearlens.models.families import family
from smearlens.nn.attention import Attention

LINES = [
    " = A title = \n",
    " \n",
    *(f" Line {i} of a text that repeats itself . \n" for i in range(40)),
]
TINY = SmearedKeysConfig(
    seeds=1, text_seeds=1, kernels=(3, 5), steps=2, stack_steps=2, text_steps=2, norm_steps=4,
    wikitext_steps=2, floor_steps=1, d_model=16, wikitext_d_model=16,
)  # fmt: skip
CLAIMS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]


class Bytes:
    """A tokenizer of 258 ids in the place of GPT-2's, so that a test takes seconds."""

    d_vocab, end_of_text = 258, 257

    def encode(self, text):
        return torch.tensor(list(text.encode()), dtype=torch.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wikitext")
    for name in ("wiki.train.raw", "wiki.valid.raw"):
        (folder / name).write_text("".join(LINES) + " cut o")
    return folder


def few(config, *, wikitext):
    """The cells that verdicts and page need, of every task."""
    repeats = {
        "attention only", "attention only, bare", "two layers", "two layers, bare", "conv k=3",
        "conv k=3, bare", "conv k=3, same padding", "conv k=5", "conv k=5, bare",
        "conv k=5, same padding", "conv k=5, same padding, bare", "conv k=5 on K",
    }  # fmt: skip
    grid = [cell for cell in cells(config, wikitext=wikitext) if "lr 0.01" not in cell.name]
    return [cell for cell in grid if cell.task != "repeats" or cell.name in repeats]


@pytest.fixture(scope="module")
def study(tmp_path_factory, folder):
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smeared_keys_study, "cells", few)
        for module in ("study", "grid", "text_measures"):
            patch.setattr(f"smearlens.experiments.smeared_keys.{module}.gpt2_tokenizer", Bytes)
        found = run(replace(TINY, data=str(folder)), out, command="smearlens experiment --tiny")
        yield out, found


def test_every_cell_is_there_and_every_claim_is_judged(study):
    out, found = study
    assert len(found["measures"]) == len(few(TINY, wikitext=True))
    assert [v["claim"]["number"] for v in found["verdicts"]] == CLAIMS
    assert {v["because"] for v in found["verdicts"]} == {"One seed proves nothing."}
    timed = {"cpu_seconds": 0}  # another test runs a cell again
    on_disk = json.loads((out / "result.json").read_text())
    assert on_disk | timed == json.loads(as_json(found)) | timed
    for m in found["measures"]:
        assert m["task"] != "norms" or m["gradient_norms"]["steps"] == [0]


def test_the_full_grid_is_what_the_study_promises():
    grid = cells(SmearedKeysConfig(), wikitext=True)
    repeats = {c.name for c in grid if c.task == "repeats" and c.seed == 4}
    for kernel in range(2, 8):
        for role in ("", " on Q", " on K", " on V"):
            assert {f"conv k={kernel}{role}", f"conv k={kernel}{role}, same padding"} <= repeats
    assert "conv k=1 on V" in repeats
    assert "conv k=1 on V, same padding" not in repeats
    for stack in ("attention only", "smeared keys", "two layers", "four layers", "conv k=5"):
        assert {stack, f"{stack}, bare"} <= repeats
    assert {c.seed for c in grid if c.task == "wikitext"} == {0, 1, 2}
    sizes = {c.name: family(c.model)(c.config).n_parameters for c in grid if c.task == "text"}
    for conv, stack in (("conv k=5", "four layers"), ("conv k=3", "two layers")):
        assert sizes[conv] == pytest.approx(sizes[stack], rel=0.06)
        assert sizes[f"{conv}, bare"] == pytest.approx(sizes[f"{stack}, bare"], rel=0.06)


def test_the_page_is_whole_and_asks_the_network_for_nothing(study):
    out, _ = study
    page = (out / "report.html").read_text()
    assert len(page) < 3_000_000
    assert "smearlens experiment --tiny" in page
    assert not re.search(r"(src|href)=['\"]https?:|@import|url\(\s*['\"]?http", page)
    for number in CLAIMS:
        assert f"claim {number}:" in page
    assert {p.stem for p in (out / "figures").glob("*.png")} == {
        "curves", "kernels", "norms", "sweep", "taps",
    }  # fmt: skip
    assert "measured on 24 lines, and the end on 128" in page
    assert "pads counted, no causal mask" in (out / "tables" / "stripes.md").read_text()


def test_running_again_trains_nothing(study, folder, monkeypatch):
    out, found = study
    monkeypatch.setattr("smearlens.experiments.grid.train", lambda *a, **k: pytest.fail("trained"))
    again = run(replace(TINY, data=str(folder)), out, command="smearlens experiment --tiny")
    assert again["measures"] == json.loads(json.dumps(found["measures"]))


def test_a_missing_cell_alone_is_run_again_and_gives_the_same(study, folder):
    out, _ = study
    times = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/measures.json")}
    again = out / "runs" / "repeats-conv k=5 on K-seed0" / "measures.json"
    before = again.read_text()
    again.unlink()
    run(replace(TINY, data=str(folder)), out, command="smearlens experiment --tiny")
    assert again.read_text() == before
    assert [p for p, time in times.items() if p.stat().st_mtime_ns != time] == [again]


@pytest.mark.filterwarnings("ignore:WikiText-2 is left out")
def test_another_configuration_in_the_same_folder_is_refused(study):
    out, _ = study
    with pytest.raises(ValueError, match=r"another configuration.*steps"):
        run(replace(TINY, steps=3), out)


def test_without_wikitext_the_rest_is_run_and_two_claims_stay_undecided(
    study, tmp_path, monkeypatch
):
    def away(*args, **kwargs):
        raise CorpusError("wikitext-2-raw is out of reach")

    def trained(grid, tasks, out, *, jobs):
        return [m for m in found["measures"] if m["task"] in {cell.task for cell in grid}]

    _, found = study
    monkeypatch.setattr(text_measures, "load_corpus", away)
    monkeypatch.setattr(smeared_keys_study, "run_grid", trained)
    monkeypatch.setattr(smeared_keys_study, "_thinned", lambda measures: measures)
    monkeypatch.setattr("smearlens.experiments.study.seconds_in_cells", lambda *_: 0.0)
    with pytest.warns(UserWarning, match=r"WikiText-2 is left out.*out of reach"):
        rest = run(TINY, tmp_path)
    assert {m["task"] for m in rest["measures"]} == {"repeats", "text", "norms"}
    because = {v["claim"]["number"]: v["because"] for v in rest["verdicts"]}
    assert list(because) == CLAIMS
    for number, words in because.items():
        assert words.startswith("WikiText-2 was out of" if number in (2, 3) else "One seed")
    assert not (tmp_path / "tables" / "padding.md").exists()


def test_a_wrong_folder_fails_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("smearlens.experiments.grid.train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(SystemExit) as stopped:
        main(["experiment", "smeared-keys", "--out", str(tmp_path), "--data", str(tmp_path)])
    assert stopped.value.code == 1
    assert "one file wiki.train*.raw or .raw.gz, found none" in capsys.readouterr().err


def test_taking_the_mask_away_opens_every_attention_layer():
    for cell in cells(TINY, wikitext=False):
        if cell.name in ("two layers", "conv k=3 on K") and cell.task == "repeats":
            model = family(cell.model)(cell.config)
            smeared_keys_study._take_mask_away(model)
            tokens = torch.randint(64, (2, 11), generator=torch.Generator().manual_seed(0))
            _, cache = model.run_with_cache(tokens)
            layers = [m for m in model.modules() if isinstance(m, Attention)]
            assert [layer.causal for layer in layers] == [False] * len(layers)
            assert float(cache["blocks.0.attn.hook_pattern"][:, :, 0, 1:].sum()) > 0


def test_tasks_without_wikitext_need_no_text_but_the_embedded_one():
    assert sorted(tasks(TINY, wikitext=False)) == ["norms", "repeats", "text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"kernels": (1, 3)}, "kernels must hold 3 and 5"),
        ({"d_model": 20}, "d_model must be a multiple of 16, got 20"),
    ],
)
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SmearedKeysConfig(**change)
