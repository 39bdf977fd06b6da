"""The comparer, the tolerance rule, and the comparisons with the definition that are made of both."""

import math

import pytest
import torch
from torch import Tensor

from torch2trt_adder import reference
from torch2trt_adder.nn.proof import difference
from torch2trt_adder.numerics import comparison, definition, tolerance

INF, NAN = math.inf, math.nan
MOST = torch.finfo(torch.float32).max
PLAIN = (1, 1), (0, 0), (1, 1), 1


# ---- the comparer


@pytest.mark.parametrize(
    "expected, actual, agrees",
    [
        (1.0, 1.5, {"same", "saturate", "ignore"}),
        (1.0, 2.5, set()),
        (1.0, NAN, set()),
        (1.0, INF, set()),
        (NAN, NAN, {"same", "saturate", "ignore"}),
        (NAN, 1.0, {"ignore"}),
        (NAN, INF, {"ignore"}),
        (INF, INF, {"same", "saturate", "ignore"}),
        (INF, MOST, {"saturate", "ignore"}),
        (INF, 1.0, {"ignore"}),
        (INF, -INF, {"ignore"}),
        (INF, NAN, {"ignore"}),
        (-INF, -MOST, {"saturate", "ignore"}),
        (MOST, INF, set()),
    ],
)
@pytest.mark.parametrize("nonfinite", ["same", "saturate", "ignore"])
def test_nan_and_infinities(nonfinite: comparison.NonFinite, expected: float, actual: float, agrees: set[str]) -> None:
    """The table in compare's docstring, the value among others that agree."""
    y, y0 = torch.tensor([[0.0, actual], [2.0, 3.0]]), torch.tensor([[0.0, expected], [2.0, 3.0]])
    mismatch = comparison.compare(y, y0, 1.0, nonfinite)
    assert (mismatch is None) == (nonfinite in agrees)
    if mismatch is not None:
        assert mismatch.measure is not None and "[0, 1]" in mismatch.text("y", "here", "there")


def test_the_worst_value_is_the_one_furthest_beyond_its_own_limit() -> None:
    y0 = torch.zeros(2, 3)
    y = torch.tensor([[5.0, 0.1, 0.0], [0.0, -2.0, 1.0]])
    limit = torch.tensor([[6.0, 1.0, 1.0], [1.0, 0.5, 0.9]])
    mismatch = comparison.compare(y, y0, limit)
    assert mismatch is not None and mismatch.kind == "limit" and mismatch.measure is not None
    found = mismatch.measure
    assert (found.index, found.actual, found.expected, found.limit) == ((1, 1), -2.0, 0.0, 0.5)
    assert (found.difference, found.beyond, found.compared, found.total) == (2.0, 2, 6, 6)
    text = mismatch.text("output 3", "the engine", "PyTorch", " for a batch of 2")
    assert text.startswith(
        "output 3 differs between the engine and PyTorch by up to 2 for a batch of 2, beyond the 0.5"
    )


def test_shapes_and_dtypes() -> None:
    y = torch.zeros(2, 3)
    shape = comparison.compare(y, torch.zeros(3, 2), 1.0)
    assert shape is not None and shape.kind == "shape"
    assert shape.text("y", "here", "there") == "y is [2, 3] in here and [3, 2] in there"
    assert comparison.compare(y, y.half(), 1.0) is None
    dtype = comparison.compare(y, y.half(), 1.0, same_dtype=True)
    assert dtype is not None and dtype.kind == "dtype" and "torch.float16" in dtype.expected


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    assert comparison.compare(torch.zeros(shape), torch.zeros(shape), 0.0) is None
    mismatch = comparison.compare(torch.ones(shape), torch.zeros(shape), 0.5)
    assert (mismatch is None) == (0 in shape)
    lost = comparison.compare(torch.full(shape, NAN), torch.zeros(shape), 0.5)
    assert (lost is None) == (0 in shape)


def test_other_types_and_a_limit_that_is_not_a_number() -> None:
    yes, no = torch.tensor([True, True]), torch.tensor([True, False])
    assert comparison.compare(yes, yes, 0.0, "saturate") is None and comparison.compare(yes, no, 0.0) is not None
    assert comparison.compare(torch.tensor([1, 2]), torch.tensor([1, 4]), 1.0, "saturate") is not None
    assert comparison.compare(torch.ones(1), torch.ones(1), NAN) is not None


def test_resized_values_keep_their_structure() -> None:
    x = torch.arange(6.0).view(2, 3)
    values = {"a": (x, 3), "b": [x]}
    other = comparison.resized(values, [(1, 3), (4, 2)])
    assert torch.equal(other["a"][0], x[:1]) and other["a"][1] == 3
    assert torch.equal(other["b"][0], x[[0, 1, 0, 1]][:, :2])


# ---- the rule


