"""Joint components of token losses: against numpy, on a planted plane, and what is refused."""

import numpy as np
import pytest
import torch

from smearlens.analysis.loss_paths import loss_paths


@pytest.fixture
def losses(generator):
    """Two models with 5 and 7 checkpoints on 11 tokens."""
    return {
        name: 3 + torch.randn(n, 11, generator=generator).cumsum(0)
        for name, n in {"one": 5, "other": 7}.items()
    }


def test_paths_are_those_of_numpy_on_all_rows_together(losses):
    found = loss_paths(losses, n_components=3)
    rows = np.concatenate([each.numpy().astype(float) for each in losses.values()])
    u, s, vt = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    signs = np.where(vt[:3].sum(1) < 0, -1, 1)
    expected = (u[:, :3] * s[:3]) * signs
    np.testing.assert_allclose(found.paths["one"], expected[:5], atol=1e-10)
    np.testing.assert_allclose(found.paths["other"], expected[5:], atol=1e-10)
    np.testing.assert_allclose(found.components, vt[:3] * signs[:, None], atol=1e-10)
    np.testing.assert_allclose(found.explained, s[:3] ** 2 / (s**2).sum(), atol=1e-12)
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-12)


def test_the_fit_is_joint(losses):
    alone = loss_paths({"one": losses["one"]}).paths["one"]
    together = loss_paths(losses).paths["one"]
    assert not torch.allclose(alone, together, atol=0.1)


def test_a_planted_plane_is_found_with_its_variance(generator):
    basis, _ = torch.linalg.qr(torch.rand(13, 2, generator=generator, dtype=torch.float64))
    basis = basis * basis.sum(0).sign()
    inside = torch.randn(17, 2, generator=generator, dtype=torch.float64)
    inside = torch.linalg.qr(inside - inside.mean(0))[0] * torch.tensor([3.0, 1.0])
    found = loss_paths({"m": 2 + inside @ basis.T})
    torch.testing.assert_close(found.components, basis.T)
    torch.testing.assert_close(found.paths["m"], inside)
    torch.testing.assert_close(
        found.explained, torch.tensor([0.9, 0.1]).double(), atol=1e-6, rtol=0
    )


def test_a_random_walk_alone_has_the_shares_that_the_docstring_names(generator):
    walk = torch.randn(200, 5000, generator=generator).cumsum(0)
    explained = loss_paths({"walk": walk}).explained
    torch.testing.assert_close(explained, torch.tensor([0.608, 0.152]).double(), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("change", "n_components", "message"),
    [
        ({"other": torch.ones(7, 12)}, 2, r"same tokens, got .*\(5, 11\).*\(7, 12\)"),
        ({"other": torch.full((7, 11), torch.nan)}, 2, "77 of 132 are not finite"),
        ({}, 12, r"n_components must be in 1\.\.11, the smaller of 12 checkpoints and 11 tokens"),
        ({}, 0, r"n_components must be in 1\.\.11.*got 0"),
    ],
)
def test_impossible_losses_are_named(losses, change, n_components, message):
    with pytest.raises(ValueError, match=message):
        loss_paths(losses | change, n_components=n_components)


def test_checkpoints_that_are_all_alike_have_no_components():
    with pytest.raises(ValueError, match="differ between checkpoints"):
        loss_paths({"m": torch.ones(3, 5)})
