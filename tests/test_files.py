"""Atomic files, checksums, and dataclasses as strict JSON."""

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from jaxtyping import config as jaxtyping_config

from smearlens import _files
from smearlens._files import from_dict, from_json, nearest, sha256, to_json, write_atomically


@pytest.fixture
def unchecked():
    """Types unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


# Files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["κ = ½\n", b"\x00\xff", "", b""])
def test_what_is_written_can_be_read(tmp_path, content):
    path = tmp_path / "file"
    for _ in range(2):  # new, then over the old one
        write_atomically(path, content)
        expected = content.encode() if isinstance(content, str) else content
        assert path.read_bytes() == expected
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write_atomically(str(path), "by name")
    assert path.read_text() == "by name"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_the_mode_follows_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", "text")
    finally:
        assert os.umask(before) == mask
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("failing", ["fsync", "chmod", "replace"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, failing, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_content_is_on_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "chmod", "replace"):
        real = getattr(os, name)

        def spy(*args, name=name, real=real):
            steps.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, spy)
    write_atomically(tmp_path / "file", "text")
    assert steps == ["fsync", "chmod", "replace", "fsync"]  # the last one is the folder's


WRITER = """
import sys
from smearlens._files import write_atomically
turn = 0
while True:
    turn += 1
    write_atomically(sys.argv[1], bytes([turn % 251]) * 200_000)
    print(flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path, generator):
    """The reader sees 200,000 equal bytes, whenever the writer died."""
    path = tmp_path / "file"
    for pause in (0.001, 0.004, 0.009, 0.02):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
        writer.stdout.readline()
        for _ in range(20):
            content = path.read_bytes()
            assert len(content) == 200_000
            assert len(set(content)) == 1
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        content = path.read_bytes()
        assert (len(content), len(set(content))) == (200_000, 1)
        if writer.stdout:
            writer.stdout.close()


def test_sha256_is_the_one_of_the_standard_library(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert sha256(tmp_path / "file") == sha256(str(tmp_path / "file")) == expected


def test_sha256_works_on_pythons_without_file_digest(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"abc")
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "file") == expected  # FIPS 180-2, appendix B.1


# Names -----------------------------------------------------------------------------------------


def test_the_nearest_names_come_first():
    known = ["n_heads", "n_layers", "d_model", "kernel_size"]
    assert nearest("n_head", known)[0] == "n_heads"
    assert nearest("kernel", known)[0] == "kernel_size"
    assert nearest("zzz", known) == []
    assert len(nearest("n_", known, count=1)) <= 1


# Strict JSON -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    size: int
    name: str = "a"
    kind: Literal["x", "y"] | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    lags: tuple[int, ...] = ()
    flag: bool = False
    limit: int | float | None = None
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size must be at least 0, got {self.size}")


@pytest.mark.parametrize(
    "config",
    [
        Outer(size=3),
        Outer(
            size=0, name="κ", kind="y", lags=(1, 2, 3), flag=True, limit=7, inner=Inner(rate=1.0)
        ),
        Outer(size=1, betas=(0.1, 0.2), limit=0.25),
    ],
)
def test_a_dataclass_survives_json(config):
    text = to_json(config)
    assert text.endswith("}\n")
    assert from_json(Outer, text) == config
    assert from_dict(Outer, json.loads(text)) == config


def test_numbers_keep_their_kind():
    found = from_dict(Outer, {"size": 3, "betas": [1, 0], "inner": {"rate": 2}})
    assert found.betas == (1.0, 0.0)
    assert {type(b) for b in found.betas} == {float}
    assert type(found.inner.rate) is float


WRONG = [
    ({"size": 3, "nam": "b"}, "Outer: unknown key 'nam'; nearest: ['name'"),
    ({"size": 3, 5: 1}, "Outer: unknown key 5; nearest: []; known: ['betas', 'flag', 'inner',"),
    ({}, "Outer: missing ['size']; add them to the file"),
    ({"size": "3"}, "Outer.size: expected int, got '3'"),
    ({"size": 3.0}, "Outer.size: expected int, got 3.0"),
    ({"size": True}, "Outer.size: expected int, got True"),
    ({"size": None}, "Outer.size: expected int, got None"),
    ({"size": 3, "flag": 1}, "Outer.flag: expected bool, got 1"),
    ({"size": 3, "name": 1}, "Outer.name: expected str, got 1"),
    ({"size": 3, "kind": "z"}, "Outer.kind: expected "),
    ({"size": 3, "betas": [0.9]}, "Outer.betas: expected tuple[float, float], got [0.9]"),
    ({"size": 3, "betas": 0.9}, "Outer.betas: expected tuple[float, float], got 0.9"),
    ({"size": 3, "betas": [0.9, "b"]}, "Outer.betas: expected float, got 'b'"),
    ({"size": 3, "betas": [0.9, True]}, "Outer.betas: expected float, got True"),
    ({"size": 3, "lags": [1, 2.5]}, "Outer.lags: expected int, got 2.5"),
    ({"size": 3, "limit": "no"}, "Outer.limit: expected int | float | None, got 'no'"),
    ({"size": 3, "inner": 4}, "Outer.inner: expected Inner, got 4"),
    ({"size": 3, "inner": {"rat": 4}}, "Outer.inner: unknown key 'rat'; nearest: ['rate']"),
    ({"size": -3}, "size must be at least 0, got -3"),
    ([3], "Outer: expected an object, got list"),
    (None, "Outer: expected an object, got NoneType"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_dictionary_is_explained(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(Outer, given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"size": 3', "run/config.json: not JSON (Expecting ',' delimiter"),
        ("", "run/config.json: not JSON (Expecting value"),
        ("[1]", "run/config.json: expected an object, got list"),
        ('{"sise": 3}', "run/config.json: unknown key 'sise'; nearest: ['size'"),
        ('{"size": "3"}', "run/config.json.size: expected int"),
    ],
)
def test_a_wrong_text_is_explained_with_its_place(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_json(Outer, text, "run/config.json")


def test_the_file_itself_is_small_and_leaves_the_umask_alone():
    assert len(Path(_files.__file__).read_text().splitlines()) < 200
    before = os.umask(0o027)
    try:
        assert _files._umask() == 0o027
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
