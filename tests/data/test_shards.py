"""Sharded corpora against one array, whatever is cut where, and whoever is killed when."""

import gzip
import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smearlens.data.batches import TokenBatches, evaluation_windows
from smearlens.data.corpora import CorpusError, load_corpus
from smearlens.data.shards import ShardedTokens, _cut, open_shards, write_shards
from smearlens.data.token_files import write_token_file
from smearlens.data.tokenizers import ByteTokenizer, CharTokenizer, gpt2_tokenizer

TEXT = load_corpus("tiny-shakespeare", max_chars=9_011).text


@pytest.fixture
def sources(tmp_path):
    """A text in three files, one of them zipped, one empty, with characters of 1 to 4 bytes."""
    parts = [TEXT[:3001], "", "naïve ☃ 𝄞\n" * 101 + TEXT[3001:]]
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt.gz")]
    for path, part in zip(paths, parts, strict=True):
        raw = part.encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return paths, "".join(parts)


def two_halves(n_tokens=101, seed=0):
    array = np.random.default_rng(seed).integers(0, 65_536, n_tokens).astype("<u2")
    cuts = [0, 1, 17, 18, 60, n_tokens]
    return array, ShardedTokens([array[a:b] for a, b in pairwise(cuts)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_indexing_equals_that_of_one_array(data):
    array, sharded = two_halves()
    ends = st.integers(-150, 150) | st.none()
    steps = st.integers(-7, 7).filter(bool) | st.none()
    cut = slice(data.draw(ends), data.draw(ends), data.draw(steps))
    np.testing.assert_array_equal(sharded[cut], array[cut])
    index = data.draw(st.lists(st.integers(-101, 100), max_size=30))
    index = np.array(index, dtype=np.int64).reshape(-1, 1)
    np.testing.assert_array_equal(sharded[index], array[index])
    assert sharded[index].dtype == array.dtype


def test_one_number_and_the_outline_are_those_of_one_array():
    array, sharded = two_halves()
    assert [sharded[i] for i in range(-101, 101)] == [array[i] for i in range(-101, 101)]
    assert (len(sharded), sharded.shape, sharded.ndim) == (101, array.shape, 1)
    assert repr(sharded) == "ShardedTokens(101 tokens in 5 parts)"
    for wrong in (101, -102, np.array([3, 101])):
        with pytest.raises(IndexError, match="outside of 101 tokens"):
            sharded[wrong]
    with pytest.raises(IndexError, match=r"integers, got 1\.5"):
        sharded[1.5]


def test_parts_of_two_types_or_without_tokens_are_refused():
    one = np.arange(3, dtype=np.uint16)
    for parts in ([], [one, one[:0]], [one, one.astype(np.uint32)]):
        with pytest.raises(ValueError, match="parts must be arrays of one dtype, none of them"):
            ShardedTokens(parts)


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_windows_over_shards_are_those_over_one_array(order):
    array, sharded = two_halves()
    whole = TokenBatches(array, 5, 23, seed=4, order=order)  # longer than most shards
    parts = TokenBatches(sharded, 5, 23, seed=4, order=order)
    for step in range(7):
        assert parts.batch(step)["tokens"].equal(whole.batch(step)["tokens"])
    pairs = zip(*(evaluation_windows(t, 11, 3) for t in (array, sharded)), strict=True)
    assert all(a["tokens"].equal(b["tokens"]) for a, b in pairs)


@pytest.mark.parametrize(
    ("shard_tokens", "piece_bytes"), [(1, 997), (1500, 61), (1500, 997), (10**6, 61)]
)
def test_shards_hold_the_tokens_of_the_whole_text(sources, shard_tokens, piece_bytes, tmp_path):
    paths, text = sources
    tokenizer = CharTokenizer(text)
    sizes = {"shard_tokens": shard_tokens, "piece_bytes": piece_bytes}
    written = write_shards(tmp_path / "out", paths, tokenizer, **sizes)
    for tokens in (written, open_shards(tmp_path / "out")):
        np.testing.assert_array_equal(tokens[:], tokenizer.encode(text))
        lengths = [len(part) for part in tokens.parts]
        assert all(shard_tokens <= n < shard_tokens + piece_bytes for n in lengths[:-1])


def test_seams_are_those_of_the_bpe_of_gpt2(sources, tmp_path):
    paths, text = sources
    tokens = write_shards(tmp_path / "out", paths, gpt2_tokenizer(), piece_bytes=997)
    whole = torch.cat([gpt2_tokenizer().encode(part) for part in (text[:3001], text[3001:])])
    np.testing.assert_array_equal(tokens[:], whole)


@pytest.mark.parametrize(
    ("block", "piece"),
    [
        ("one\ntwo\nthr", "one\ntwo\n"),
        ("one\ntwo\n\nthr", "one\n"),  # the blank line belongs to what follows it
        ("one\n\n two\n", "one\n\n two\n"),  # no newline stands alone: the last one
        ("no line end", "no line end"),
        ("é𝄞"[:1] + "☃", "é☃"),
    ],
)
def test_a_piece_ends_where_two_tokens_cannot_merge(block, piece):
    text, rest = _cut(block.encode(), last=False)
    assert text == piece
    assert text.encode() + rest == block.encode()


@pytest.mark.parametrize("character", ["x", "é", "☃", "𝄞"])
def test_no_character_is_cut_in_two(character):
    raw = character.encode()
    for length in range(len(raw)):
        text, rest = _cut(b"ab" + raw[:length], last=False)
        assert (text, rest) == ("ab", raw[:length])
    assert _cut(b"ab" + raw, last=False) == ("ab" + character, b"")


SCRIPT = """
import os, signal, sys
from smearlens.data.corpora import CorpusError
from smearlens.data.shards import open_shards, write_shards
from smearlens.data.tokenizers import ByteTokenizer

class Mortal(ByteTokenizer):
    def encode(self, text):
        Mortal.left -= 1
        if not Mortal.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)

for Mortal.left in (5, 4, 4):  # each dies in the middle of a shard, a little further on
    if not (pid := os.fork()):
        write_shards(sys.argv[1], sys.argv[2:], Mortal(), shard_tokens=500, piece_bytes=997)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    try:
        raise AssertionError(open_shards(sys.argv[1]))
    except CorpusError as error:
        assert "was never finished: call write_shards again" in str(error)
"""


def test_a_killed_call_goes_on_where_it_was(sources, tmp_path):
    paths, text = sources
    out = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(out), *map(str, paths)]
    assert subprocess.run(command).returncode == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tokens")}
    assert len(before) >= 3
    assert list(out.glob("*.tmp"))
    sizes = {"shard_tokens": 500, "piece_bytes": 997}
    tokens = write_shards(out, paths, ByteTokenizer(), **sizes)
    np.testing.assert_array_equal(tokens[:], ByteTokenizer().encode(text))
    assert not list(out.glob("*.tmp"))
    for name, time in before.items():
        assert (out / name).stat().st_mtime_ns == time  # finished shards were not made again
    undisturbed = tmp_path / "undisturbed"
    write_shards(undisturbed, paths, ByteTokenizer(), **sizes)
    assert sorted(os.listdir(out)) == sorted(os.listdir(undisturbed))
    for file in undisturbed.iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes()


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "text").write_text(TEXT[:5003])
    write_shards(
        tmp_path / "out", [tmp_path / "text"], ByteTokenizer(), shard_tokens=1500, piece_bytes=997
    )
    return tmp_path / "out"


