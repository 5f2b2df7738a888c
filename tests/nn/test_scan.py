"""The selective scan against a plain loop, its twin, float64 and numerical derivatives."""

import json
import os
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch.autograd import grad, gradcheck, gradgradcheck

from smearlens.nn.scan import (
    block_length,
    selective_scan,
    selective_scan_plain,
    selective_step,
)

RULES = ["mamba", "zoh", "bilinear"]
BOTH = pytest.mark.parametrize("scan", [selective_scan, selective_scan_plain])
EACH = pytest.mark.parametrize("rule", RULES)
BLOCK = 64  # of every small size


def inputs(batch, pos, channel, d_state, *, d_decay=None, dtype=torch.float64, state=True):
    """u, delta, A, B, C and, if `state`, the initial state; leaves that require grad."""
    shapes = [
        torch.randn(batch, pos, channel, dtype=dtype),
        torch.rand(batch, pos, channel, dtype=dtype) * 2,
        -torch.rand(channel, d_decay or d_state, dtype=dtype) * 3,
        torch.randn(batch, pos, d_state, dtype=dtype),
        torch.randn(batch, pos, d_state, dtype=dtype),
    ]
    if state:
        shapes.append(torch.randn(batch, channel, d_state, dtype=dtype))
    return [x.requires_grad_() for x in shapes]


def run(scan, tensors, rule):
    """`scan` on the list that `inputs` returns."""
    first = tensors[5] if len(tensors) == 6 else None
    return scan(*tensors[:5], rule=rule, initial_state=first)


@EACH
@BOTH
def test_equals_a_loop_over_every_index(scan, rule):
    u, delta, A, B, C, first = (x.detach() for x in inputs(2, 11, 3, 5))
    y, final = torch.zeros(2, 11, 3, dtype=u.dtype), first.clone()
    for b, t, c, n in product(range(2), range(11), range(3), range(5)):
        step, a = delta[b, t, c].item(), A[c, n].item()
        exact = torch.tensor([[a, 1.0], [0.0, 0.0]], dtype=u.dtype) * step
        decay, gain = {
            "mamba": lambda step, a, exact: (torch.matrix_exp(exact)[0, 0], step),
            "zoh": lambda step, a, exact: torch.matrix_exp(exact)[0],
            "bilinear": lambda step, a, exact: (
                (2 + step * a) / (2 - step * a),
                2 * step / (2 - step * a),
            ),
        }[rule](step, a, exact)
        final[b, c, n] = decay * final[b, c, n] + gain * B[b, t, n] * u[b, t, c]
        y[b, t, c] += C[b, t, n] * final[b, c, n]
    found = scan(u, delta, A, B, C, rule=rule, initial_state=first)
    torch.testing.assert_close(found, (y, final))


