"""Comparison of a network's outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def compare_outputs(
    got: list[Tensor], expected: list[Tensor], bounds: list[Tensor], fp16: bool, where: str = ""
) -> None:
    """Raises RuntimeError where an output of the engine is further from PyTorch's than its bound."""
    remedy = "try fp16_mode=False" if fp16 else "please report this network"
    for i, (y, y0, bound) in enumerate(zip(got, expected, bounds, strict=True)):
        if y.shape != y0.shape:
            raise RuntimeError(
                f"convert: output {i} of the engine is {list(y.shape)}, PyTorch's is {list(y0.shape)}{where}; {remedy}."
            )
        y, y0 = y.double(), y0.double()
        finite = y0.isfinite()
        lost = int((finite & ~y.isfinite()).sum())
        if lost > 0:
            raise RuntimeError(
                f"convert: {lost} of {y.numel()} values in output {i} of the engine are infinite or NaN, where "
                f"PyTorch's are finite{where}; {remedy}."
            )
        y, y0 = y[finite], y0[finite]
        if y.numel() == 0:
            continue
        difference, largest, limit = (y - y0).abs().max().item(), y0.abs().max().item(), bound.item()
        if difference > limit:
            raise RuntimeError(
                f"convert: output {i} of the engine differs from PyTorch's by up to {difference:.3g}{where}, beyond the "
                f"{limit:.3g} that rounding explains (largest value {largest:.3g}); {remedy}."
            )


def resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` cut or repeated in each axis: values as they are, for comparisons at another size."""
    for axis, extent in enumerate(shape):
        tensor = tensor.index_select(axis, torch.arange(extent, device=tensor.device) % tensor.shape[axis])
    return tensor


def tensor_leaves(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
