"""The comparison of a result with the expected one."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NonFinite = Literal["same", "saturate", "ignore"]


@dataclasses.dataclass(frozen=True)
class Measure:
    """How far one tensor is from another of the same shape; see `measure`."""

    index: tuple[int, ...]  # where |actual - expected| exceeds its limit most, or comes closest to it
    actual: float  # these three: there, NaN where no pair of values was compared
    expected: float
    limit: float
    difference: float  # |actual - expected| there; 0 where no pair of values was compared
    largest: float  # of |expected|, of the finite values
    compared: int  # pairs of finite values
    beyond: int  # of these, those that differ by more than their limit
    lost: int  # values that are finite only in `expected`
    misplaced: int  # `lost`, and the NaN and infinities that `nonfinite` does not allow
    first_misplaced: tuple[int, ...]  # the index of the first of these
    total: int  # values of each tensor


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Why two tensors do not agree."""

    kind: Literal["shape", "dtype", "nonfinite", "limit"]
    actual: str  # what differs: the shape, the dtype, or the value at the worst place
    expected: str
    measure: Measure | None = None  # of the kinds "nonfinite" and "limit"

    def text(self, name: str, first: str, second: str, where: str = "") -> str:
        """One clause, such as "output 0 differs between the engine and PyTorch by up to 0.2, beyond ...".

        Args:
            name: of the tensor.
            first: where `actual` comes from.
            second: where `expected` comes from.
            where: words about the circumstances; they begin with a space.
        """
        found = self.measure
        if found is None:
            return f"{name} is {self.actual} in {first} and {self.expected} in {second}{where}"
        if self.kind == "nonfinite":
            place = f"only in {first}" if found.misplaced == found.lost else f"and not the same in {first} and {second}"
            return (
                f"{name} is infinite or NaN {place} at {found.misplaced} of {found.total} places{where} ({self.actual} "
                f"instead of {self.expected} at {list(found.first_misplaced)})"
            )
        return (
            f"{name} differs between {first} and {second} by up to {found.difference:.3g}{where}, beyond the "
            f"{found.limit:.3g} that rounding explains ({self.actual} instead of {self.expected} at {list(found.index)}, "
            f"{found.beyond} of {found.total} values beyond their limits, largest value {found.largest:.3g})"
        )


def compare(
    actual: Tensor,
    expected: Tensor,
    limit: Tensor | float,
    nonfinite: NonFinite = "same",
    same_dtype: bool = False,
) -> Mismatch | None:
    """What tells `actual` from `expected` beyond `limit`, or None where they agree.

    Values are compared in float64. NaN and infinities are never within a limit; `nonfinite` says what they may be:

    ========== ===================== ================================ ========================== ======================
    nonfinite  where expected is NaN where expected is an infinity    where expected is finite   used for
    ========== ===================== ================================ ========================== ======================
    "same"     actual is NaN         actual is the same infinity      actual is finite           tests, benchmarks
    "saturate" actual is NaN         actual is it, or the dtype's     actual is finite           exported files: a
                                     largest number within `limit`                               runtime may saturate
    "ignore"   actual is anything    actual is anything               actual is finite           engines, layers
    ========== ===================== ================================ ========================== ======================

    Args:
        actual: any shape and dtype.
        expected: the same shape.
        limit: the largest |actual - expected|: a number, or a tensor that broadcasts to the shape.
        nonfinite: see the table.
        same_dtype: tensors of different dtypes do not agree.
    """
    mismatch = compare_form(actual, expected, same_dtype)
    if mismatch is not None:
        return mismatch
    found = measure(actual, expected, limit, nonfinite)
    if found.misplaced:
        at = found.first_misplaced
        return Mismatch("nonfinite", f"{actual[at].item():.6g}", f"{expected[at].item():.6g}", found)
    if found.beyond:
        return Mismatch("limit", f"{found.actual:.9g}", f"{found.expected:.9g}", found)
    return None


def compare_form(actual: Tensor, expected: Tensor, same_dtype: bool = False) -> Mismatch | None:
    """The part of `compare` that looks at shapes and, with `same_dtype`, at dtypes."""
    if same_dtype and actual.dtype is not expected.dtype:
        return Mismatch("dtype", f"{actual.dtype} {list(actual.shape)}", f"{expected.dtype} {list(expected.shape)}")
    if actual.shape != expected.shape:
        return Mismatch("shape", str(list(actual.shape)), str(list(expected.shape)))
    return None


def measure(actual: Tensor, expected: Tensor, limit: Tensor | float, nonfinite: NonFinite = "same") -> Measure:
    """The differences of two tensors of one shape; the arguments are those of `compare`."""
    y, y0 = actual.detach().double(), expected.detach().double()
    if nonfinite == "saturate" and expected.is_floating_point():
        most = torch.finfo(expected.dtype).max
        y, y0 = torch.where(y0.isinf(), y.clamp(-most, most), y), y0.clamp(-most, most)
    finite = y0.isfinite()
    lost = finite & ~y.isfinite()
    misplaced = lost
    if nonfinite != "ignore":
        misplaced = lost | (y0.isnan() != y.isnan()) | (y0.isinf() & (y != y0))
    pairs = finite & ~lost
    difference = (y - y0).abs()
    limits = torch.as_tensor(limit, dtype=torch.float64, device=y.device).expand(y.shape)
    beyond = pairs & ~(difference <= limits)  # beyond a limit that is NaN as well
    compared = int(pairs.sum())
    at: tuple[int, ...] = ()
    if compared:
        at = _index((difference - limits).where(pairs, -torch.inf).argmax(), y.shape)
    return Measure(
        index=at,
        actual=y[at].item() if compared else torch.nan,
        expected=y0[at].item() if compared else torch.nan,
        limit=limits[at].item() if compared else torch.nan,
        difference=difference[at].item() if compared else 0.0,
        largest=largest(y0),
        compared=compared,
        beyond=int(beyond.sum()),
        lost=int(lost.sum()),
        misplaced=int(misplaced.sum()),
        first_misplaced=_index(misplaced.byte().argmax(), y.shape) if misplaced.any() else (),
        total=y.numel(),
    )


def largest(tensor: Tensor) -> float:
    """The largest |value| of the finite ones; 0 where there are none."""
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _index(flat: Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat, shape))


def assert_within(actual: Tensor, expected: Tensor, limit: Tensor | float) -> None:
    """Raises AssertionError unless `compare` finds the tensors equal within `limit`, NaN and infinities included."""
    mismatch = compare(actual, expected, limit)
    if mismatch is not None:
        raise AssertionError(mismatch.text("the result", "actual", "expected"))


# ---- nested values and other sizes


def resized(values: Any, shapes: Iterable[Sequence[int]]) -> Any:
    """A nested structure whose tensors are cut or repeated in each axis to `shapes`: the same values at another size."""
    shape = iter(shapes)
    return tree_map(lambda leaf: _resized(leaf, next(shape)) if isinstance(leaf, Tensor) else leaf, values)


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, extent in enumerate(shape):
        tensor = tensor.index_select(axis, torch.arange(extent, device=tensor.device) % tensor.shape[axis])
    return tensor


def tensor_leaves(values: Any) -> list[Tensor]:
    """The tensors in a nested structure (lists, tuples, dicts), in its order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
