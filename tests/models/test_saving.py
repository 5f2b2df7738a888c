"""Saved models: the round trip, every way a folder can be broken, and what never happens."""

import ast
import hashlib
import json
import os
import pickle
import re
import socket
import stat
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.zoo import SIZES, TOKENS, every_model

import smearlens
from smearlens import AttnAttn, AttnAttnConfig, ConvAttn, ConvAttnConfig, ModelFileError, load_model
from smearlens.models import files

SOURCES = sorted(Path(smearlens.__file__).parent.rglob("*.py"))


@pytest.fixture
def model():
    return ConvAttn(ConvAttnConfig(**SIZES, kernel_size=5, smear=True, positions="rotary")).eval()


@pytest.fixture
def saved(model, tmp_path):
    """A folder with `model` in it."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach a network, or to look into the hub's cache, fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


# Round trip ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_model
def test_the_round_trip_is_bitwise(variant, dtype, tmp_path, no_network):
    model = variant.factory().to(dtype).eval()
    model.save_pretrained(tmp_path)
    for again in (type(model).from_pretrained(tmp_path), load_model(str(tmp_path))):
        assert type(again) is type(model)
        assert again.config == model.config
        assert not again.training
        state, expected = again.state_dict(), model.state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == dtype
            assert torch.equal(state[name], tensor), name
        assert torch.equal(again(*variant.inputs), model(*variant.inputs))


def test_a_training_model_is_saved_as_it_is_and_stays_in_training(model, tmp_path):
    model.train()
    model(TOKENS, return_type="loss").backward()
    model.save_pretrained(tmp_path / "a" / "b")
    assert model.training
    assert all(p.requires_grad for p in ConvAttn.from_pretrained(tmp_path / "a" / "b").parameters())


def test_saving_twice_writes_the_same_bytes_and_leaves_no_litter(model, saved):
    first = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert sorted(first) == ["config.json", "model.safetensors"]
    model.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == first


def test_config_json_says_what_is_needed_to_load_it(model, saved):
    description = json.loads((saved / "config.json").read_text())
    assert description["schema"] == 1
    assert description["model"] == "ConvAttn"
    assert description["config"] == {
        "d_vocab": 11, "d_model": 12, "n_heads": 3, "kernel_size": 5, "n_ctx": 13, "causal": True,
        "conv_on": "stream", "smear": True, "positions": "rotary", "residual": False,
        "norm": False, "mlp": False, "dropout": 0.0,
    }  # fmt: skip
    weights = (saved / "model.safetensors").read_bytes()
    assert description["sha256"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_that_the_umask_asks_for(model, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        model.save_pretrained(tmp_path)
    finally:
        assert os.umask(before) == mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_a_save_that_fails_leaves_the_old_file(model, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.unembed.to(torch.float64),
            r"not saved, .* \['torch.float32', 'torch.float64'\]",
        ),
        (
            lambda m: m.embed.weight.data[3].fill_(torch.nan),
            "a value in embed.weight that is not fin",
        ),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_saved(model, tmp_path, change, message):
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Broken folders --------------------------------------------------------------------------------


def edit_json(folder, change):
    path = folder / "config.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def edit_weights(folder, change):
    """Change the tensors and make the checksum fit, as somebody with good intentions would."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(folder, lambda d: (d.update(sha256=digest), d.pop("seal")))


def edit_bytes(folder, change):
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def flip_bit(content):
    middle = len(content) - 40
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def put_nan(tensors):
    tensors["embed.weight"][3, 2] = torch.nan


def replace_by_pickle(folder):
    """A pickle whose checksum fits; loading it would end this process."""

    class Bomb:
        def __reduce__(self):
            return os._exit, (13,)

    content = pickle.dumps(Bomb())
    edit_bytes(folder, lambda _: content)
    digest = hashlib.sha256(content).hexdigest()
    edit_json(folder, lambda d: (d.update(sha256=digest), d.pop("seal")))


