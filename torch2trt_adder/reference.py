"""The adder2d operator and AdderNet's gradient rule in plain torch, written for reading: the specification.

Everything here keeps the dtype of its inputs; call it in float64 to get something to compare with. It unfolds the input
(R * S times its size) and holds one filter's terms at a time, so it is meant for small shapes.

Notation: input x [N, C, H, W], weight w [K, C / groups, R, S], output y [N, K, P, Q].
Source: AdderNet: Do We Really Need Multiplications in Deep Learning? (CVPR 2020, arXiv 1912.13200).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def adder2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """y[n,k,p,q] = bias[k] - sum over c,r,s of |x - w[k,c,r,s]|; a tap in the padding reads x = 0 and adds |w|."""
    columns = _columns(input, weight, stride, padding, dilation, groups)
    filters = weight.flatten(1)  # [K, CRS]
    per_group = len(filters) // groups
    maps = [-(columns[:, k // per_group] - w[:, None]).abs().sum(1) for k, w in enumerate(filters)]
    output = torch.stack(maps, 1).view(_output_shape(input, weight, stride, padding, dilation))
    return output if bias is None else output + bias[:, None, None]


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """dx = sum over the taps that read x of dy * clamp(w - x, -1, 1). The derivative would have sign(w - x) there."""
    columns = _columns(input, weight, stride, padding, dilation, groups)
    grad_maps = grad_output.flatten(2)  # [N, K, PQ]
    filters = weight.flatten(1)
    per_group = len(filters) // groups
    grad_columns = torch.zeros_like(columns)
    for k, w in enumerate(filters):
        grad_columns[:, k // per_group] += grad_maps[:, k, None] * (w[:, None] - columns[:, k // per_group]).clamp(
            -1, 1
        )
    sizes = _pair(dilation), _pair(padding), _pair(stride)
    return F.fold(grad_columns.flatten(1, 2), input.shape[2:], weight.shape[2:], *sizes)


def grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """dw = sum over n,p,q of dy * (x - w), before `adaptive_scaling`. The derivative would have sign(x - w) there."""
    columns = _columns(input, weight, stride, padding, dilation, groups)
    grad_maps = grad_output.flatten(2)
    filters = weight.flatten(1)
    per_group = len(filters) // groups
    rows = [
        (grad_maps[:, k, None] * (columns[:, k // per_group] - w[:, None])).sum((0, 2)) for k, w in enumerate(filters)
    ]
    return torch.stack(rows).view_as(weight)


def adaptive_scaling(grad_weight: Tensor, eta: float = 0.2) -> Tensor:
    """eta * sqrt(number of elements) * dw / |dw|_2: the local learning rate of the paper (equation 12), per layer."""
    norm: Tensor = grad_weight.norm().clamp(min=1e-12)
    return grad_weight * (eta * math.sqrt(grad_weight.numel()) / norm)


def _columns(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """What every output pixel reads: [N, groups, CRS, PQ]."""
    columns = F.unfold(input, weight.shape[2:], _pair(dilation), _pair(padding), _pair(stride))
    return columns.view(len(columns), groups, columns.shape[1] // groups, columns.shape[2])


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _output_shape(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[int, ...]:
    # The operator has the shapes of a convolution.
    meta = F.conv2d(input[:, :1].to("meta"), weight[:, :1].to("meta"), None, stride, padding, dilation)
    return tuple(meta.shape)
