"""Batches as a function of the step, windows that cover a text, token files that survive."""

import hashlib
import os
import subprocess
import sys
from collections import Counter

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smearlens.data.batches import (
    Batches,
    PaddedBatches,
    RepeatBatches,
    TokenBatches,
    evaluation_windows,
    shuffled,
)
from smearlens.data.corpora import CorpusError
from smearlens.data.token_files import open_token_file, write_token_file

LINES = [
    torch.arange(first, first + n) for first, n in ((10, 3), (20, 0), (30, 7), (40, 1), (50, 5))
]


@pytest.fixture
def unchecked():
    """Shapes and types are not checked at run time, as for a user: our own messages come out."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


SOURCES = """
{
    "random": TokenBatches(torch.arange(997) % 251, 3, 11, seed=4),
    "shuffled": TokenBatches(torch.arange(997), 3, 11, seed=4, order="shuffled"),
    "repeats": RepeatBatches(3, (3, 7), 17, 19, seed=4, bos=0),
    "padded": PaddedBatches([torch.arange(n) for n in range(7)], 3, 5, pad=9, seed=4),
    "pairs": PairBatches([("team", "eamtay"), ("eat", "eatway"), ("oat", "oatway")], 2, seed=4),
}
"""
STATEMENT = f"""
import torch
from smearlens.data.batches import PaddedBatches, RepeatBatches, TokenBatches
from smearlens.data.pig_latin import PairBatches, pig_latin_pairs, split_pairs
sources = {SOURCES.strip()}
steps = (0, 5, 1_000_003, 5)
found = {{k: [{{n: t.tolist() for n, t in s.batch(step).items()}} for step in steps]
         for k, s in sources.items()}}