def flip(folder):
    raw = bytearray((folder / "000001.tokens").read_bytes())
    raw[-1] ^= 1
    (folder / "000001.tokens").write_bytes(raw)


def swap(folder):
    (folder / "000000.tokens").replace(folder / "x")
    (folder / "000001.tokens").replace(folder / "000000.tokens")
    (folder / "x").replace(folder / "000001.tokens")


def change_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "000001.tokens is no whole token file .its sha256"),
        (swap, "000000.tokens is another shard than index.json lists"),
        (lambda out: (out / "000002.tokens").unlink(), "000002.tokens is no whole token file"),
        (lambda out: (out / "index.json").unlink(), "index.json is no index of shards"),
        (lambda out: (out / "index.json").write_text("{"), "index.json is no index of shards"),
        (lambda out: change_index(out, format="other"), "no index of shards .format 'other'"),
        (lambda out: change_index(out, finished=False), "was never finished"),
    ],
    ids=["bit", "swapped", "missing", "no index", "cut index", "format", "unfinished"],
)
def test_a_damaged_folder_is_refused(shards, damage, message):
    damage(shards)
    with pytest.raises(CorpusError, match=message):
        open_shards(shards)


def test_another_corpus_in_the_same_folder_is_refused(shards):
    text = shards.parent / "text"
    for sizes, tokenizer, differs in (
        ((1500, 998), ByteTokenizer(), "'piece_bytes': .997, 998"),
        ((1501, 997), ByteTokenizer(), "'shard_tokens': .1500, 1501"),
        ((1500, 997), CharTokenizer(TEXT), "'d_vocab': .256, "),
    ):
        with pytest.raises(CorpusError, match=f"holds another corpus.*{differs}"):
            write_shards(shards, [text], tokenizer, shard_tokens=sizes[0], piece_bytes=sizes[1])
    text.write_text(TEXT[:5003].swapcase())
    with pytest.raises(CorpusError, match="'first_piece'"):
        write_shards(shards, [text], ByteTokenizer(), shard_tokens=1500, piece_bytes=997)


def test_what_cannot_be_tokenized_is_named(tmp_path):
    bad, empty = tmp_path / "bad", tmp_path / "empty"
    bad.write_bytes(b"good\n" * 7 + b"\xff\xfe")
    empty.touch()
    cases = (
        ([tmp_path / "none"], {}, CorpusError, "none cannot be read: No such file"),
        ([bad], {}, CorpusError, "bad cannot be read from byte 0 on .*must be whole, and UTF-8"),
        ([empty], {}, CorpusError, "hold no text"),
        ([], {}, ValueError, "got 0 sources"),
        ([bad], {"shard_tokens": 0}, ValueError, "shard_tokens=0"),
        ([bad], {"piece_bytes": 3}, ValueError, "piece_bytes=3"),
    )
    for paths, sizes, error, message in cases:
        with pytest.raises(error, match=message):
            write_shards(tmp_path / "out", paths, ByteTokenizer(), **sizes)


@pytest.mark.parametrize("chunk", [torch.tensor([1.7]), torch.tensor([[1, 2], [3, 4]])])
def test_chunks_of_another_kind_do_not_reach_the_file(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match="int tensors of one axis"):
        write_token_file(tmp_path / "tokens", [chunk], 5)
    assert not (tmp_path / "tokens").exists()
