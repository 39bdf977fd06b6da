"""The operators of ``torch.ops.torch2trt_adder``: their schemas, and fakes that compute shapes only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..utils import arguments
from .checks import (
    check_grad_size,
    check_grad_tensors,
    check_tensors,
    memory_format,
    output_size,
    sum_dtype,
)

# ---- schemas
# No defaults but of the last eta: the dispatcher strips arguments equal to a default, and each Python kernel has to repeat
# them.

library = torch.library.Library("torch2trt_adder", "DEF")
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_TAGS = (torch.Tag.pt2_compliant_tag,)
library.define(f"adder2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor", tags=_TAGS)

# The same operator with another scaling of its weight gradient. Autograd turns it into adder2d, so that what leaves
# training (exported graphs, engines) knows one operator without training's options.
library.define(f"adder2d_eta(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, float? eta) -> Tensor", tags=_TAGS)
library.define(
    f"adder2d_grad_input(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}) -> Tensor", tags=_TAGS
)
library.define(
    f"adder2d_grad_weight(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}, float? eta=None) -> Tensor",
    tags=_TAGS,
)
adder2d_op: "torch._ops.OpOverload[..., Tensor]" = torch.ops.torch2trt_adder.adder2d.default
adder2d_eta_op: "torch._ops.OpOverload[..., Tensor]" = torch.ops.torch2trt_adder.adder2d_eta.default
grad_input_op: "torch._ops.OpOverload[..., Tensor]" = torch.ops.torch2trt_adder.adder2d_grad_input.default
grad_weight_op: "torch._ops.OpOverload[..., Tensor]" = torch.ops.torch2trt_adder.adder2d_grad_weight.default


# ---- fake (shapes only): meta tensors, torch.compile, torch.export


def adder2d_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    check_tensors(input, weight, bias)
    size = output_size(
        input.shape, weight.shape, None if bias is None else bias.shape, stride, padding, dilation, groups
    )
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def _adder2d_eta_fake(*options: Any) -> Tensor:
    *adder2d_options, eta = options
    arguments.check_eta("adder2d_eta", eta)
    return adder2d_fake(*adder2d_options)


def _grad_fake(caller: str, grad_output: Tensor, input: Tensor, weight: Tensor, *geometry: Any) -> None:
    check_grad_tensors(caller, grad_output, input, weight)
    check_grad_size(caller, grad_output.shape, output_size(input.shape, weight.shape, None, *geometry))


def _grad_input_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _grad_fake("adder2d_grad_input", grad_output, input, weight, stride, padding, dilation, groups)
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def _grad_weight_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eta: float | None = None,
) -> Tensor:
    arguments.check_eta("adder2d_grad_weight", eta)
    _grad_fake("adder2d_grad_weight", grad_output, input, weight, stride, padding, dilation, groups)
    dtype = sum_dtype(weight.dtype)
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=memory_format(weight))


torch.library.register_fake("torch2trt_adder::adder2d", adder2d_fake, lib=library)
torch.library.register_fake("torch2trt_adder::adder2d_eta", _adder2d_eta_fake, lib=library)
torch.library.register_fake("torch2trt_adder::adder2d_grad_input", _grad_input_fake, lib=library)
torch.library.register_fake("torch2trt_adder::adder2d_grad_weight", _grad_weight_fake, lib=library)
