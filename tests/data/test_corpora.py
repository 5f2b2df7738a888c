"""Corpora: published sizes and sums, damaged files, the cache of `datasets`, no network."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smearlens.data import corpora
from smearlens.data.corpora import CorpusError, load_corpus, read_text
from smearlens.experiments.smeared_keys.text_measures import wikitext_rows

DATA = Path(os.environ.get("SMEARLENS_DATA", Path(__file__).parents[3] / "shared" / "data"))
WIKITEXT = [("validation", "wiki.valid.raw.gz", 3760), ("test", "wiki.test.raw.gz", 4358)]
WAYS_OUT = "Three ways out: give the path.*point HF_DATASETS_CACHE.*embedded corpus"


def sample(name):
    if not (DATA / name).is_file():
        pytest.skip(f"needs {name} below SMEARLENS_DATA={DATA}")
    return DATA / name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill_cache(cache, rows, split="train", folder="roneneldan___tiny_stories/default", build="b1"):
    """Lay rows out as `datasets` does: config/version/hash/NAME-SPLIT.arrow, in two shards."""
    folder = cache / folder / "0.0.0" / build
    folder.mkdir(parents=True, exist_ok=True)
    half = (len(rows) + 1) // 2
    for i, part in enumerate((rows[:half], rows[half:])):
        table = pyarrow.table({"text": pyarrow.array(part, pyarrow.string())})
        path = folder / f"x-{split}-0000{i}-of-00002.arrow"
        with (
            pyarrow.OSFile(str(path), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=2)
    info = {"splits": {split: {"num_examples": len(rows)}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


# tiny Shakespeare


def test_tiny_shakespeare_has_the_published_sizes():
    train, validation, whole = (
        load_corpus("tiny-shakespeare", split) for split in ("train", "validation", "all")
    )
    assert len(train.text) == 1_003_854
    assert len(validation.text) == 111_540
    assert train.text + validation.text == whole.text
    assert len(set(whole.text)) == 65
    assert train.note == "characters 0..1003854 of 1115394"
    for corpus in (train, validation):
        assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()
    assert whole.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert whole.text not in repr(whole)


def test_max_chars_keeps_the_start_and_says_so():
    whole, start = load_corpus("tiny-shakespeare"), load_corpus("tiny-shakespeare", max_chars=17)
    assert start.text == whole.text[:17]
    assert start.note == "first 17 characters of characters 0..1003854 of 1115394"
    assert load_corpus("tiny-shakespeare", max_chars=10**7) == whole


@pytest.mark.parametrize("damage", ["cut", "flipped", "replaced", "gone"])
def test_a_damaged_package_is_noticed(damage, tmp_path, monkeypatch):
    name = "tinyshakespeare.txt.gz"
    packed = bytearray((corpora.EMBEDDED_FILES / name).read_bytes())
    packed[50_000] ^= 4
    contents = {"cut": packed[:99_999], "flipped": packed, "replaced": gzip.compress(b"To be")}
    if damage != "gone":
        (tmp_path / name).write_bytes(contents[damage])
    monkeypatch.setattr(corpora, "EMBEDDED_FILES", tmp_path)
    with pytest.raises(CorpusError, match=f"{name} is missing, cut off.*: reinstall smearlens"):
        load_corpus("tiny-shakespeare")


# files by path


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("aé日😀\n"), min_size=40, max_size=90))
def test_the_splits_of_a_file_are_the_file(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_bytes(text.encode())
    parts = [load_corpus(path, split).text for split in ("train", "validation", "test")]
    assert "".join(parts) == load_corpus(path, "all").text == text
    n_bytes = [len(part.encode()) for part in parts]
    assert 0 <= len(text.encode()) * 0.9 - n_bytes[0] < 4
    assert 0 <= len(text.encode()) * 0.95 - sum(n_bytes[:2]) < 4


@pytest.mark.parametrize("kind", ["plain", "gz", "zip", "named wrongly"])
def test_a_file_is_told_by_its_content(kind, tmp_path):
    text, path = "Zuzügler\r\n" * 9, tmp_path / "text.txt"
    raw = text.encode()
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inside", raw)
    else:
        path.write_bytes(raw if kind == "plain" else gzip.compress(raw))
    assert read_text(path) == read_text(str(path)) == text
    assert load_corpus(str(path), "all").source == str(path)


def damaged_file(kind, folder):
    path, packed = folder / "my.txt.gz", bytearray(gzip.compress(os.urandom(5000)))
    if kind == "two files":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("one", "1")
            archive.writestr("two", "2")
        return path
    packed[2500] ^= 1
    contents = {"empty": b"", "empty gz": gzip.compress(b""), "cut": packed[:3000]}
    contents |= {"flipped": packed, "latin-1": "Zuzügler".encode("latin-1"), "short": b"abc"}
    contents["cut zip"] = b"PK\x03\x04 and no more"
    path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", r"my.txt.gz is missing, cut off or damaged \(it is empty\): fetch it again"),
        ("empty gz", r"cut off or damaged \(it is empty\)"),
        ("cut", r"cut off or damaged \(Compressed file ended before.*\): fetch it again"),
        ("flipped", r"my.txt.gz is missing, cut off or damaged \(.*\): fetch it again"),
        (
            "latin-1",
            r"my.txt.gz is not UTF-8 \(.*byte 0xfc in position 3.*\): convert it with iconv",
        ),
        ("short", "my.txt.gz has 3 bytes: too short for this split, use 'all'"),
        ("two files", "a zip of 2 files, expected one"),
        ("cut zip", r"damaged \(File is not a zip file\)"),
    ],
)
def test_a_damaged_file_names_itself_and_the_remedy(kind, message, tmp_path):
    with pytest.raises(CorpusError, match=message):
        load_corpus(damaged_file(kind, tmp_path), "validation")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "tiny-shakespear",
            {},
            "'tiny-shakespear' is neither a file nor one of tiny-shakespeare, w",
        ),
        ("no/such/file.txt", {}, "'no/such/file.txt' is neither a file nor one of"),
        (os.sep, {}, "'/' is neither a file nor one of"),
        ("tiny-shakespeare", {"split": "test"}, "no split 'test'; it has train, validation, all"),
        ("tiny-shakespeare", {"split": "val"}, "tiny-shakespeare has no split 'val'"),
        ("wikitext-2-raw", {"split": "all"}, "no split 'all'; it has train, validation, test"),
        ("tinystories", {"split": "test"}, "no split 'test'; it has train, validation"),
        ("tiny-shakespeare", {"max_chars": 0}, "max_chars must be at least 1, or None.*got 0"),
        ("tiny-shakespeare", {"rebuild": True}, "a corpus that is fetched, not for 'tiny-shake"),
    ],
)
def test_wrong_arguments_are_explained(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(name, **options)


# the cache of `datasets`


def test_stories_are_joined_by_the_end_of_text(cache):
    folder = fill_cache(cache, ["One.", "Two.", "Three.", "Four.", "Five."])
    corpus = load_corpus("tinystories")
    assert corpus.text == "<|endoftext|>".join(["One.", "Two.", "Three.", "Four.", "Five."])
    assert (corpus.source, corpus.note) == ("roneneldan/TinyStories", "5 rows")
    assert load_corpus("tinystories", max_chars=3).text == "One"
    assert load_corpus("tinystories", max_chars=3).note == "first 3 characters of 1 rows"
    assert not folder.with_name("b1.incomplete").exists()


def test_the_newest_complete_build_is_read(cache):
    for age, (build, row) in enumerate([("b3.incomplete", "half"), ("b2", "new"), ("b1", "old")]):
        folder = fill_cache(cache, [row, row], build=build)
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert load_corpus("tinystories").text == "new<|endoftext|>new"


@pytest.mark.parametrize("damage", ["cut", "row lost", "no text", "no info", "no stream"])
def test_a_damaged_cache_names_its_file_and_the_remedy(damage, cache):
    folder = fill_cache(cache, ["One." * 99, "Two." * 99, "Three.", "Four."])
    path = folder / "x-train-00000-of-00002.arrow"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:400])
    elif damage == "no stream":
        path.write_bytes(b"\x07 something else")
    elif damage == "row lost":
        (folder / "x-train-00001-of-00002.arrow").unlink()
    elif damage == "no info":
        (folder / "dataset_info.json").unlink()
    else:
        table = pyarrow.table({"words": ["One."]})
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(
        CorpusError, match=r"x-train-00000.*in the cache is damaged.*rebuild=True\)"
    ):
        load_corpus("tinystories")


def test_a_changed_text_is_noticed_by_its_sum(cache):
    fill_cache(cache, ["", " = Title = \n"], folder="Salesforce___wikitext/wikitext-2-raw-v1")
    with pytest.raises(
        CorpusError, match=r"its sha256 is [0-9a-f]{64}, expected 6707892f.*rebuild"
    ):
        load_corpus("wikitext-2-raw")
    assert load_corpus("wikitext-2-raw", max_chars=5).text == " \n = "


@pytest.mark.parametrize(("split", "name", "n_rows"), WIKITEXT)
@pytest.mark.parametrize("folder", ["Salesforce___wikitext", "wikitext"])
def test_wikitext_rows_give_back_the_published_file(folder, split, name, n_rows, cache):
    text = read_text(sample(f"wikitext-2-raw/{name}"))
    rows = wikitext_rows(text)
    assert len(rows) == n_rows
    assert all(row == "" or (row.strip() and row.endswith("\n")) for row in rows)
    fill_cache(cache, rows, split, folder=f"{folder}/wikitext-2-raw-v1")
    assert load_corpus("wikitext-2-raw", split).text == text  # its published sha256 was compared


def test_wikitext_rows_keep_other_line_ends():
    assert wikitext_rows("a\x0bb\u2028c\r\n \n\n end") == ["a\x0bb\u2028c\r\n", "", "", " end"]
    assert wikitext_rows("") == []


@pytest.mark.parametrize(("name", "n_bytes"), [("enwik8", 4_154_399), ("text8", 3_000_000)])
def test_a_part_of_a_byte_corpus_is_split_90_5_5(name, n_bytes):
    path = sample(f"{name}/{name}.head.gz")
    sizes = [len(load_corpus(path, s).text.encode()) for s in ("train", "validation", "test")]
    assert sum(sizes) == n_bytes
    assert sizes == pytest.approx([0.9 * n_bytes, 0.05 * n_bytes, 0.05 * n_bytes], abs=5)


# fetching


class FakeHub(types.SimpleNamespace):
    """Stands in for `datasets`: fills the cache, or fails with an error of its choice."""

    exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))

    def load_dataset(self, *dataset, split, download_mode):
        self.asked.append((*dataset, split, download_mode))
        if self.error:
            raise self.error
        folder = fill_cache(self.cache, ["fetched", "anew"])
        files = [{"filename": str(path)} for path in sorted(folder.glob("*.arrow"))]
        return types.SimpleNamespace(cache_files=files)


@pytest.fixture
def hub(cache, monkeypatch):
    fake = FakeHub(cache=cache, asked=[], error=None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", fake.exceptions)
    monkeypatch.setattr(corpora, "_check_reachable", lambda name, address: None)
    return fake


def test_a_corpus_is_fetched_once(hub):
    for _ in range(2):
        assert load_corpus("tinystories").text == "fetched<|endoftext|>anew"
    assert hub.asked == [("roneneldan/TinyStories", None, "train", None)]
    load_corpus("tinystories", rebuild=True)
    assert hub.asked[1:] == [("roneneldan/TinyStories", None, "train", "force_redownload")]


@pytest.mark.parametrize(
    "error",
    [OSError("disk full"), pyarrow.ArrowInvalid("no"), FakeHub.exceptions.DatasetsError("x")],
)
def test_errors_of_datasets_are_wrapped(error, hub, cache):
    hub.error = error
    with pytest.raises(CorpusError, match=r"TinyStories could not be fetched.*rebuild=True\)") as e:
        load_corpus("tinystories")
    assert str(cache) in str(e.value)
    assert e.value.__cause__ is error


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web site of our own that has a small text8.zip, with the network switched on."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def copyfile(self, source, outputfile):
            outputfile.write(source.read()[self.hold_back :])

        hold_back = 0

    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(corpora, "_ZIP_HOST", f"http://127.0.0.1:{server.server_port}")
    text = " anarchism originated as a term" * 7
    monkeypatch.setitem(corpora._ZIPPED, "text8", hashlib.sha256(text.encode()).hexdigest())
    with zipfile.ZipFile(folder / "text8.zip", "w") as archive:
        archive.writestr("text8", text)
    yield types.SimpleNamespace(folder=folder, text=text, handler=Handler)
    server.shutdown()
    server.server_close()


def test_a_zipped_corpus_is_fetched_verified_and_kept(site, cache):
    folder, text = site.folder, site.text
    assert load_corpus("text8", "all").text == text
    (folder / "text8.zip").unlink()
    assert load_corpus("text8", "train").text == text[: len(text) * 9 // 10]
    assert [path.name for path in (cache / "smearlens").iterdir()] == ["text8.zip"]

    with pytest.raises(CorpusError, match=r"text8.zip could not be fetched to .*404"):
        load_corpus("text8", rebuild=True)
    assert load_corpus("text8", "all").text == text  # what was there is still there
    packed = (cache / "smearlens" / "text8.zip").read_bytes()
    (cache / "smearlens" / "text8.zip").write_bytes(packed[:-30])
    with pytest.raises(CorpusError, match=r"text8.zip is missing, cut off.*rebuild=True\)"):
        load_corpus("text8")


def test_a_connection_that_breaks_leaves_nothing(site, cache):
    site.handler.hold_back = 9
    with pytest.raises(CorpusError, match=r"text8.zip could not be fetched.*IncompleteRead"):
        load_corpus("text8")
    assert list((cache / "smearlens").iterdir()) == []


def test_another_text_in_the_zip_is_refused(site, cache):
    with zipfile.ZipFile(site.folder / "text8.zip", "w") as archive:
        archive.writestr("text8", "moved to a new address")
    with pytest.raises(CorpusError, match=r"its sha256 is .*, expected .*rebuild=True"):
        load_corpus("text8")


# without a network

OFFLINE = """
import sys, time
from smearlens.data.corpora import CorpusError, load_corpus
start = time.perf_counter()
try:
    load_corpus(sys.argv[1])
