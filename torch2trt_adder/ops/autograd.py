"""Autograd and autocast of the operator. The gradients are AdderNet's rule, not the derivative."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..utils import arguments
from .checks import ETA, sum_dtype
from .fastpath import Kernels, find_kernels
from .schema import adder2d_eta_op, adder2d_op, grad_input_op, grad_weight_op, library

# ---- autograd


class _Adder2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        eta: float | None,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry = stride, padding, dilation, groups
        ctx.eta = eta
        ctx.bias_dtype = None if bias is None else bias.dtype
        return kernel(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        # With create_graph the operators refuse a second derivative.
        kernels = None if torch.is_grad_enabled() else find_kernels(grad_output, input, weight)
        _, compute_grad_input, compute_grad_weight = _OPERATORS if kernels is None else kernels
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_input = compute_grad_input(grad_output, input, weight, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            grad_weight = compute_grad_weight(grad_output, input, weight, *ctx.geometry, ctx.eta).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_output.sum((0, 2, 3), dtype=sum_dtype(ctx.bias_dtype)).to(ctx.bias_dtype)
        return None, grad_input, grad_weight, grad_bias, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise RuntimeError(
            "adder2d has AdderNet's backward rule and no forward-mode derivative; use backward() or "
            "torch.autograd.grad."
        )


_OPERATORS = Kernels(adder2d_op, grad_input_op, grad_weight_op)

# Function.apply without inspecting the signature of `forward` at each call, which takes longer than the rest of it
# (torch.library.register_autograd as well), and without function transforms, which are refused below.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Adder2d).apply


def with_autograd(
    kernel: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eta: float | None,
) -> Tensor:
    needs_grad = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    # Inside a dual level the Function is taken as well: it refuses tangents, where the plain call would drop them.
    if (needs_grad and torch.is_grad_enabled()) or torch.autograd.forward_ad._current_level >= 0:
        return _apply(kernel, input, weight, bias, stride, padding, dilation, groups, eta)
    return kernel(input, weight, bias, stride, padding, dilation, groups)


def _below_autograd(*arguments: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return adder2d_op(*arguments)


def _adder2d_autograd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eta: float | None = ETA,
) -> Tensor:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "adder2d does not work inside torch.func.grad, vjp, jvp and similar transforms: its backward is AdderNet's "
            "rule, not the derivative; use backward() or torch.autograd.grad."
        )
    arguments.check_eta("adder2d_eta", eta)
    return with_autograd(_below_autograd, input, weight, bias, stride, padding, dilation, groups, eta)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "adder2d has no second derivative: its backward is AdderNet's rule, not the derivative; call backward() "
        "without create_graph, or detach() the gradient."
    )


library.impl("adder2d", _adder2d_autograd, "Autograd")
library.impl("adder2d_eta", _adder2d_autograd, "Autograd")
torch.library.register_autograd("torch2trt_adder::adder2d_grad_input", _no_second_derivative, lib=library)
torch.library.register_autograd("torch2trt_adder::adder2d_grad_weight", _no_second_derivative, lib=library)


# ---- autocast: as for a convolution, all tensors take the autocast dtype
# torch.library.register_autocast is newer than torch 2.4, and it fixes the dtype when it is called.


def _autocast_kernel(op: torch._ops.OpOverload, device_type: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    keys = torch._C.DispatchKeySet(key)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def adder2d_autocast(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            output: Tensor = op(cast(input), cast(weight), cast(bias), *options)
            return output

    return adder2d_autocast


for _op in (adder2d_op, adder2d_eta_op):
    for _type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        library.impl(
            _op._schema.name.split("::")[1], _autocast_kernel(_op, _type, getattr(torch._C.DispatchKey, _key)), _key
        )
