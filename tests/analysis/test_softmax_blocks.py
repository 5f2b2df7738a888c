"""The engine of the streamed statistics: grouping of heads, hidden keys, memory, messages."""

import re
import subprocess
import sys

import pytest
import torch
from jaxtyping import config as jaxtyping_config

from smearlens.analysis.mixing import softmax_blocks
from smearlens.analysis.mixing.streaming import (
    diagonal,
    js_rows,
    log_normaliser,
    pattern_rows,
    row_statistics,
)

PER_HEAD = ("lse", "entropy", "distance", "span", "self_mass", "first_mass", "future_mass")


def random_qk(generator, query, key=None, dtype=torch.float64, sharp=2.0):
    """q and k as views of [batch pos head d_head], scores with a standard deviation of `sharp`."""
    q = torch.randn(2, query, 3, 5, generator=generator, dtype=dtype) * sharp
    k = torch.randn(2, query if key is None else key, 3, 5, generator=generator, dtype=dtype)
    return q.transpose(1, 2), k.transpose(1, 2)


def random_mask(generator, key):
    """Half of the keys hidden; the first sequence hides its first key."""
    mask = torch.rand(2, key, generator=generator) > 0.5
    mask[0, 0] = False
    return mask


def assert_same(actual, expected):
    for name in PER_HEAD:
        pair = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(*pair, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def unchecked():
    """Shapes unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


def test_garbage_in_unseen_keys_stays_unseen(generator):
    q, k = random_qk(generator, 9)
    mask = torch.arange(9).expand(2, 9) < 6
    clean = row_statistics(q, k, causal=True, key_mask=mask)
    k = k.clone()
    k[:, :, 6:] = torch.nan
    assert_same(row_statistics(q, k, causal=True, key_mask=mask), clean)
    unmasked = row_statistics(q, k, causal=True)
    for name in PER_HEAD:
        value = getattr(unmasked, name)
        assert not value[:, :, :6].isnan().any(), "a row must not feel a key that comes later"
        assert value[:, :, 6:].isnan().all(), "NaN must come out where NaN goes in"


def test_grouping_of_heads_changes_nothing(generator, monkeypatch):
    q, k = random_qk(generator, 140)
    mask = random_mask(generator, 140)
    whole = row_statistics(q, k, causal=True, key_mask=mask)
    for entries in (1, 2 * 128 * 140, 4 * 128 * 140):  # one head, two heads, one sequence at once
        monkeypatch.setattr(softmax_blocks, "ENTRIES", entries)
        assert_same(row_statistics(q, k, causal=True, key_mask=mask), whole)


def test_memory_grows_with_the_length_and_not_with_its_square():
    script = """
import re, torch
from pathlib import Path
from smearlens.analysis.mixing.streaming import row_statistics
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
q, k = torch.zeros(2, 1, 2, 8192, 16)
row_statistics(q[:, :, :256], k[:, :, :256], causal=True)
before = peak()
row_statistics(q, k, causal=True)
assert peak() - before < 40, peak() - before  # two patterns would be 512 MB
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((2, 7, 5), (2, 3, 7, 5), "q and k must be [batch head pos d_head], got [[2, 7, 5], [2, 3"),
        ((2, 6, 7, 5), (2, 3, 7, 5), "repeat_interleave the keys over dim 1"),
        ((2, 3, 7, 5), (2, 3, 7, 4), "q [2, 3, 7, 5] and k [2, 3, 7, 4] must agree in d_head"),
        ((2, 3, 7, 5), (2, 3, 0, 5), "there must be a key"),
    ],
)
def test_shapes_that_do_not_fit_are_explained(unchecked, q, k, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        row_statistics(torch.zeros(q), torch.zeros(k), causal=True)


def test_options_that_do_not_fit_are_explained(unchecked, generator):
    q, k = random_qk(generator, 7)
    lse = log_normaliser(q, k, causal=True)
    with pytest.raises(ValueError, match=re.escape("mass must lie between 0 and 1, exclusive")):
        row_statistics(q, k, causal=True, mass=1.0)
    with pytest.raises(
        TypeError, match=re.escape("key_mask must be bool, True where a key counts")
    ):
        row_statistics(q, k, causal=True, key_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match=re.escape("key_mask must be [batch key] = [2, 7], got")):
        pattern_rows(q, k, 0, 1, causal=True, key_mask=torch.ones(7, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=re.escape("lag=7 is outside 7 queries and 7 keys; allowed")
    ):
        diagonal(q, k, 7, lse, causal=True)
    with pytest.raises(ValueError, match=re.escape("lse must be [batch head query] = [2, 3, 7]")):
        diagonal(q, k, 1, lse[0], causal=True)
    with pytest.raises(ValueError, match=re.escape("rows 3..9 are not within the 7 queries")):
        pattern_rows(q, k, 3, 9, causal=True)
    with pytest.raises(ValueError, match="both patterns must have the same queries and keys"):
        js_rows(q, k, q[:, :, :3], k, causal=True)