except CorpusError as error:
    print(time.perf_counter() - start, error)
assert not {"datasets", "huggingface_hub", "pyarrow"} & set(sys.modules), "heavy import"
"""


@pytest.mark.parametrize("name", ["wikitext-2-raw", "enwik8"])
def test_offline_fails_at_once_with_three_ways_out(name, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_DATASETS_CACHE", None)
    command = [sys.executable, "-c", OFFLINE, name]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, message = run.stdout.split(" ", 1)
    assert float(seconds) < 1
    assert message.startswith(f"{name} must be fetched from http")
    assert f"which is switched off by HF_HUB_OFFLINE (cache: {tmp_path}/datasets)" in message
    assert "Three ways out" in message


@pytest.mark.parametrize("silence", ["refused", "hanging", "unknown host"])
def test_no_answer_fails_at_once(silence, cache, monkeypatch):
    """Whatever the network does, a look-up that hangs included, half a second is the limit."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://localhost:9")

    def connect(address, timeout):
        assert address == ("localhost", 9)
        if silence == "hanging":
            time.sleep(1.5)
        raise (
            ConnectionRefusedError if silence == "refused" else OSError("Name or service not known")
        )

    monkeypatch.setattr(corpora.socket, "create_connection", connect)
    start = time.perf_counter()
    with pytest.raises(
        CorpusError, match=rf"https://localhost:9, which gets no answer.*{WAYS_OUT}"
    ):
        load_corpus("tinystories")
    assert time.perf_counter() - start < 1


def test_a_proxy_is_asked_instead_of_the_host(monkeypatch):
    asked = []
    monkeypatch.setattr(
        corpora.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"}
    )
    monkeypatch.setattr(
        corpora.socket,
        "create_connection",
        lambda address, timeout: asked.append(address) or contextlib.nullcontext(),
    )
    assert corpora._answers("https://huggingface.co", 5.0)
    assert corpora._answers("http://mattmahoney.net/dc/text8.zip", 5.0)
    assert asked == [("proxy", 3128), ("mattmahoney.net", 80)]


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, "~/.cache/huggingface/datasets"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/datasets"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/datasets"),
        ({"HF_HOME": "/h", "HF_DATASETS_CACHE": "~/d"}, "~/d"),
    ],
)
def test_the_cache_is_where_datasets_has_it(environment, folder, monkeypatch):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert corpora._cache_folder() == Path(folder).expanduser()
