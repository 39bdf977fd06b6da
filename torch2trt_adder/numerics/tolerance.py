"""The tolerance rule: how far a correct result of one layer may be from the exact one. See docs/numerics.md.

A sequential sum of L terms of one sign errs by at most 0.46 * eps * sqrt(L) of its value, measured on normal draws for
L from 27 to 9216. The rule allows 2 * eps * sqrt(L) of the sum of |terms|, and eps of the result's dtype for rounding it.
"""

import math

import torch
from torch import Tensor

# GPU kernels may take and add differences of float16 and bfloat16 inputs as float16. They round no term more often than
# this (csrc/fprop/fprop_half.cu counts), each time by at most HALF_UNIT of itself.
HALF_ROUNDINGS = 7
HALF_UNIT = 2.0**-11


def sum_error(length: int, dtype: torch.dtype = torch.float32) -> float:
    """The largest error of a sum of `length` terms, relative to the sum of |terms|.

    Sums are float32 for every `dtype` except float64.
    """
    eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    return 2 * eps * math.sqrt(length)


def relative_error(length: int, dtype: torch.dtype) -> float:
    """The largest error of a float32 sum of `length` terms that is rounded to `dtype`, relative to the sum of |terms|.

    The sum is float32 for float64 results as well: third-party layers and the exported ONNX body compute it so.
    """
    return torch.finfo(dtype).eps + sum_error(length)


def bound(expected: Tensor, terms: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The largest error of each value of a result of this package.

    Args:
        expected: the exact values, float64, any shape.
        terms: the sum of |terms| of each value, float64, of the same shape.
        length: the number of terms of one value.
        dtype: of the result.
    """
    kind = torch.finfo(dtype)
    return kind.eps * (expected.abs() + kind.tiny) + sum_error(length, dtype) * terms


def half_error(distances: Tensor, rounded_weight: Tensor | float = 0.0) -> Tensor:
    """The additional error of a forward pass whose input is float16 or bfloat16.

    Args:
        distances: the sum of |x - w| of each output, any shape.
        rounded_weight: the sum of |w| of each output where a float32 weight is rounded to float16 first, else 0.
    """
    return HALF_UNIT * (HALF_ROUNDINGS * distances + rounded_weight)
