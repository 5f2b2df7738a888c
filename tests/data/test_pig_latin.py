"""Pig Latin: the rule on published pairs, splits without leaks, batches against plain encoding."""

import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smearlens.data.corpora import CorpusError, load_corpus
from smearlens.data.pig_latin import (
    PairBatches,
    PairSplit,
    PigLatinVocabulary,
    contradictions,
    pig_latin_pairs,
    read_pairs,
    split_pairs,
    to_pig_latin,
)
from smearlens.data.tokenizers import Tokenizer

DATA = Path(os.environ.get("SMEARLENS_DATA", Path(__file__).parents[3] / "shared" / "data"))
WORDS = ["team", "eat", "try", "stranger", "by-and-by", "quick", "oat", "my"]
PAIRS = [(word, to_pig_latin(word)) for word in WORDS]
IDS = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz-")}


def published(name):
    path = DATA / "pig_latin" / name
    if not path.is_file():
        pytest.skip(f"needs pig_latin/{name} below SMEARLENS_DATA={DATA}")
    return read_pairs(path)


@pytest.fixture
def unchecked():
    """Shapes and types are not checked at run time, as for a user: our own messages come out."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def by_regular_expression(part):
    """The rule written another way: head, tail."""
    if re.match("[aeiou]", part):
        return part + "way"
    head, tail = re.fullmatch("((?:[^aeiouy]*qu(?<![aeiouy]qu))|[^aeiouy]*)(.*)", part).groups()
    return tail + head + "ay"


# the rule


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("team", "eamtay"),
        ("stranger", "angerstray"),
        ("quicker", "ickerquay"),
        ("square", "aresquay"),
        ("younger", "youngeray"),
        ("try", "ytray"),
        ("by-and-by", "ybay-andway-ybay"),
        ("my", "ymay"),
        ("eat", "eatway"),
        ("hmm", "hmmay"),
        ("q", "qay"),
        ("qu", "quay"),
        ("y", "yay"),
        ("u", "uway"),
        ("ask-", "askway-"),
        ("--", "--"),
    ],
)
def test_words_of_every_kind(word, expected):
    assert to_pig_latin(word) == expected


@settings(max_examples=300, deadline=None)
@given(st.text("aeiouyqubrst", min_size=1, max_size=9))
def test_the_rule_equals_its_regular_expression(part):
    assert to_pig_latin(part) == by_regular_expression(part)


@pytest.mark.parametrize(
    ("name", "n_pairs", "exceptions"),
    [
        ("pig_latin_small.txt", 3198, set()),
        ("pig_latin_data.txt", 6387, {("md", "mayday"), ("mp", "maypay")}),
    ],
)
def test_published_pairs_follow_the_rule(name, n_pairs, exceptions):
    pairs = published(name)
    assert len(pairs) == n_pairs
    assert {pair for pair in pairs if to_pig_latin(pair[0]) != pair[1]} == exceptions


def test_the_large_file_adds_words_that_leave_the_u_behind():
    large, toronto = published("pig_latin_large.txt.gz"), set(published("pig_latin_data.txt"))
    added = [pair for pair in large if pair not in toronto]
    assert (len(large), len(added)) == (22_402, 16_015)
    assert all(to_pig_latin(word, move_qu=False) == target for word, target in added)
    assert sum(to_pig_latin(word) != target for word, target in added) == 85
    twice = contradictions(large)
    assert len(twice) == 19
    assert {"md", "mp"} < set(twice)
    assert all("qu" in word for word in set(twice) - {"md", "mp"})


@pytest.mark.parametrize("word", ["", "Team", "it's", "two words", "naïve", "37"])
def test_other_words_are_refused(word):
    with pytest.raises(ValueError, match=f"word must consist of a-z and '-', got {word!r}: lower"):
        to_pig_latin(word)


# pairs


def test_generated_pairs_come_from_tiny_shakespeare():
    pairs = list(pig_latin_pairs())
    words = [word for word, _ in pairs]
    assert len(words) == 10_863
    assert words == sorted(set(words))
    text = f" {load_corpus('tiny-shakespeare', 'all').text.lower()} "
    for word in words[::97]:
        assert re.search(rf"[^a-z'-]{word}[^a-z'-]", text)
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    assert all(target == by_regular_expression(word) for word, target in pairs)
    chosen = list(pig_latin_pairs(min_letters=4, max_letters=6))
    assert chosen == [(word, target) for word, target in pairs if 4 <= len(word) <= 6]
    with pytest.raises(ValueError, match=r"no word has 16\.\.99 letters; the longest has 15"):
        pig_latin_pairs(min_letters=16)


def test_pairs_are_read_with_and_without_other_characters(tmp_path):
    path = tmp_path / "pairs.txt.gz"
    path.write_bytes(
        gzip.compress(b"team eamtay\n \nit's itway'say\nby-eat ybay-eatway\n37 37\n\n")
    )
    assert read_pairs(path) == [("team", "eamtay"), ("by-eat", "ybay-eatway")]
    assert len(read_pairs(path, alphabetic=False)) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("team eamtay\nteam\n", "pairs.txt, line 2: expected two words, got 'team'"),
        ("a b c\n", "pairs.txt, line 1: expected two words, got 'a b c'"),
        ("37 37\n", "pairs.txt holds no pair: expected a word and its translation"),
        ("", "pairs.txt is missing, cut off or damaged.*it is empty"),
        (None, "pairs.txt is missing, cut off or damaged.*No such file"),
    ],
)
def test_wrong_pair_files_are_explained(content, message, tmp_path):
    path = tmp_path / "pairs.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        read_pairs(path)


# splits


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_a_split_shares_no_word_and_loses_no_pair(share, generator):
    pairs = [*pig_latin_pairs(max_letters=4), ("quit", "uitqay"), ("quit", "itquay")]
    split = split_pairs(pairs, share, generator=generator)
    train, validation = ({word for word, _ in side} for side in (split.train, split.validation))
    assert not train & validation
    assert sorted(split.train + split.validation) == sorted(set(pairs))
    assert len(validation) == round(share * len(train | validation))
    assert contradictions(split.train + split.validation) == {"quit": ["itquay", "uitqay"]} or (
        contradictions(split.train + split.validation) == {"quit": ["uitqay", "itquay"]}
    )


def test_a_split_depends_on_the_seed_alone():
    first, shuffled, other = (
        split_pairs(pairs, 0.4, generator=torch.Generator().manual_seed(seed))
        for pairs, seed in ((PAIRS, 1), (PAIRS[::-1] * 2, 1), (PAIRS, 2))
    )
    assert first == shuffled != other
    assert PairSplit.from_json(first.to_json()) == first
    assert json.loads(first.to_json())["train"][0] == list(first.train[0])


def test_impossible_splits_are_refused(generator):
    for share in (0.0, 1.0, 0.01):
        with pytest.raises(
            ValueError, match=f"validation={share} of 8 words leaves one side empty"
        ):
            split_pairs(PAIRS, share, generator=generator)
    with pytest.raises(
        ValueError, match=r"no word in both, got 2 and 1 pairs, in both: \['team'\]"
    ):
        PairSplit((PAIRS[0], PAIRS[1]), (("team", "teamway"),))
    with pytest.raises(ValueError, match="got 1 and 0 pairs"):
        PairSplit((PAIRS[0],), ())


# vocabulary


@given(st.text("abcxyz-", max_size=12))
def test_words_survive_the_vocabulary(word):
    vocabulary = PigLatinVocabulary()
    ids = vocabulary.encode(word)
    assert ids.tolist() == [IDS[c] for c in word]
    assert vocabulary.decode(ids) == word
    assert vocabulary.decode([27, *ids.tolist(), 28, 5, 28]) == word
    assert vocabulary.tokens(ids) == list(word)


def test_the_vocabulary_is_a_tokenizer_of_29_symbols(unchecked):
    vocabulary = PigLatinVocabulary()
    assert isinstance(vocabulary, Tokenizer)
    assert vocabulary.d_vocab == 29
    assert vocabulary.tokens([vocabulary.sos, 26, vocabulary.eos]) == ["[SOS]", "-", "[EOS]"]
    with pytest.raises(ValueError, match="text must consist of a-z and '-', got 'It'"):
        vocabulary.encode("It")
    for wrong in (29, -1):
        with pytest.raises(ValueError, match=rf"tokens must be in 0\.\.28, got {wrong}"):
            vocabulary.tokens([3, wrong])


# batches


def ids(text):
    return [IDS[c] for c in text]


def seen_in_an_epoch(batches, epoch):
    """(source, target) of every line of an epoch."""
    n = batches.steps_per_epoch
    for step in range(epoch * n, (epoch + 1) * n):
        batch = batches.batch(step)
        yield from zip(batch["source"].tolist(), batch["target"].tolist(), strict=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_equal_lengths_show_each_pair_once_per_epoch(batch_size):
    pairs = [*pig_latin_pairs(max_letters=3)][:97] + PAIRS[:1]
    batches = PairBatches(pairs, batch_size, seed=5)
    expected = sorted(([*ids(word), 28], [27, *ids(target), 28]) for word, target in pairs)
    epochs = [list(seen_in_an_epoch(batches, epoch)) for epoch in (0, 1, 7)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert max(len(batches.batch(step)["source"]) for step in range(9)) <= batch_size


def test_a_batch_has_other_company_in_another_epoch():
    batches = PairBatches([*pig_latin_pairs(min_letters=5, max_letters=5)], 7, seed=5)
    first, second = (
        {
            frozenset(map(tuple, batches.batch(step)["source"].tolist()))
            for step in range(start, stop)
        }
        for start, stop in ((0, 20), (batches.steps_per_epoch, batches.steps_per_epoch + 20))
    )
    assert len(first | second) == 40


def test_batches_do_not_remember_what_was_asked_before():
    for options in ({}, {"padded": True}, {"layout": "joined"}):
        forward, backward = (PairBatches(PAIRS, 3, seed=2, **options) for _ in range(2))
        first = [forward.batch(step) for step in range(11)]
        for step in reversed(range(11)):
            again = backward.batch(step)
            assert first[step].keys() == again.keys()
            assert all(first[step][name].equal(again[name]) for name in again)


def test_padded_pairs_have_masks_for_what_is_real():
    batches = PairBatches(PAIRS, 5, seed=1, padded=True)
    assert batches.steps_per_epoch == 2
    seen = Counter()
    for step in range(8):  # 40 lines: five epochs of eight pairs
        batch = batches.batch(step)
        assert len(batch["source"]) == 5
        assert batch["loss_mask"].shape == batch["target"].shape
        for i in range(5):
            source = batch["source"][i][batch["source_mask"][i]].tolist()
            target = batch["target"][i, 1:][batch["loss_mask"][i, 1:]].tolist()
            assert source[-1] == target[-1] == 28
            assert (batch["source"][i][~batch["source_mask"][i]] == 28).all()
            assert (batch["target"][i, 1:][~batch["loss_mask"][i, 1:]] == 28).all()
            assert batch["target"][i, 0] == 27
            seen[PigLatinVocabulary().decode(source), PigLatinVocabulary().decode(target)] += 1
    assert seen == dict.fromkeys(PAIRS, 5)


@pytest.mark.parametrize("padded", [False, True])
def test_joined_lines_count_the_translation_only(padded):
    batches = PairBatches(PAIRS, 3, seed=1, layout="joined", padded=padded)
    found = set()
    for step in range(2 * batches.steps_per_epoch):
        batch = batches.batch(step)
        for line, mask in zip(batch["tokens"].tolist(), batch["loss_mask"].tolist(), strict=True):
            end = line.index(28)
            stop = line.index(28, end + 1)
            assert mask == [end < target <= stop for target in range(len(line))]
            assert set(line[stop:]) == {28}
            letters = "".join("abcdefghijklmnopqrstuvwxyz-"[i] if i < 27 else " " for i in line)
            found.add(tuple(letters.split()))
    assert found == set(PAIRS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, "need pairs, .* got 0 pairs"),
        ({"batch_size": 0}, "batch_size >= 1.* got 8 pairs, batch_size=0"),
        ({"seed": -1}, "seed >= 0.* got 8 pairs, batch_size=3, seed=-1"),
        ({"layout": "pairs"}, "layout 'pair' or 'joined', got .*layout='pairs'"),
        ({"pairs": [("It", "itway")]}, "text must consist of a-z and '-', got 'It'"),
    ],
)
def test_wrong_batches_are_explained(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        PairBatches(**({"pairs": PAIRS, "batch_size": 3, "seed": 0} | options))


@pytest.mark.parametrize("padded", [False, True])
def test_a_negative_step_is_refused(padded):
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        PairBatches(PAIRS, 3, seed=0, padded=padded).batch(-1)
