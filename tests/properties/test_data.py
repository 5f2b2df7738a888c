"""Properties of tasks, batches, vocabularies and stored tokens."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.properties.strategies import fewer, generator, seeds, sizes

from smearlens.data.batches import (
    PaddedBatches,
    RepeatBatches,
    TokenBatches,
    evaluation_windows,
    shuffled,
)
from smearlens.data.corpora import load_corpus
from smearlens.data.pig_latin import (
    PairBatches,
    PairSplit,
    PigLatinVocabulary,
    contradictions,
    split_pairs,
    to_pig_latin,
)
from smearlens.data.shards import ShardedTokens
from smearlens.data.synthetic import (
    iid_tokens,
    multi_query_recall,
    repeated_random,
    repeated_tokens,
    step_generator,
)
from smearlens.data.token_files import open_token_file, write_token_file
from smearlens.data.tokenizers import ByteTokenizer, CharTokenizer, gpt2_tokenizer

words = st.text("aeiouybcqrst", min_size=1, max_size=8)


@given(sizes(1, 4), sizes(2, 6), sizes(2, 4), st.booleans(), seeds)
def test_blocks_hold_distinct_tokens_and_repeat_exactly(batch, period, repeats, bos, seed):
    start = seed % 9 if bos else None
    tokens = repeated_random(batch, period, repeats, 9, generator=generator(seed), bos=start)
    assert tokens.shape == (batch, period * repeats + bos)
    body = tokens[:, int(bos) :]
    if bos:
        assert bool((tokens[:, 0] == start).all())
        assert not bool((body == start).any())
    assert body.view(batch, repeats, period).unique(dim=1).shape[1] == 1
    assert all(len(set(row[:period])) == period for row in body.tolist())
    assert bool(((body >= 0) & (body < 9)).all())


@given(sizes(1, 6), sizes(2, 5), sizes(0, 3), seeds)
def test_drawn_periods_lie_in_their_range(batch, low, more, seed):
    length = 2 * (low + more) + 1
    tokens = repeated_tokens(batch, (low, low + more), length, 12, generator=generator(seed))
    for row in tokens.tolist():
        fitting = [p for p in range(1, length) if row[p:] == row[:-p]]
        assert low <= fitting[0] <= low + more


@given(sizes(1, 4), sizes(1, 4), sizes(0, 9), sizes(0, 5), st.booleans(), seeds)
def test_recall_asks_for_every_key_once_and_labels_its_value(batch, n, extra, spare, noise, seed):
    length, vocab = 4 * n + extra, 2 * n + 2 + spare
    tokens, labels = multi_query_recall(
        batch, length, n, vocab, generator=generator(seed), noise=noise
    )
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(row[0 : 2 * n : 2], row[1 : 2 * n : 2], strict=True))
        assert len(pairs) == n == len(set(pairs.values()))
        assert max(pairs) < vocab // 2 <= min(pairs.values())
        asked = [t for t in range(length) if label[t] != -100]
        assert min(asked) >= 2 * n
        assert sorted(row[t] for t in asked) == sorted(pairs)
        assert all(label[t] == pairs[row[t]] for t in asked)
        if not noise:
            assert not any(row[t] for t in range(2 * n, length) if t not in asked)


@given(sizes(1, 5), sizes(1, 9), sizes(1, 7), seeds)
def test_independent_tokens_are_tokens_and_the_generator_decides(batch, length, vocab, seed):
    tokens = iid_tokens(batch, length, vocab, generator=generator(seed))
    assert tokens.shape == (batch, length)
    assert bool(((tokens >= 0) & (tokens < vocab)).all())
    assert tokens.equal(iid_tokens(batch, length, vocab, generator=generator(seed)))


@given(sizes(0, 2**20), sizes(0, 10**6), sizes(1, 2**20))
def test_no_two_steps_share_a_stream(seed, step, later):
    one, other = step_generator(seed, step), step_generator(seed, step + later)
    assert one.initial_seed() != other.initial_seed()
    assert one.initial_seed() == step_generator(seed, step).initial_seed() < 2**32


@given(sizes(1, 13), sizes(1, 17), sizes(1, 4), sizes(0, 99))
def test_epochs_are_permutations_whatever_the_batch_size(n_items, batch, epochs, seed):
    steps = -(-epochs * n_items // batch)
    stream = torch.cat([shuffled(n_items, batch, step, seed) for step in range(steps)])
    for epoch in range(epochs):
        part = stream[epoch * n_items : (epoch + 1) * n_items]
        assert sorted(part.tolist()) == list(range(n_items))
    assert stream.equal(torch.cat([shuffled(n_items, 1, i, seed) for i in range(len(stream))]))


@given(
    sizes(2, 40), sizes(2, 9), sizes(1, 4), st.sampled_from(("random", "shuffled")), sizes(0, 99)
)
def test_windows_are_pieces_of_the_text(n_tokens, length, batch, order, seed):
    assume(length <= n_tokens)
    tokens = torch.arange(n_tokens)
    batches = TokenBatches(tokens, batch, length, seed, order=order)
    starts = []
    for step in range(3):
        windows = batches.batch(step)["tokens"]
        assert windows.shape == (batch, length)
        assert windows.equal(windows[:, :1] + torch.arange(length))
        assert windows.equal(batches.batch(step)["tokens"])
        starts += windows[:, 0].tolist()
        assert windows.max() < n_tokens
        parts = ShardedTokens([tokens[: n_tokens // 2].numpy(), tokens[n_tokens // 2 :].numpy()])
        assert TokenBatches(parts, batch, length, seed, order).batch(step)["tokens"].equal(windows)
    if order == "shuffled":
        assert all(start % length == 0 for start in starts)
        whole = n_tokens // length
        assert len(set(starts[:whole])) == min(whole, len(starts))


@given(sizes(2, 60), sizes(2, 17), sizes(1, 5))
def test_evaluation_counts_every_target_once(n_tokens, length, batch):
    windows = list(evaluation_windows(torch.arange(n_tokens), length, batch))
    targets = [t for w in windows for row in w["tokens"].tolist() for t in row[1:]]
    assert sorted(targets) == list(range(1, n_tokens))
    assert all(len(w["tokens"]) <= batch and w["tokens"].shape[1] <= length for w in windows)


@given(st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=6), sizes(2, 6),
       sizes(1, 4), sizes(0, 99))  # fmt: skip
def test_padding_is_masked_and_nothing_else_is(lines, length, batch, seed):
    batches = PaddedBatches(
        [torch.tensor(x, dtype=torch.int64) for x in lines], batch, length, 0, seed
    )
    real = sum(max(min(len(line), length) - 1, 0) for line in lines)
    assert batches.n_targets == real
    assert batches.pad_fraction == 1 - real / (len(lines) * (length - 1))
    seen = []
    for step in range(-(-len(lines) // batch)):
        given_ = batches.batch(step)
        assert given_["loss_mask"].equal(given_["tokens"] > 0)  # no line holds the pad
        seen += given_["tokens"].tolist()
    padded = [line[:length] + [0] * (length - len(line)) for line in lines]
    assert sorted(seen[: len(lines)]) == sorted(padded)


@given(sizes(1, 3), sizes(2, 4), sizes(0, 2), sizes(0, 99), sizes(0, 50))
def test_repeats_of_a_step_do_not_depend_on_other_steps(batch, low, more, seed, step):
    batches = RepeatBatches(batch, (low, low + more), 2 * (low + more) + 1, 12, seed)
    first = batches.batch(step)["tokens"]
    batches.batch(step + 1)
    assert first.equal(batches.batch(step)["tokens"])
    other = RepeatBatches(batch, (low, low + more), 2 * (low + more) + 1, 12, seed)
    assert first.equal(other.batch(step)["tokens"])


@given(st.text(max_size=40))
def test_texts_survive_every_tokenizer(text):
    text = text.encode("utf-8", "ignore").decode()  # no lone surrogates
    for tokenizer in (ByteTokenizer(), gpt2_tokenizer(), *([CharTokenizer(text)] if text else [])):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(tokenizer.tokens(ids)) == len(ids)
        assert not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.d_vocab


@given(st.text(min_size=1, max_size=20), st.text(max_size=20))
def test_a_vocabulary_of_characters_does_not_see_their_order(text, more):
    forth, back = CharTokenizer(text + more), CharTokenizer((text + more)[::-1])
    assert forth.characters == back.characters == "".join(sorted(set(text + more)))
    assert forth.encode(text).equal(back.encode(text))
    assert forth.encode(text + more).tolist() == [*forth.encode(text), *forth.encode(more)]


@given(words, words)
def test_pig_latin_keeps_the_letters_and_translates_parts_alone(one, other):
    assert to_pig_latin(f"{one}-{other}") == f"{to_pig_latin(one)}-{to_pig_latin(other)}"
    ending = "way" if one[0] in "aeiou" else "ay"
    found = to_pig_latin(one)
    assert found.endswith(ending)
    stem = found.removesuffix(ending)
    assert sorted(stem) == sorted(one)
    assert any(one == stem[i:] + stem[:i] for i in range(len(stem)))  # a rotation


@given(st.lists(st.tuples(words, words), min_size=4, max_size=20), st.floats(0.1, 0.9), seeds)
def test_a_split_has_every_pair_once_and_no_word_twice(pairs, share, seed):
    distinct = {word for word, _ in pairs}
    assume(0 < round(share * len(distinct)) < len(distinct))
    found = split_pairs(pairs, share, generator=generator(seed))
    assert sorted(found.train + found.validation) == sorted(set(pairs))
    held_out = {word for word, _ in found.validation}
    assert len(held_out) == round(share * len(distinct))
    again = split_pairs(pairs[::-1] + pairs, share, generator=generator(seed))
    assert again == found == PairSplit.from_json(found.to_json())
    double = contradictions(pairs)
    assert set(double) == {w for w in distinct if len({t for v, t in pairs if v == w}) > 1}


@given(st.lists(words, min_size=1, max_size=9, unique=True), sizes(1, 4), st.booleans(),
       st.sampled_from(("pair", "joined")), sizes(0, 99))  # fmt: skip
def test_batches_of_pairs_hold_each_once_an_epoch(found, batch, padded, layout, seed):
    pairs = [(word, to_pig_latin(word)) for word in found]
    batches = PairBatches(pairs, batch, seed, layout=layout, padded=padded)
    vocabulary, seen = PigLatinVocabulary(), []
    for step in range(batches.steps_per_epoch):
        given_ = batches.batch(step)
        first = given_["source" if layout == "pair" else "tokens"]
        assert len(first) <= batch
        for i, row in enumerate(first):
            word = vocabulary.decode(row)
            assert vocabulary.encode(word).equal(row[: len(word)])
            seen.append(word)
            if layout == "pair":
                assert vocabulary.decode(given_["target"][i]) == to_pig_latin(word)
            else:
                target = row[given_["loss_mask"][i]]
                assert vocabulary.decode(target) == to_pig_latin(word)
                assert int(target[-1]) == vocabulary.eos
    assert set(seen) == set(found)
    assert padded or len(seen) == len(found)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_sharded_tokens_are_indexed_as_one_array(lengths, data):
    whole = np.arange(sum(lengths)) * 3
    sharded = ShardedTokens(np.split(whole, np.cumsum(lengths)[:-1]))
    n = len(whole)
    assert len(sharded) == n
    place = data.draw(st.integers(-n, n - 1))
    assert sharded[place] == whole[place]
    cut = slice(*(data.draw(st.none() | st.integers(-n - 2, n + 2)) for _ in range(2)))
    assert sharded[cut].tolist() == whole[cut].tolist()
    index = np.array(data.draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=6)))
    assert sharded[index[:, None]].tolist() == whole[index[:, None]].tolist()


@fewer(0.5)
@given(st.lists(st.lists(st.integers(0, 70_000), max_size=9), min_size=1, max_size=4),
       st.sampled_from((70_001, 2**16)))  # fmt: skip
def test_stored_tokens_come_back(chunks, vocab):
    chunks = [[i % vocab for i in chunk] for chunk in chunks]
    assume(any(chunks))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tokens"
        write_token_file(path, [torch.tensor(c, dtype=torch.int64) for c in chunks], vocab)
        found = open_token_file(path)
        assert found.tokens.tolist() == [i for chunk in chunks for i in chunk]
        assert found.tokens.dtype.itemsize == (4 if vocab > 2**16 else 2)
        assert found.d_vocab == vocab


@given(st.text("ab é😀\n", min_size=90, max_size=120))
def test_the_splits_of_a_text_are_the_text(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes(text.encode())
        parts = [load_corpus(path, split).text for split in ("train", "validation", "test")]
        assert "".join(parts) == text == load_corpus(path, "all").text
        assert load_corpus(path, "all", max_chars=7).text == text[:7]
        assert abs(len(parts[0].encode()) - 0.9 * len(text.encode())) < 4
