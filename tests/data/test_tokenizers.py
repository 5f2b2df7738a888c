"""Tokenizers: round trips, GPT-2's published ids, and what they say to wrong input."""

import json
import os
import re
import string
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smearlens.data.corpora import load_corpus
from smearlens.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    gpt2_tokenizer,
)

DATA = Path(os.environ.get("SMEARLENS_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ALL = [CharTokenizer(string.printable), ByteTokenizer(), gpt2_tokenizer()]


@pytest.fixture
def unchecked():
    """Shapes and types are not checked at run time, as for a user: our own messages come out."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def published_vocabulary():
    path = DATA / "gpt2" / "vocab.json"
    if not path.is_file():
        pytest.skip(f"needs gpt2/vocab.json below SMEARLENS_DATA={DATA}")
    return json.loads(path.read_text())


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_every_text_survives_the_round_trip(text):
    own = [CharTokenizer(text)] if text else []
    for tokenizer in (*own, ByteTokenizer(), gpt2_tokenizer()):
        ids = tokenizer.encode(text)
        assert ids.dtype == torch.int64
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids.tolist()) == text


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_tokens_are_printable_and_one_per_id(text):
    for tokenizer in (ByteTokenizer(), gpt2_tokenizer()):
        ids = tokenizer.encode(text)
        pieces = tokenizer.tokens(ids)
        assert len(pieces) == len(ids)
        assert all(piece.isprintable() and piece.strip() for piece in pieces)


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: type(t).__name__)
def test_the_protocol_is_kept(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert len(tokenizer.encode("")) == 0
    assert tokenizer.decode([]) == ""


def test_characters_are_numbered_in_sorted_order():
    tokenizer = CharTokenizer("hello 日本\n")
    assert tokenizer.characters == "".join(sorted(set("hello 日本\n")))
    for i, character in enumerate(tokenizer.characters):
        assert tokenizer.encode(character * 3).tolist() == [i] * 3
    assert CharTokenizer(tokenizer.characters).characters == tokenizer.characters
    assert tokenizer.tokens(tokenizer.encode("o \n日")) == ["o", "·", "↵", "日"]


def test_tiny_shakespeare_has_65_characters():
    text = load_corpus("tiny-shakespeare", "all").text
    tokenizer = CharTokenizer(text)
    assert tokenizer.d_vocab == 65
    assert (
        tokenizer.characters == "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
    )
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_are_those_of_utf8():
    assert ByteTokenizer().encode("né日").tolist() == list("né日".encode())
    assert ByteTokenizer().decode([110, 0xFF, 110]) == "n\ufffdn"
    assert ByteTokenizer().tokens([9, 10, 32, 65, 0]) == ["⇥", "↵", "·", "A", "\\x00"]


def test_gpt2_gives_the_published_ids():
    tokenizer = gpt2_tokenizer()
    assert tokenizer.d_vocab == 50257
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.end_of_text == 50256
    assert tokenizer.encode("a<|endoftext|>a").tolist() == [64, 50256, 64]
    assert tokenizer.decode([64, 50256]) == "a<|endoftext|>"
    assert gpt2_tokenizer() is tokenizer


def test_gpt2_vocabulary_equals_the_published_one():
    assert GPT2Tokenizer().vocabulary == published_vocabulary()


def test_gpt2_vocabulary_holds_every_byte_and_every_merge():
    vocabulary = gpt2_tokenizer().vocabulary
    assert sorted(vocabulary.values()) == list(range(50257))
    assert {gpt2_tokenizer().decode([i]) for i in range(256)} >= set(map(chr, range(128)))
    assert vocabulary["Ġ"] == 220  # the space
    assert vocabulary["Ġt"] == 256  # the first merge


def test_a_long_text_encodes_as_its_whole():
    text = load_corpus("tiny-shakespeare", "validation", max_chars=60_000).text
    tokenizer = gpt2_tokenizer()
    assert tokenizer.encode(text).tolist() == tokenizer._backend.encode(text).ids


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab '  \n\t.1é\u3000\x1c\x85"), max_size=60))
def test_parts_encode_as_their_whole(text):
    from smearlens.data.tokenizers import _split_at_spaces

    parts, tokenizer = _split_at_spaces(text, 3), gpt2_tokenizer()
    assert "".join(parts) == text
    separately = [i for part in parts for i in tokenizer._backend.encode(part).ids]
    assert separately == tokenizer._backend.encode(text).ids


def test_long_texts_are_really_cut():
    from smearlens.data.tokenizers import _split_at_spaces

    assert _split_at_spaces("aa bb  cc dd", 1) == ["aa", " bb  cc", " dd"]


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([1, 99999, 2], ValueError, r"tokens\[1\] is 99999, outside the vocabulary 0\.\."),
        ([3, 2, -1], ValueError, r"tokens\[2\] is -1, outside the vocabulary"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, r"one sequence, got shape \(2, 3\)"),
        (torch.zeros(3), TypeError, "tokens must be integers, got float32"),
        ([0.5], TypeError, "tokens must be integers, got float64"),
    ],
)
def test_wrong_tokens_are_named(tokenizer, tokens, error, message, unchecked):
    for method in (tokenizer.decode, tokenizer.tokens):
        with pytest.raises(error, match=message):
            method(tokens)


def test_an_unknown_character_is_named_with_its_place():
    tokenizer = CharTokenizer("abd")
    for text, place, character in (("abcd", 2, "c"), ("e", 0, "e"), ("ab\U0001f600", 2, "😀")):
        expected = f"text[{place}] is {character!r}, which is not among the 3 characters"
        with pytest.raises(ValueError, match=re.escape(expected)):
            tokenizer.encode(text)


def test_other_wrong_texts_are_refused():
    with pytest.raises(ValueError, match="text is empty: a vocabulary needs"):
        CharTokenizer("")


@pytest.mark.parametrize("make", [ByteTokenizer, gpt2_tokenizer])
def test_half_a_surrogate_pair_is_named_with_its_place(make):
    with pytest.raises(ValueError, match=r"^text\[3\] is '\\ud800', half of a surrogate pair"):
        make().encode("né \ud800 \udfff")
