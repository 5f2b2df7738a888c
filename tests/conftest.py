"""Fixtures of all tests: a seeded torch, one thread, no network; the profiles of hypothesis."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SMEARLENS_PROGRESS", "0")

import pytest
import torch
from hypothesis import settings

# `gate` tries the same examples every time; `--hypothesis-profile=long` draws ten times as many.
settings.register_profile("gate", max_examples=200, derandomize=True, database=None, deadline=None)
settings.register_profile("long", max_examples=2000, database=None, deadline=None)
settings.load_profile("gate")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator():
    """A generator of the test's own."""
    return torch.Generator().manual_seed(0)
