"""The transforms of `torch.func` on every model: gradients per example, and forward mode."""

import pytest
import torch
from tests.models.zoo import every_model
from torch.func import functional_call, grad, jacrev, jvp, vmap

from smearlens import CharGPT, CharGPTConfig
from smearlens.nn.attention import SHORT
from smearlens.nn.discretize import RULES
from smearlens.nn.scan import selective_scan

# torch's own, of the first derivative in forward mode
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def of(variant):
    """The model in float64, its weights by name, and its mean loss of some sequences."""
    torch.manual_seed(0)
    model = variant.factory().double()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, inputs):
        return functional_call(model, weights, inputs, {"return_type": "loss"})

    return model, weights, loss


@every_model
def test_gradients_per_example_are_those_of_each_example_alone(variant):
    model, weights, loss = of(variant)
    inputs = variant.inputs

    def of_one(weights, *one):
        return loss(weights, tuple(x[None] for x in one))

    found = vmap(grad(of_one), (None, *(0 for _ in inputs)))(weights, *inputs)
    for example in range(len(inputs[0])):
        model.zero_grad()
        model(*(x[example : example + 1] for x in inputs), return_type="loss").backward()
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name][example], expected)


@every_model
def test_the_derivative_along_a_direction_is_the_slope(variant):
    _, weights, loss = of(variant)
    generator = torch.Generator().manual_seed(1)
    direction = {
        k: torch.randn(w.shape, generator=generator, dtype=w.dtype) for k, w in weights.items()
    }
    _, slope = jvp(lambda w: loss(w, variant.inputs), (weights,), (direction,))

    def along(step):
        return loss({k: w + step * direction[k] for k, w in weights.items()}, variant.inputs)

    torch.testing.assert_close(slope, (along(1e-6) - along(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)


@every_model
def test_the_hessian_along_a_direction_is_the_slope_of_the_gradient(variant):
    _, weights, loss = of(variant)
    generator = torch.Generator().manual_seed(4)
    direction = {
        k: torch.randn(w.shape, generator=generator, dtype=w.dtype) for k, w in weights.items()
    }
    slope = grad(lambda w: loss(w, variant.inputs))
    _, found = jvp(slope, (weights,), (direction,))  # forward over reverse, as `hessian`
    ahead, behind = (
        slope({k: w + step * direction[k] for k, w in weights.items()}) for step in (1e-6, -1e-6)
    )
    for name in weights:
        expected = (ahead[name] - behind[name]) / 2e-6
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_scans_in_forward_mode_and_over_a_batch_of_parameters(rule):
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [drawn(2, 5, 3), drawn(2, 5, 3).exp(), -drawn(3, 4).exp(), drawn(2, 5, 4)]
    inputs.append(drawn(2, 5, 4))
    direction = [drawn(*x.shape) for x in inputs]

    def run(*inputs):
        return selective_scan(*inputs, rule=rule)[0]

    _, slope = jvp(run, tuple(inputs), tuple(direction))
    ahead, behind = (
        run(*(x + step * d for x, d in zip(inputs, direction, strict=True)))
        for step in (1e-6, -1e-6)
    )
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-7)

    jacobians = jacrev(run, argnums=tuple(range(5)))(*inputs)
    total = sum(j.flatten(3) @ d.flatten() for j, d in zip(jacobians, direction, strict=True))
    torch.testing.assert_close(total, slope)

    u, delta, A, B, C = inputs
    rates = torch.stack([A, 2 * A, A / 3])
    together = vmap(lambda rate: run(u, delta, rate, B, C))(rates)
    for rate, y in zip(rates, together, strict=True):
        torch.testing.assert_close(y, run(u, delta, rate, B, C))


@pytest.mark.parametrize("d_vocab", [11, 8193])
def test_long_contexts_and_large_vocabularies_too(d_vocab):
    """Where the fused attention and the streamed loss would run, which torch cannot follow."""
    config = CharGPTConfig(d_vocab=d_vocab, d_model=6, n_heads=2, n_layers=1, n_ctx=SHORT + 9)
    model = CharGPT(config).double()
    tokens = torch.randint(d_vocab, (2, SHORT + 9), generator=torch.Generator().manual_seed(2))
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, one):
        return functional_call(model, weights, (one[None],), {"return_type": "loss"})

    found = vmap(grad(loss), (None, 0))(weights, tokens)
    model(tokens, return_type="loss").backward()  # equal lengths: the mean of both examples
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].mean(0), parameter.grad)
    jvp(lambda w: loss(w, tokens[0]), (weights,), (weights,))
