"""What the command line refuses, with which exit code, and what a given size overrides."""

import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import smearlens
from smearlens import AttnAttn
from smearlens.cli import main
from smearlens.experiments import commands
from smearlens.experiments.smeared_keys import short
from smearlens.experiments.smeared_keys.short import CompareConfig
from smearlens.models.families import FAMILIES

PAIRS = "pig-latin-seq2seq"  # ships with the package


def fails(arguments, capsys, code=1):
    """The one line on stderr of a command that ends with this code and prints nothing else."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def help_of(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ("", {}),
        ("--steps 7", {"steps": 7}),
        ("--quick", {"seeds": 2, "steps": 500, "text_steps": 100}),
        ("--quick --seeds 5 --steps 2000", {"seeds": 5, "steps": 2000, "text_steps": 100}),
    ],
)
def test_given_sizes_win_over_the_quick_ones(given, changed, tmp_path, monkeypatch, capsys):
    configs = []

    def noted(config, out, **options):
        configs.append(config)
        return short.Result(out, out / "report.html", [], [])

    monkeypatch.setattr(short, "compare", noted)
    main(["compare", "--out", str(tmp_path / "out"), *given.split()])
    assert asdict(configs[0]) == {**asdict(CompareConfig()), **changed}


def test_the_help_of_compare_says_its_sizes(capsys):
    text, sizes, quick = help_of("compare", capsys), CompareConfig(), CompareConfig().quick()
    for name in ("seeds", "steps", "text_steps"):
        said = f"default {getattr(sizes, name)}, quick {getattr(quick, name)} "
        assert said in text.split(f"--{name.replace('_', '-')} ")[1][:120]


@pytest.mark.parametrize("jobs", ["0", "-1"])
@pytest.mark.parametrize("command", [["compare"], ["experiment", "scans"]])
def test_fewer_jobs_than_one_are_refused(command, jobs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = fails([*command, "--jobs", jobs], capsys)
    assert said == f"ValueError: --jobs must be at least 1, got {jobs}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["compare"], ["experiment", "scans"], ["train"]])
@pytest.mark.parametrize("below", [".", "x/y"])
def test_a_file_cannot_be_the_folder(command, below, tmp_path, capsys):
    file = tmp_path / "a"
    file.write_text("mine")
    said = fails([*command, "--out", str(file / below)], capsys)
    assert said == f"ValueError: --out {file / below}: {file} is a file; " + said.split("; ")[1]
    assert file.read_text() == "mine"


def test_other_errors_of_the_system_name_the_file(tmp_path, capsys):
    assert fails(["claims", str(tmp_path)], capsys) == f"{tmp_path}: Is a directory\n"


@pytest.mark.parametrize("verdicts", [3, [1], [{"claim": 1}], [{"outcome": "refuted"}], "none"])
def test_a_file_that_is_no_result_is_refused(verdicts, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"verdicts": verdicts}))
    said = fails(["claims", str(path)], capsys)
    assert said.startswith(f"ValueError: {path}: its 'verdicts' are not those of a study (")
    assert said.endswith("; name the result.json of a study\n")


def test_an_audit_that_fails_has_exit_code_1(capsys):
    main(["audit", "conv-attn-repeats"])
    assert "): passed" in capsys.readouterr().out
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit, match="1"):
            main(["audit", "conv-attn-leaky-repeats", *options])
        out, err = capsys.readouterr()
        assert err == ""
    assert json.loads(out)["passed"] is False


def test_analyze_prints_its_numbers_as_json(capsys):
    arguments = ["analyze", "conv-attn-repeats", "--examples", "5"]
    main(arguments)
    text = capsys.readouterr().out
    main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert f"period 8 to 20: {found['accuracy']:.3f}" in text
    assert list(found["scores"]) == re.findall(r"^(\w+_score) \(", text, re.MULTILINE)
    for rows in found["scores"].values():
        assert [(row["layer"], row["head"]) for row in rows] == [
            ("blocks.0.attn", head) for head in range(4)
        ]
        assert all(f"{row['score']:.3f}" in text for row in rows)
    assert [row["lag"] for row in found["kernels"]["blocks.0.conv"]] == [0, 1, 2]


def test_an_encoder_decoder_is_audited_and_not_analyzed(capsys):
    main(["audit", PAIRS])
    assert "), given a source of 32 random tokens: passed\n" in capsys.readouterr().out
    said = fails(["analyze", PAIRS], capsys)
    assert said.startswith(f"ValueError: {PAIRS} is an encoder-decoder, and analyze scores models")


def test_train_names_the_classes_it_trains_and_refuses_the_other(tmp_path, monkeypatch, capsys):
    known = sorted(FAMILIES.keys() - {"Seq2Seq"})
    assert f"class: {', '.join(known[:-1])} or {known[-1]} (" in help_of("train", capsys)
    monkeypatch.chdir(tmp_path)
    said = fails(["train", "--out", "x", "--model", "Seq2Seq"], capsys)
    assert f"known: {known}; the study pig-latin trains Seq2Seq, on pairs" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", sorted(FAMILIES.keys() - {"Seq2Seq"}))
def test_every_class_that_train_names_trains(model, tmp_path, capsys):
    main(["train", "--out", str(tmp_path), "--model", model, "--steps", "1", "--batch-size", "2"])
    assert capsys.readouterr().out.startswith(f"{model}, ")
    assert smearlens.load_model(tmp_path / "model").n_parameters > 0


def test_the_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"smearlens {smearlens.__version__}\n"


class Interrupting:
    """Finds the commands' module by raising what Ctrl-C raises."""

    def find_spec(self, name, path=None, target=None):
        if name == commands.__name__:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["claims"], "stopped\n"),
        (["compare", "--quick"], "stopped; the same command continues from here\n"),
    ],
)
def test_ctrl_c_while_modules_load_is_a_line(arguments, said, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, commands.__name__)
    monkeypatch.delattr("smearlens.experiments.commands")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert fails(arguments, capsys, code=130) == said


@pytest.mark.parametrize("arguments", [["claims"], ["--help"]])
def test_a_reader_that_leaves_ends_it_in_silence(arguments):
    command = [sys.executable, "-u", "-m", "smearlens", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (141, "")


def test_a_model_whose_loss_is_not_finite_is_reported_as_json(monkeypatch, capsys):
    model = AttnAttn.from_preset("cpu", n_layers=1)
    with torch.no_grad():
        model.unembed.weight[3] = torch.inf
    monkeypatch.setattr(commands, "load_model", lambda path: model)
    with pytest.raises(SystemExit, match="1"):
        main(["audit", "x", "--json"])
    assert json.loads(capsys.readouterr().out)["passed"] is False
