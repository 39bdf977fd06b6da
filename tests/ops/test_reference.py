"""reference.py against loops over the formula, and against autograd where rule and derivative coincide."""

import itertools
import math

import pytest
import torch
from conftest import CASES, Case

from torch2trt_adder import reference

SMALL = [
    Case("plain", 2, 3, 4, 5, 2, 3, 2),
    Case("per_axis", 1, 2, 6, 5, 3, 2, 2, stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
    Case("groups", 2, 4, 3, 3, 6, 2, 2, padding=(1, 0), groups=2),
    Case("depthwise", 1, 3, 4, 4, 3, 3, 3, padding=(1, 1), groups=3),
]


def terms(case, size):
    """Every (n, k, p, q), (n, c, h, w), (k, c, r, s) of the sum; the position in x is None in the padding."""
    (sh, sw), (ph, pw), (dh, dw), groups = case.geometry
    N, K, P, Q = size
    per_group = case.C // groups
    for n, k, p, q, c, r, s in itertools.product(*map(range, (N, K, P, Q, per_group, case.R, case.S))):
        h, w = p * sh - ph + r * dh, q * sw - pw + s * dw
        inside = 0 <= h < case.H and 0 <= w < case.W
        channel = k // (K // groups) * per_group + c
        yield (n, k, p, q), (n, channel, h, w) if inside else None, (k, c, r, s)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_formulas(case):
    x, w, b = case.tensors(torch.float64)
    y = reference.adder2d(x, w, b, *case.geometry)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = b[None, :, None, None].expand(y.shape).clone()
    dx, dw = torch.zeros_like(x), torch.zeros_like(w)
    for out, tap, filter in terms(case, y.shape):
        value = x[tap] if tap else torch.zeros((), dtype=torch.float64)
        expected[out] -= (value - w[filter]).abs()
        dw[filter] += dy[out] * (value - w[filter])
        if tap:
            dx[tap] += dy[out] * (w[filter] - value).clamp(-1, 1)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.grad_input(dy, x, w, *case.geometry), dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.grad_weight(dy, x, w, *case.geometry), dw, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
def test_rule_is_the_derivative_at_unit_distance(case):
    """With w = 1 and x in {0, 2} (padding: 0) every |x - w| is 1, where x - w = sign(x - w) = clamp(x - w)."""
    x, w, _ = case.tensors(torch.float64)
    x, w = (2 * (x > 0).double()).requires_grad_(), torch.ones_like(w).requires_grad_()
    y = reference.adder2d(x, w, None, *case.geometry)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    with torch.no_grad():
        torch.testing.assert_close(reference.grad_input(dy, x, w, *case.geometry), dx, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(reference.grad_weight(dy, x, w, *case.geometry), dw, rtol=1e-12, atol=1e-12)


def test_adaptive_scaling():
    gradient = torch.randn(7, 3, 2, 2, dtype=torch.float64)
    scaled = reference.adaptive_scaling(gradient)
    assert math.isclose(scaled.norm(), math.sqrt(gradient.numel()) / 5, rel_tol=1e-12)
    torch.testing.assert_close(scaled / scaled.norm(), gradient / gradient.norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(reference.adaptive_scaling(1e6 * gradient), scaled, rtol=1e-12, atol=0)
    assert reference.adaptive_scaling(torch.zeros_like(gradient)).eq(0).all()
