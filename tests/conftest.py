"""Fixtures of all tests: a seeded torch, one thread, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SMEARLENS_PROGRESS", "0")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator():
    """A generator of the test's own."""
    return torch.Generator().manual_seed(0)