generator = torch.Generator().manual_seed(4)
split = split_pairs(pig_latin_pairs(max_letters=3), generator=generator).to_json()
"""


def test_equal_steps_are_equal_in_two_processes():
    here: dict = {}
    exec(STATEMENT, here)
    command = [sys.executable, "-c", STATEMENT + "print(split, found)"]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{here['split']} {here['found']}"
    for name, (first, fifth, late, fifth_again) in here["found"].items():
        assert isinstance(here["sources"][name], Batches)
        assert fifth == fifth_again
        assert len({str(first), str(fifth), str(late)}) > 1, name


# windows of tokens


def test_random_windows_are_slices_from_everywhere():
    """29 tokens hold 23 windows of 7: all start equally often."""
    batches, starts = TokenBatches(torch.arange(29), 5, 7, seed=1), Counter()
    for step in range(920):
        tokens = batches.batch(step)["tokens"]
        assert tokens.shape == (5, 7)
        assert tokens.equal(tokens[:, :1] + torch.arange(7))
        starts.update(tokens[:, 0].tolist())
    assert sorted(starts) == list(range(23))
    assert all(abs(n - 200) < 6 * 200**0.5 for n in starts.values())


@pytest.mark.parametrize(("n_tokens", "batch_size"), [(29, 3), (35, 2), (34, 9)])
def test_shuffled_windows_come_once_per_epoch(n_tokens, batch_size):
    batches = TokenBatches(torch.arange(n_tokens), batch_size, 7, seed=1, order="shuffled")
    n_windows = n_tokens // 7
    stream = torch.cat([batches.batch(step)["tokens"] for step in range(3 * n_windows)])
    assert stream.equal(stream[:, :1] + torch.arange(7))
    epochs = stream[:, 0].split(n_windows)
    assert all(sorted(epoch.tolist()) == list(range(0, 7 * n_windows, 7)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


@settings(max_examples=60, deadline=None)
@given(n_items=st.integers(1, 13), batch_size=st.integers(1, 17), seed=st.integers(0, 99))
def test_shuffled_batches_are_cuts_of_one_stream(n_items, batch_size, seed):
    stream = torch.cat([shuffled(n_items, 1, step, seed) for step in range(5 * batch_size)])
    for step in range(5):
        part = stream[step * batch_size : (step + 1) * batch_size]
        assert shuffled(n_items, batch_size, step, seed).equal(part)


def test_memory_and_file_give_the_same_windows(tmp_path):
    tokens = torch.randint(300, (173,))
    file = write_token_file(tmp_path / "tokens.bin", [tokens], 300)
    for order in ("random", "shuffled"):
        for step in range(5):
            in_memory, on_disk, narrow = (
                TokenBatches(t, 3, 11, seed=2, order=order).batch(step)["tokens"]
                for t in (tokens, file.tokens, tokens.to(torch.int16))
            )
            assert in_memory.equal(on_disk)
            assert in_memory.equal(narrow)
            assert on_disk.dtype == narrow.dtype == torch.int64


@settings(max_examples=100, deadline=None)
@given(n_tokens=st.integers(2, 60), length=st.integers(2, 17), batch_size=st.integers(1, 5))
def test_evaluation_counts_every_target_once(n_tokens, length, batch_size):
    tokens = torch.arange(n_tokens)
    for source in (tokens, tokens.numpy().astype(np.uint16)):
        windows = [w["tokens"] for w in evaluation_windows(source, length, batch_size)]
        assert all(w.equal(w[:, :1] + torch.arange(w.shape[1])) for w in windows)
        assert torch.cat([w[:, 1:].flatten() for w in windows]).equal(tokens[1:])
        assert all(w.shape[0] <= batch_size and 2 <= w.shape[1] <= length for w in windows)


# repeats and lines


def test_repeats_are_fresh_at_every_step():
    batches = RepeatBatches(batch_size=2, period=5, length=13, d_vocab=11, seed=0, bos=3)
    blocks = set()
    for step in range(50):
        tokens = batches.batch(step)["tokens"]
        assert tokens.shape == (2, 13)
        assert (tokens[:, 0] == 3).all()
        assert tokens[:, 1:8].equal(tokens[:, 6:])
        blocks.update(map(tuple, tokens[:, 1:6].tolist()))
    assert len(blocks) > 95


@pytest.mark.parametrize("pad", [0, 40])  # 40 is also a token
def test_padded_lines_equal_a_plain_loop(pad):
    batches = PaddedBatches(LINES, batch_size=5, length=4, pad=pad, seed=3)
    expected = []
    for line in LINES:
        tokens, mask = [], []
        for t in range(4):
            tokens.append(int(line[t]) if t < len(line) else pad)
            mask.append(t < len(line))
        expected.append((tokens, mask))
    batch = batches.batch(2)
    found = zip(batch["tokens"].tolist(), batch["loss_mask"].tolist(), strict=True)
    assert sorted(found) == sorted(expected)
    assert batches.n_targets == sum(sum(mask[1:]) for _, mask in expected) == 8
    assert batches.pad_fraction == pytest.approx(7 / 15)


def test_a_batch_without_a_target_is_found_beforehand():
    lines = [torch.arange(n) for n in (1, 3, 0, 1, 5)]
    found = {}
    for size in (1, 2, 3, 5):
        batches = PaddedBatches(lines, batch_size=size, length=4, pad=0, seed=2)
        masks = [batches.batch(step)["loss_mask"][:, 1:].any() for step in range(60)]
        found[size] = batches.batch_without_target(60)
        assert found[size] == (masks.index(False) if False in masks else None)
        assert found[size] is None or batches.batch_without_target(found[size]) is None
    assert found[2] is not None
    assert found[5] is None


def test_sizes_may_be_numbers_of_numpy(unchecked):
    found = RepeatBatches(2, np.int64(3), 7, 11, 0).batch(5)["tokens"]
    assert found.equal(RepeatBatches(2, 3, 7, 11, 0).batch(5)["tokens"])
    pair = RepeatBatches(2, (np.int64(3), np.int64(4)), 7, 11, 0).batch(5)["tokens"]
    assert pair.equal(RepeatBatches(2, (3, 4), 7, 11, 0).batch(5)["tokens"])


# token files


@pytest.mark.parametrize(("d_vocab", "itemsize"), [(7, 2), (2**16, 2), (2**16 + 1, 4), (2**31, 4)])
def test_a_token_file_gives_back_what_was_written(d_vocab, itemsize, tmp_path):
    chunks = [torch.randint(d_vocab, (n,)) for n in (5, 0, 11)] + [torch.tensor([0, d_vocab - 1])]
    path = tmp_path / "tokens.bin"
    written = write_token_file(path, (chunk for chunk in chunks), d_vocab)
    for file in (written, open_token_file(path), open_token_file(str(path), verify=False)):
        assert file.tokens.tolist() == torch.cat(chunks).tolist()
        assert file.tokens.itemsize == itemsize
        assert (file.path, file.d_vocab) == (path, d_vocab)
        assert file.sha256 == hashlib.sha256(path.read_bytes()[256:]).hexdigest()
    assert path.read_bytes()[:256].count(b"\n") == 1
    assert os.listdir(tmp_path) == ["tokens.bin"]
    with pytest.raises(ValueError, match="read-only"):
        written.tokens[0] = 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "tokens.bin"
    write_token_file(path, [torch.arange(5)], 7)
    for chunks, d_vocab, message in (
        (
            [torch.tensor([1]), torch.tensor([3, 7])],
            7,
            r"ids 3\.\.7, outside the vocabulary 0\.\.6",
        ),
        ([torch.tensor([-1, 2])], 7, r"ids -1\.\.2, outside the vocabulary"),
        ([torch.tensor([], dtype=torch.int64)], 7, "chunks hold no token: nothing to write"),
        ([torch.tensor([1])], 0, r"d_vocab must be in 1\.\.2\*\*32, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            write_token_file(path, chunks, d_vocab)
        assert open_token_file(path).tokens.tolist() == [0, 1, 2, 3, 4]
        assert os.listdir(tmp_path) == ["tokens.bin"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "smearlens tokens 1 of 265 bytes, expected 266"),
        (lambda raw: raw + b"\0", "smearlens tokens 1 of 267 bytes, expected 266"),
        (lambda raw: raw[:100], "tokens.bin is no whole token file"),
        (lambda raw: b"", "tokens.bin is no whole token file"),
        (lambda raw: os.urandom(300), "tokens.bin is no whole token file"),
        (lambda raw: b"[1, 2]" + b" " * 250, "tokens.bin is no whole token file"),
        (lambda raw: b"{}" + raw[2:], "tokens.bin is no whole token file"),
        (lambda raw: raw.replace(b"tokens 1", b"tokens 2"), "smearlens tokens 2 of 266 bytes"),
        (lambda raw: raw.replace(b"<u2", b"xx2"), "data type 'xx2' not understood"),
        (lambda raw: raw[:260] + bytes([raw[260] ^ 16]) + raw[261:], "its sha256 is not [0-9a-f]+"),
    ],
)
def test_a_damaged_token_file_is_refused(damage, message, tmp_path):
    path = tmp_path / "tokens.bin"
    write_token_file(path, [torch.arange(5)], 7)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorpusError, match=rf"(?s){message}.*: write it again"):
        open_token_file(path)


def test_a_missing_token_file_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"none\.bin is no whole token file \(.*No such file"):
        open_token_file(tmp_path / "none.bin")


# wrong arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TokenBatches(torch.arange(5), 0, 3, 0),
            ">= 1.*got batch_size=0, length=3, seed=0",
        ),
        (lambda: TokenBatches(torch.arange(5), 2, 1, 0), "length >= 2.*got batch_size=2, length=1"),
        (lambda: TokenBatches(torch.arange(5), 2, 3, -1), "seed >= 0.*length=3, seed=-1"),
        (
            lambda: TokenBatches(torch.arange(5), 2, 7, 0),
            r"at least 7 ids, got shape \(5,\), torch",
        ),
        (lambda: TokenBatches(torch.zeros(2, 9), 2, 7, 0), r"one sequence.*got shape \(2, 9\)"),
        (lambda: TokenBatches(torch.rand(9), 2, 7, 0), r"ids, got shape \(9,\), torch.float32"),
        (lambda: TokenBatches(torch.arange(9), 2, 7, 0, "sorted"), "'shuffled', got 'sorted'"),
        (lambda: TokenBatches(torch.arange(9), 2, 7, 0).batch(-1), "at least 0.*step=-1"),
        (lambda: shuffled(5, 2, -1, 0), "step must be at least 0, got -1"),
        (lambda: RepeatBatches(2, 9, 5, 11, 0), "period=9 leaves nothing to repeat in length=5"),
        (lambda: RepeatBatches(2, 3, 5, 11, -1), "seed >= 0.*seed=-1"),
        (
            lambda: PaddedBatches([], 2, 3, 0, 0),
            "need a line and a pad id >= 0, got 0 lines, pad=0",
        ),
        (lambda: PaddedBatches(LINES, 2, 3, -1, 0), "got 5 lines, pad=-1"),
        (lambda: PaddedBatches(LINES, 0, 3, 0, 0), "batch_size >= 1.*got batch_size=0"),
        (lambda: next(evaluation_windows(torch.arange(1), 3, 2)), r"at least 2 ids.*shape \(1,\)"),
        (lambda: next(evaluation_windows(torch.arange(9), 1, 2)), "length >= 2.*length=1"),
    ],
)
def test_wrong_arguments_are_explained(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


LIGHT = """
import sys
from smearlens.data import batches, corpora, pig_latin, synthetic, tokenizers
from smearlens.data.corpora import load_corpus
load_corpus("tiny-shakespeare")
heavy = {"datasets", "tokenizers", "pyarrow", "pandas", "scipy", "transformers", "transformer_lens"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_importing_the_data_package_loads_nothing_heavy():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