@pytest.mark.parametrize("length", [27, 576, 4608])
def test_the_rule_holds_float32_sums_and_finds_one_wrong_tap(length: int) -> None:
    terms = torch.randn(64, length, generator=torch.Generator().manual_seed(0)).abs()
    total = terms.double().sum(1)
    sequential = torch.zeros(64)
    for term in terms.unbind(1):
        sequential += term
    limit = tolerance.bound(total, total, length, torch.float32)
    assert comparison.compare(sequential, total, limit) is None
    assert ((total / length) > limit).all()  # one tap of the mean size
    assert tolerance.relative_error(length, torch.float32) * total.max() >= limit.max() * (1 - 1e-6)


def test_float64_sums_are_held_to_float64() -> None:
    assert tolerance.sum_error(4, torch.float64) == 4 * torch.finfo(torch.float64).eps
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert tolerance.sum_error(4, dtype) == 4 * torch.finfo(torch.float32).eps


# ---- the definition


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, b and dy of a layer of 144 terms."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 16, 6, 5), (4, 16, 3, 3), (4,), (2, 4, 4, 3)
    x, w, b, dy = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, w, b, dy


def test_the_definition_itself_is_right_and_a_change_of_it_is_not() -> None:
    x, w, b, dy = problem()
    exact = [t.double() for t in (x, w, dy)]
    y = reference.adder2d(*exact[:2], b.double()).float()
    dx, raw = reference.grad_input(exact[2], *exact[:2]).float(), reference.grad_weight(exact[2], *exact[:2])
    dw, db = reference.adaptive_scaling(raw).float(), dy.double().sum((0, 2, 3)).float()
    checks = [
        (y, lambda t: definition.assert_forward(t, x, w, b, PLAIN)),
        (dx, lambda t: definition.assert_grad_input(t, dy, x, w, PLAIN)),
        (dw, lambda t: definition.assert_grad_weight(t, dy, x, w, PLAIN)),
        (raw.float(), lambda t: definition.assert_grad_weight(t, dy, x, w, PLAIN, None)),
        (db, lambda t: definition.assert_grad_bias(t, dy)),
    ]
    for result, check in checks:
        check(result)
        wrong = result.clone()
        wrong.flatten()[-1] += 1e-3 * wrong.abs().max()
        with pytest.raises(AssertionError, match=r"differs between actual and expected .* beyond"):
            check(wrong)
        wrong.flatten()[0] = NAN
        with pytest.raises(AssertionError, match="NaN only in actual"):
            check(wrong)


def test_the_input_gradient_is_bounded_by_its_own_number_of_terms() -> None:
    """K / groups * R * S terms, however many channels there are: here one, which a few roundings must not exceed."""
    x, w, dy = torch.zeros(1, 256, 2, 2), torch.full((1, 256, 1, 1), 2.0), torch.ones(1, 1, 2, 2)
    assert definition.grad_input_terms(w, 1) == 1
    assert definition.grad_input_terms(torch.zeros(6, 4, 3, 2), 2) == 3 * 3 * 2
    definition.assert_grad_input(torch.ones_like(x), dy, x, w, PLAIN)
    with pytest.raises(AssertionError, match="beyond"):
        definition.assert_grad_input(torch.ones_like(x) + 8 * torch.finfo(torch.float32).eps, dy, x, w, PLAIN)


def test_halves_may_be_rounded_seven_times_more() -> None:
    x, w, b, _ = problem(torch.float16)
    distances = reference.adder2d(x.double(), w.double())
    for roundings, holds in ((6.5, True), (10.0, False)):
        y = (distances * (1 + roundings * tolerance.HALF_UNIT) + b.double()[:, None, None]).float()
        if holds:
            definition.assert_forward(y, x, w, b, PLAIN)
        else:
            with pytest.raises(AssertionError, match="beyond"):
                definition.assert_forward(y, x, w, b, PLAIN)
    with pytest.raises(AssertionError, match="beyond"):
        definition.assert_forward(
            (distances * (1 + 6.5 * tolerance.HALF_UNIT)).float(), x.float(), w.float(), None, PLAIN
        )


# ---- two outputs of one layer


def test_outputs_of_a_layer_differ_by_rounding_only() -> None:
    x, w, b, _ = problem()
    y = reference.adder2d(x, w, b)
    length = w[0].numel()
    assert difference(y, reference.adder2d(x.double(), w.double(), b.double()), b, length) is None
    assert difference(y.half(), y, b, length) is None
    lost, infinite = y.clone(), y.clone()
    lost[0, 0, 0, 0], infinite[0, 0, 0, 0] = NAN, -INF
    assert difference(lost, infinite, b, length) is None  # nothing can be told of it
    for output, kind in ((lost, "nonfinite"), (y * 1.001, "limit"), (y[:, :3], "shape"), (y.half(), "dtype")):
        mismatch = difference(output, y, b, length, same_dtype=True)
        assert mismatch is not None and mismatch.kind == kind
    bias = -reference.adder2d(x, w)[0, :, 0, 0]  # it cancels the first sums
    cancelled = reference.adder2d(x, w, bias)
    assert difference(cancelled, reference.adder2d(x.double(), w.double(), bias.double()), bias, length) is None
