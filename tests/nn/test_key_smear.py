"""Smeared keys against their formula."""

from itertools import product

import pytest
import torch

from smearlens._hooks import HookedRootModule
from smearlens.nn.conv import KeySmear


class Hooked(HookedRootModule):
    """A root for one module, as a model is."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.setup()

    def forward(self, x):
        return self.layer(x)


def test_smeared_unit_keys_are_halves():
    keys = torch.eye(5)[None, :, None, :].repeat(2, 1, 3, 1)  # e_t at position t
    smeared = KeySmear(3)(keys)
    torch.testing.assert_close(smeared[:, 0], keys[:, 0], rtol=0, atol=0)
    for t in range(1, 5):
        torch.testing.assert_close(smeared[:, t], (keys[:, t] + keys[:, t - 1]) / 2)


def test_smearing_equals_its_formula_with_gradients(generator):
    module = KeySmear(3).double()
    module.alpha.data = torch.tensor([-2.0, 0.3, 7.0], dtype=torch.float64)
    keys = torch.randn(2, 5, 3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    expected = keys.detach().clone()
    for b, t, h in product(range(2), range(1, 5), range(3)):
        own = 1 / (1 + torch.exp(-module.alpha[h].detach()))
        expected[b, t, h] = own * keys[b, t, h] + (1 - own) * keys[b, t - 1, h]
    torch.testing.assert_close(module(keys), expected.detach())

    def smear(keys, alpha):
        return torch.func.functional_call(module, {"alpha": alpha}, keys)

    assert torch.autograd.gradcheck(smear, (keys, module.alpha))
    assert torch.autograd.gradgradcheck(smear, (keys, module.alpha))


@pytest.mark.parametrize(("value", "shift"), [(0.0, 0), (1.0, 1)])
def test_the_hooked_smear_weight_is_the_one_used(value, shift, generator):
    model = Hooked(KeySmear(3, alpha=0.4))
    keys = torch.randn(2, 5, 3, 7, generator=generator)
    _, cache = model.run_with_cache(keys)
    weight = torch.full((3,), 1 - 1 / (1 + torch.exp(torch.tensor(-0.4))))
    torch.testing.assert_close(cache["layer.hook_weight"], weight)
    hooks = [("layer.hook_weight", lambda w, hook: torch.full_like(w, value))]
    smeared = model.run_with_hooks(keys, fwd_hooks=hooks)
    torch.testing.assert_close(smeared[:, 1:], keys[:, 1 - shift : 5 - shift])
    torch.testing.assert_close(smeared[:, 0], keys[:, 0])


@pytest.mark.parametrize("pieces", [[1] * 5, [3, 2], [5]])
def test_smearing_piece_by_piece_equals_all_at_once(pieces, generator):
    module = KeySmear(3, alpha=-1.0)
    keys, state = torch.randn(2, 5, 3, 7, generator=generator), {}
    smeared = [module(piece, state=state) for piece in keys.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(smeared, dim=1), module(keys))


def test_half_precision_keys_stay_half_precision(generator):
    keys = torch.randn(2, 5, 3, 7, generator=generator).bfloat16()
    smeared = KeySmear(3)(keys)
    assert smeared.dtype == torch.bfloat16
    exact = (keys.float()[:, 1:] + keys.float()[:, :-1]) / 2
    torch.testing.assert_close(smeared[:, 1:].float(), exact, atol=0.02, rtol=0.02)


def test_no_heads_is_an_error():
    with pytest.raises(ValueError, match="n_heads must be at least 1, got 0"):
        KeySmear(0)
