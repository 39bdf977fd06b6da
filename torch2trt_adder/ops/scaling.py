"""AdderNet's adaptive scaling of the weight gradient."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import sum_dtype


def adaptive_scaling(grad_weight: Tensor, eta: float) -> Tensor:
    """eta * sqrt(numel) * dw / |dw|, the published code's learning rate per layer; in float32 at least."""
    scaled = grad_weight.to(sum_dtype(grad_weight.dtype), copy=True)
    adaptive_scaling_([scaled], eta)
    return scaled


def adaptive_scaling_(gradients: Sequence[Tensor], eta: float) -> None:
    """`adaptive_scaling` of each, in place: one launch a gradient, and three for all of a device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (_, dtype), group in groups.items():
        sums = [t.to(sum_dtype(dtype)) for t in group]
        divisors = torch._foreach_norm(sums)
        torch._foreach_clamp_min_(divisors, 1e-12)
        torch._foreach_div_(divisors, [eta * math.sqrt(t.numel()) for t in group])
        torch._foreach_div_(sums, divisors)
        for gradient, scaled in zip(group, sums, strict=True):
            if scaled is not gradient:
                gradient.copy_(scaled)