WEIGHTS, CONFIG = "model.safetensors", "config.json"
BROKEN = {
    "bit flip": (
        lambda f: edit_bytes(f, flip_bit),
        WEIGHTS, "sha256 is [0-9a-f]{64}, config.json expects [0-9a-f]{64}.*fetch or save it again",
    ),
    "truncated": (lambda f: edit_bytes(f, lambda b: b[:-9]), WEIGHTS, "sha256 is .* cut off"),
    "padded": (lambda f: edit_bytes(f, lambda b: b + b"\0"), WEIGHTS, "sha256 is .* altered"),
    "empty": (lambda f: edit_bytes(f, lambda b: b""), WEIGHTS, "sha256 is e3b0c44298fc1.* expects"),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(), WEIGHTS, "missing; save the model again with save_pretr",
    ),
    "a pickle": (replace_by_pickle, WEIGHTS, "not a safetensors file .*save the file again"),
    "missing tensor": (
        lambda f: edit_weights(f, lambda t: t.pop("embed.weight")),
        WEIGHTS, r'does not fit config.json(?s:.)*Missing key.*"embed.weight"(?s:.)*save the model',
    ),
    "extra tensor": (
        lambda f: edit_weights(f, lambda t: t.update(odd=torch.ones(2))),
        WEIGHTS, r'expects other weights(?s:.)*Unexpected key.*"odd"',
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda t: t.update({"embed.weight": torch.ones(11, 13)})),
        WEIGHTS, r"(?s)embed.weight.*\[11, 13\].*\[11, 12\]",
    ),
    "not a number": (
        lambda f: edit_weights(f, put_nan),
        WEIGHTS, "found a value in embed.weight that is not finite, expected none; train the model",
    ),
    "another dtype": (
        lambda f: edit_weights(f, lambda t: t.update({"embed.weight": torch.ones(11, 12).int()})),
        WEIGHTS, "found embed.weight in torch.int32, expected torch.float32; fetch or save",
    ),
    "two dtypes": (
        lambda f: edit_weights(f, lambda t: t.update({"embed.weight": torch.ones(11, 12).half()})),
        WEIGHTS, r"found weights of \['torch.float16', 'torch.float32'\], expected one floating dt",
    ),
    "no tensors": (
        lambda f: edit_weights(f, dict.clear), WEIGHTS, r"found weights of \[\], expected one fl",
    ),
    "unknown config key": (
        lambda f: edit_json(f, lambda d: d["config"].update(n_head=3)),
        CONFIG, r"unknown key 'n_head'; nearest: \['n_heads'.*known: \['causal'",
    ),
    "missing config key": (
        lambda f: edit_json(f, lambda d: d["config"].pop("d_vocab")),
        CONFIG, r"missing \['d_vocab'\]; add them to the file",
    ),
    "config value of a wrong type": (
        lambda f: edit_json(f, lambda d: d["config"].update(d_model="12")),
        CONFIG, r"d_model: expected int, got '12'",
    ),
    "config value that makes no sense": (
        lambda f: edit_json(f, lambda d: d["config"].update(n_heads=5)),
        CONFIG, "n_heads=5 must divide d_model=12",
    ),
    "config is a list": (
        lambda f: edit_json(f, lambda d: d.update(config=[1, 2])),
        CONFIG, "expected an object, got list",
    ),
    "another class": (
        lambda f: edit_json(f, lambda d: d.update(model="AttnAttn")),
        CONFIG, "found a model of class AttnAttn, expected ConvAttn; use AttnAttn.from_pretr",
    ),
    "no config": (
        lambda f: (f / CONFIG).unlink(),
        "", r"expected a folder with config.json .*found \['model.safetensors'\]; write one with",
    ),
    "config is a folder": (
        lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir()),
        "", r"expected a folder with config.json .*found \['config.json', 'model.safetensors'\]",
    ),
    "no json": (
        lambda f: (f / CONFIG).write_text('{"schema": 1,'),
        CONFIG, "found no model description .*expected an object with schema, model, config",
    ),
    "no text": (
        lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00\x80"), CONFIG, "found no model descript",
    ),
    "json of something else": (
        lambda f: (f / CONFIG).write_text("[1, 2]"), CONFIG, "found no model description",
    ),
    "no checksum": (
        lambda f: edit_json(f, lambda d: d.pop("sha256")), CONFIG, r"KeyError\('sha256'\)",
    ),
    "a size edited": (
        lambda f: edit_json(f, lambda d: d["config"].update(n_ctx=9)),
        CONFIG, "found contents that were altered since they were written, expected its own seal",
    ),
    "unknown key beside the config": (
        lambda f: edit_json(f, lambda d: d.update(sead=d.pop("seal"))),
        CONFIG, "unknown key 'sead'",
    ),
    "unknown schema": (
        lambda f: edit_json(f, lambda d: d.update(schema=2)),
        CONFIG, "found schema 2, expected 1; update smearlens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_says_where_what_and_what_to_do(saved, kind, no_network):
    damage, file, message = BROKEN[kind]
    damage(saved)
    with pytest.raises(ModelFileError, match=message) as error:
        ConvAttn.from_pretrained(saved)
    assert str(error.value).startswith(str(saved / file))


def test_load_model_refuses_a_class_it_does_not_know(saved):
    for odd in ("Transformer", "os.system"):
        edit_json(saved, lambda d, odd=odd: d.update(model=odd))
        with pytest.raises(ModelFileError, match=rf"class '{odd}', expected one of"):
            load_model(saved)
    edit_json(saved, lambda d: d.update(model=["ConvAttn"]))
    with pytest.raises(ModelFileError, match="model and sha256 must be strings"):
        load_model(saved)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_any_flipped_bit_is_found(saved, file, generator):
    path = saved / file
    content = path.read_bytes()
    for place in torch.randint(len(content) * 8, (100,), generator=generator).tolist():
        broken = bytearray(content)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        with pytest.raises(ModelFileError, match=r"sha256|config\.json"):
            load_model(saved)


def test_a_seal_that_was_taken_out_allows_an_edit(saved):
    edit_json(saved, lambda d: (d["config"].update(n_ctx=9), d.pop("seal")))
    assert load_model(saved).config.n_ctx == 9  # rotary positions: no weight has that size


def test_weights_of_one_class_do_not_pass_for_another(tmp_path):
    AttnAttn(AttnAttnConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match="found a model of class AttnAttn, expected ConvAttn"):
        ConvAttn.from_pretrained(tmp_path)


# Where models come from ------------------------------------------------------------------------


def test_what_looks_like_a_path_never_asks_the_network(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    names = [
        "nowhere", "./nowhere", "../nowhere/model", "/nowhere/model", "~/nowhere", "a/b/c",
        "runs/later", "empty/folder", Path("owner/name"), "owner\\name", "",
    ]  # fmt: skip
    for name in names:
        with pytest.raises(ModelFileError, match=r"expected a folder with config\.json and mod"):
            ConvAttn.from_pretrained(name)


def test_paths_may_be_relative_or_in_the_home_folder(saved, monkeypatch, no_network):
    monkeypatch.setenv("HOME", str(saved.parent))
    monkeypatch.chdir(saved.parent)
    for name in ("model", "./model", "~/model", str(saved), saved):
        assert ConvAttn.from_pretrained(name).config.n_ctx == 13


def test_a_model_of_the_package_is_found_by_name(saved, monkeypatch, no_network):
    monkeypatch.setattr(files, "SHIPPED", saved.parent)
    assert ConvAttn.from_pretrained("model").config.n_ctx == 13
    with pytest.raises(ModelFileError, match=r"ships with the package \['model'\]"):
        ConvAttn.from_pretrained("modle")


def test_the_hub_is_asked_for_two_files_only_and_checked_like_a_folder(saved, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert ConvAttn.from_pretrained("somebody/a-model").config.n_ctx == 13
    assert asked == [("somebody/a-model", {"allow_patterns": ["config.json", "model.safetensors"]})]
    edit_bytes(saved, flip_bit)
    with pytest.raises(ModelFileError, match="sha256"):
        load_model("somebody/a-model")


def test_a_name_on_the_hub_fails_with_the_way_out_when_offline():
    with pytest.raises(ModelFileError, match="somebody/a-model: no local folder, and could not be"):
        ConvAttn.from_pretrained("somebody/a-model")


def test_push_to_hub_uploads_a_folder_that_loads(model, monkeypatch, tmp_path):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repository, private, exist_ok):
            assert (private, exist_ok) == (True, True)
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, folder_path, repo_id):
            uploaded.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = model.push_to_hub("somebody/a-model", private=True, token="secret")
    assert address == "https://huggingface.co/somebody/a-model"
    assert sorted(uploaded) == ["README.md", "config.json", "model.safetensors"]
    for name, content in uploaded.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(ConvAttn.from_pretrained(tmp_path)(TOKENS), model(TOKENS))
    card = uploaded["README.md"].decode()
    assert re.search(r"ConvAttn, [\d,]+ parameters", card)
    assert "from smearlens import ConvAttn" in card


# What the sources never do ---------------------------------------------------------------------


def calls(path):
    """Every call in a file as (dotted name, keywords)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_ever_unpickles_or_runs_code_from_a_file(path):
    text = path.read_text()
    assert not re.search(r"weights_only\s*=\s*False|trust_remote_code\s*=\s*True", text)
    imported = re.findall(r"^\s*(?:import|from)\s+([\w.]+)", text, re.MULTILINE)
    assert not {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"} & set(imported)
    for name, keywords in calls(path):
        assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "np.load"), name
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"