@EACH
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("d_decay", [5, 1])
@pytest.mark.parametrize("pos", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 149])
def test_twins_agree_in_value_and_every_gradient(rule, pos, d_decay, state):
    assert block_length(2, 3, 5) == BLOCK
    tensors = inputs(2, pos, 3, 5, d_decay=d_decay, state=state)
    weights = torch.randn(2, pos, 3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    fast, plain = (run(scan, tensors, rule) for scan in (selective_scan, selective_scan_plain))
    torch.testing.assert_close(fast, plain)
    both = [grad(result, tensors, weights) for result in (fast, plain)]
    torch.testing.assert_close(*both)


@EACH
def test_twins_agree_on_a_long_sequence_and_on_short_blocks(rule):
    assert block_length(3, 1021, 7) == 12
    for shape in [(1, 4096, 2, 3), (3, 29, 1021, 7)]:
        tensors = inputs(*shape, dtype=torch.float32)
        fast, plain = (
            run(scan, tensors, rule)[0] for scan in (selective_scan, selective_scan_plain)
        )
        assert (fast - plain).abs().max() < 3e-6 * plain.abs().max()
        weight = torch.randn_like(fast)
        for one, other in zip(
            grad(fast, tensors, weight), grad(plain, tensors, weight), strict=True
        ):
            assert (one - other).abs().max() < 3e-6 * other.abs().max()


@pytest.mark.parametrize("part", [0, 1])
def test_gradient_through_the_output_or_the_last_state_alone(part):
    tensors = inputs(2, 70, 3, 5)
    both = []
    for scan in (selective_scan, selective_scan_plain):
        result = run(scan, tensors, "zoh")[part].square().sum()
        both.append(grad(result, tensors, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*both)


@EACH
@pytest.mark.parametrize("d_decay", [3, 1])
def test_gradients_of_both_orders_are_numerical_derivatives(rule, d_decay):
    tensors = inputs(2, 3, 2, 3, d_decay=d_decay)
    assert gradcheck(lambda *x: run(selective_scan, x, rule), tensors)
    assert gradgradcheck(lambda *x: run(selective_scan, x, rule), tensors)


def test_second_derivative_when_one_input_comes_from_another():
    x = torch.rand(1, 3, 2, dtype=torch.float64, requires_grad=True)
    _, _, A, B, C = inputs(1, 3, 2, 2, state=False)
    y = selective_scan(x, x.square(), A, B, C)[0].square().sum()
    (first,) = grad(y, x, create_graph=True)
    torch.testing.assert_close(first, grad(y, x)[0])
    assert gradgradcheck(lambda u: selective_scan(u, u.square(), A, B, C)[0], [x])


def test_only_the_gradients_asked_for():
    tensors = [x.detach() for x in inputs(2, 11, 3, 5)]
    tensors[1].requires_grad_()
    y, _ = run(selective_scan, tensors, "mamba")
    y.sum().backward()
    assert [x.grad is None for x in tensors] == [True, False, True, True, True, True]
    with torch.no_grad():
        assert run(selective_scan, tensors, "mamba")[0].grad_fn is None


@EACH
@BOTH
def test_a_padded_position_is_skipped(scan, rule):
    *padded, first = (x.detach() for x in inputs(2, 9, 3, 5))
    kept = torch.tensor([0, 1, 3, 4, 7])
    pads = torch.tensor([2, 5, 6, 8])
    padded[1][:, pads] = 0
    short = [x[:, kept] if x.dim() == 3 else x for x in padded]
    y, final = scan(*padded, rule=rule, initial_state=first)
    expected = scan(*short, rule=rule, initial_state=first)
    torch.testing.assert_close((y[:, kept], final), expected, rtol=0, atol=0)


@EACH
@BOTH
def test_prefix_then_steps_equals_the_whole(scan, rule):
    *whole, first = (x.detach() for x in inputs(2, 83, 3, 5, dtype=torch.float32))
    y, final = scan(*whole, rule=rule, initial_state=first)
    cut = [x[:, :71] if x.dim() == 3 else x for x in whole]
    ys, state = scan(*cut, rule=rule, initial_state=first)
    ys = list(ys.unbind(1))
    for t in range(71, 83):
        u, delta, B, C = (whole[i][:, t] for i in (0, 1, 3, 4))
        before = state.clone()
        out, after = selective_step(u, delta, whole[2], B, C, state, rule)
        torch.testing.assert_close(state, before, rtol=0, atol=0)
        state = after
        ys.append(out)
    assert (torch.stack(ys, 1) - y).abs().max() < 1e-6 * y.abs().max()
    assert (state - final).abs().max() < 1e-6 * final.abs().max()


def test_inputs_of_any_memory_layout_and_zero_batch_strides():
    tensors = [x.detach() for x in inputs(3, 70, 2, 5)]
    strided = [torch.stack([x, -x], -1)[..., 0] for x in tensors]
    strided[3] = tensors[3][:1].expand(3, 70, 5)  # B shared by the batch
    tensors[3] = strided[3].contiguous()
    leaves = [[x.detach().requires_grad_() for x in given] for given in (tensors, strided)]
    results = [run(selective_scan, given, "zoh") for given in leaves]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*[grad(r[0].sum(), x) for r, x in zip(results, leaves, strict=True)])


@BOTH
def test_low_precision_runs_in_float32(scan):
    tensors = [x.detach() for x in inputs(2, 70, 3, 5, dtype=torch.float32)]
    low = [x.bfloat16() for x in tensors]
    y, final = run(scan, low, "mamba")
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    exact = run(scan, [x.float() for x in low], "mamba")
    torch.testing.assert_close(final, exact[1], rtol=0, atol=0)
    leaves = [x.requires_grad_() for x in tensors]
    plain = run(scan, leaves, "mamba")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(scan, leaves, "mamba"), plain, rtol=0, atol=0)
    one = [leaves[i][:, 0] for i in (0, 1, 3, 4)]
    y, state = selective_step(
        one[0].bfloat16(), one[1], leaves[2], one[2], one[3].bfloat16(), leaves[5]
    )
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_the_gradient_ignores_autocast():
    tensors = inputs(2, 70, 3, 5, dtype=torch.float32)
    y, _ = run(selective_scan, tensors, "zoh")
    expected = grad(y.sum(), tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(grad(y.sum(), tensors), expected, rtol=0, atol=0)


@BOTH
def test_time_per_element_does_not_grow_with_length(scan):
    def cost(batch, pos):
        tensors = inputs(batch, pos, 512, 16, dtype=torch.float32, state=False)
        start = time.process_time()
        grad(scan(*tensors)[0].sum(), tensors)
        return time.process_time() - start

    def ratio():
        times = [(cost(4, 64), cost(1, 256)) for _ in range(5)]  # equal batch · pos
        short, long = (min(column) for column in zip(*times, strict=True))
        return long / short

    cost(4, 64)  # warm up
    assert any(ratio() < 1.6 for _ in range(4))  # quadratic code has a ratio near 4, always


MEMORY = Path(__file__).with_name("scan_memory.py")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's VmHWM")
def test_peak_memory():
    """In a process of its own, where freed memory goes back to the system at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(MEMORY)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for case in json.loads(done.stdout):
        assert case["rise"] < case["bound"], case


@pytest.fixture
def unchecked():
    """Shapes unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@BOTH
@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (2, 0, 3), "u needs at least one position, got shape (2, 0, 3)"),
        (1, (2, 11, 5), "delta [batch pos channel] must be (2, 11, 3) to go with u (2, 11, 3)"),
        (2, (3, 2), "A [channel d_state] or [channel 1] must be (3, 5) or (3, 1) to go with"),
        (3, (2, 7, 5), "B [batch pos d_state] must be (2, 11, 5)"),
        (4, (2, 11, 7), "C [batch pos d_state] must be (2, 11, 5)"),
        (5, (2, 5, 3), "initial_state [batch channel d_state] must be (2, 3, 5)"),
    ],
)
def test_wrong_shapes_are_named(unchecked, scan, index, shape, message):
    tensors = [x.detach() for x in inputs(2, 11, 3, 5)]
    tensors[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(scan, tensors, "mamba")


@BOTH
def test_an_unknown_rule_is_named(scan):
    with pytest.raises(
        ValueError, match=re.escape("no discretisation rule 'zooh'; nearest: ['zoh']")
    ):
        run(scan, inputs(2, 11, 3, 5), "zooh")
