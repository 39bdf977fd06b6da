"""What all tests share: markers, named problems, and the one rule by which results are compared."""

import dataclasses
import importlib.util
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch2trt_adder import reference

# ---- markers

_MARKERS = {
    "gpu": "needs an NVIDIA GPU and a CUDA build of torch",
    "tensorrt": "needs the tensorrt package",
    "torch2trt": "needs the torch2trt package",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in _MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = {"gpu": torch.cuda.is_available()}
    there.update({name: importlib.util.find_spec(name) is not None for name in ("tensorrt", "torch2trt")})
    for item in items:
        for name, meaning in _MARKERS.items():
            if item.get_closest_marker(name) and not there[name]:
                item.add_marker(pytest.mark.skip(reason=meaning))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


# ---- CUDA graphs


def warm_up(step: Callable[[], object]) -> None:
    """Runs it three times on a stream of its own, as torch asks for before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


# ---- named problems

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: x [N, C, H, W], w [K, C / groups, R, S]."""

    name: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair, int]:
        return self.stride, self.padding, self.dilation, self.groups

    def tensors(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, w, b: normal draws, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(seed)
        sizes = (self.N, self.C, self.H, self.W), (self.K, self.C // self.groups, self.R, self.S), (self.K,)
        x, w, b = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
        return x.contiguous(memory_format=memory_format), w, b


# Odd sizes on purpose: none is a multiple of a tile.
CASES = [
    Case("pointwise", 2, 7, 5, 9, 5, 1, 1),
    Case("first_layer", 3, 1, 13, 11, 20, 5, 5),
    Case("three_by_three", 2, 16, 11, 9, 17, 3, 3, padding=(1, 1)),
    Case("stride_two", 3, 19, 15, 14, 33, 3, 3, stride=(2, 2), padding=(1, 1)),
    Case("per_axis", 2, 6, 17, 12, 10, 3, 2, stride=(2, 3), padding=(0, 2), dilation=(2, 1)),
    Case("stride_beyond_kernel", 2, 5, 14, 13, 6, 2, 1, stride=(3, 4)),
    Case("depthwise", 2, 23, 9, 10, 23, 3, 3, padding=(1, 1), groups=23),
    Case("depthwise_multiplier", 2, 5, 9, 10, 15, 3, 3, stride=(2, 1), groups=5),
    Case("groups", 1, 24, 7, 7, 36, 3, 3, padding=(1, 1), dilation=(1, 2), groups=3),
    Case("kernel_is_image", 131, 3, 4, 5, 7, 4, 5),
    Case("one_filter", 2, 5, 8, 8, 1, 3, 3),
    Case("one_row", 1, 3, 1, 37, 5, 1, 3, padding=(0, 1)),
    Case("mostly_padding", 1, 2, 3, 3, 3, 2, 2, padding=(4, 5)),
    Case("wide", 2, 512, 7, 7, 129, 3, 3, padding=(1, 1)),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# ---- the tolerance rule
# A sum of L terms in the precision e errs by at most 2 * e * sqrt(L) times the sum of |terms| (measured on normal
# draws: 0.46 * e * sqrt(L)), and rounding the result to its type by at most eps(type) relatively. All bounds are made
# of these two, and of one more where the input is float16 or bfloat16: its differences may be taken and added in
# float16, in which case none is rounded more than HALF_ROUNDINGS times (csrc/fprop/fprop_half.cu) by at most 2^-11 of itself, and a float32 weight once before that.
HALF_ROUNDINGS = 7
HALF_UNIT = 2.0**-11


def sum_eps(dtype: torch.dtype) -> float:
    """The precision of the sums: float32 whatever the type, except float64."""
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps


def bound(expected: Tensor, terms: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The largest error of a `dtype` result whose exact value sums `length` terms; `terms` is the sum of |terms|."""
    kind = torch.finfo(dtype)
    return kind.eps * (expected.abs() + kind.tiny) + 2 * sum_eps(dtype) * math.sqrt(length) * terms


def assert_within(actual: Tensor, expected: Tensor, limit: Tensor) -> None:
    """|actual - expected| <= limit everywhere; NaN and inf must be in the same places."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places"
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), "inf in other places"
    excess = (actual - expected).abs() - limit
    excess[~expected.isfinite()] = -1
    if excess.numel() > 0 and excess.max() > 0:
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{int((excess > 0).sum())} of {excess.numel()} values beyond the bound; at {at} {actual[at]:.9g} instead "
            f"of {expected[at]:.9g}, allowed {limit[at]:.3g}"
        )


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double() for t in tensors]


def assert_forward(y: Tensor, x: Tensor, w: Tensor, b: Tensor | None, geometry: tuple) -> None:
    """y = adder2d(x, w) + b within the bound of its dtype."""
    halves, rounded_weight = x.dtype in (torch.float16, torch.bfloat16), w.dtype is torch.float32
    x, w, b = doubles(x, w, b)
    distances = reference.adder2d(x, w, None, *geometry)
    expected, terms = distances, distances.abs()
    in_half = HALF_UNIT * (HALF_ROUNDINGS * terms + rounded_weight * w.abs().sum((1, 2, 3))[:, None, None]) * halves
    if b is not None:
        expected, terms = expected + b[:, None, None], terms + b[:, None, None].abs()
    assert_within(y, expected, bound(expected, terms, w[0].numel(), y.dtype) + in_half)


def assert_grad_input(dx: Tensor, dy: Tensor, x: Tensor, w: Tensor, geometry: tuple) -> None:
    """dx by the rule; its terms are dy times something of at most 1."""
    dy, x, w = doubles(dy, x, w)
    stride, padding, dilation, groups = geometry
    expected = reference.grad_input(dy, x, w, *geometry)
    terms = torch.nn.grad.conv2d_input(x.shape, torch.ones_like(w), dy.abs(), stride, padding, dilation, groups)
    assert_within(dx, expected, bound(expected, terms, w.numel() // groups, dx.dtype))


def assert_grad_weight(dw: Tensor, dy: Tensor, x: Tensor, w: Tensor, geometry: tuple, eta: float | None = 0.2) -> None:
    """dw by the rule, with the adaptive scaling unless `eta` is None; its terms are dy * x and dy * w."""
    dy, x, w = doubles(dy, x, w)
    stride, padding, dilation, groups = geometry
    exact = reference.grad_weight(dy, x, w, *geometry)
    terms = torch.nn.grad.conv2d_weight(x.abs(), w.shape, dy.abs(), stride, padding, dilation, groups)
    terms += w.abs() * dy.abs().sum((0, 2, 3))[:, None, None, None]
    length = dy.numel() // max(dy.shape[1], 1)
    if eta is None:
        return assert_within(dw, exact, bound(exact, terms, length, dw.dtype))
    expected = reference.adaptive_scaling(exact, eta)
    scale = eta * math.sqrt(exact.numel()) / exact.norm().clamp(min=1e-12)
    error = 2 * sum_eps(dw.dtype) * math.sqrt(length) * terms  # of the raw gradient; its norm moves the scale
    moved = expected.abs() * error.norm() / exact.norm().clamp(min=1e-12)
    assert_within(dw, expected, bound(expected, expected.abs(), exact.numel(), dw.dtype) + scale * error + moved)


def assert_grad_bias(db: Tensor, dy: Tensor) -> None:
    (dy,) = doubles(dy)
    expected = dy.sum((0, 2, 3))
    assert_within(db, expected, bound(expected, dy.abs().sum((0, 2, 3)), dy.numel() // dy.shape[1], db.dtype))
