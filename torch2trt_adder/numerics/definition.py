"""Comparison of a layer's results with the definition (reference.py) in float64, by the rule of tolerance.py.

Notation: input x [N, C, H, W], weight w [K, C / groups, R, S], bias b [K], output y [N, K, P, Q]; dx, dw, db and dy are
their gradients. All functions raise AssertionError with the worst value.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import grad

from .. import reference
from .comparison import assert_within
from .tolerance import bound, half_error, sum_error

Extents = int | Sequence[int]
Geometry = tuple[Extents, Extents, Extents, int]  # stride, padding, dilation, groups


def assert_forward(y: Tensor, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> None:
    """y = adder2d(x, w) + b within the bound of its dtype."""
    half, rounded_weight = x.dtype in (torch.float16, torch.bfloat16), w.dtype is torch.float32
    x, w = _double(x), _double(w)
    distances = reference.adder2d(x, w, None, *geometry)
    expected, terms = distances, distances.abs()
    weights = w.abs().sum((1, 2, 3))[:, None, None] if rounded_weight else 0.0
    more = half_error(terms, weights) if half else 0.0
    if b is not None:
        bias = _double(b)[:, None, None]
        expected, terms = expected + bias, terms + bias.abs()
    assert_within(y, expected, bound(expected, terms, w[0].numel(), y.dtype) + more)


def assert_grad_input(dx: Tensor, dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> None:
    """dx by AdderNet's rule; its K / groups * R * S terms are dy times a factor of at most 1."""
    dy, x, w = _double(dy), _double(x), _double(w)
    stride, padding, dilation, groups = geometry
    expected = reference.grad_input(dy, x, w, *geometry)
    ones = torch.ones_like(w)
    terms = grad.conv2d_input(x.shape, ones, dy.abs(), stride, padding, dilation, groups)
    assert_within(dx, expected, bound(expected, terms, grad_input_terms(w, groups), dx.dtype))


def grad_input_terms(w: Tensor, groups: int) -> int:
    """How many terms one value of dx sums: K / groups * R * S."""
    return w.numel() // max(w.shape[1], 1) // groups


def assert_grad_weight(
    dw: Tensor, dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, eta: float | None = 0.2
) -> None:
    """dw by AdderNet's rule, with adaptive scaling unless `eta` is None; its N * P * Q terms are dy * x and dy * w."""
    dy, x, w = _double(dy), _double(x), _double(w)
    stride, padding, dilation, groups = geometry
    exact = reference.grad_weight(dy, x, w, *geometry)
    terms = grad.conv2d_weight(x.abs(), w.shape, dy.abs(), stride, padding, dilation, groups)
    terms += w.abs() * dy.abs().sum((0, 2, 3))[:, None, None, None]
    length = dy.numel() // max(dy.shape[1], 1)
    if eta is None:
        assert_within(dw, exact, bound(exact, terms, length, dw.dtype))
        return
    expected = reference.adaptive_scaling(exact, eta)
    norm = exact.norm().clamp(min=1e-12)
    scale = eta * math.sqrt(exact.numel()) / norm
    error = sum_error(length, dw.dtype) * terms  # of the raw gradient; its norm moves the scale
    moved = expected.abs() * error.norm() / norm
    assert_within(dw, expected, bound(expected, expected.abs(), exact.numel(), dw.dtype) + scale * error + moved)


def assert_grad_bias(db: Tensor, dy: Tensor) -> None:
    """db [K], the sum of dy over its N * P * Q terms."""
    dy = _double(dy)
    expected = dy.sum((0, 2, 3))
    assert_within(db, expected, bound(expected, dy.abs().sum((0, 2, 3)), dy.numel() // max(dy.shape[1], 1), db.dtype))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()
