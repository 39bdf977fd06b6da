"""Calls of the gradients' launchers of ``csrc/adder2d.h`` on torch tensors."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import library
from ..utils import arguments
from .checks import (
    check_grad_arguments,
    check_grad_size,
    is_channels_last,
    kernel_size,
    tensor_size,
)
from .fallback import convolved_gradient, grad_input_torch, grad_weight_torch
from .launch import KERNEL_TYPES, cpu_error, launch_error


class _GradInputArgs(NamedTuple):
    """What a launch needs beyond pointers."""

    stride: tuple[int, int, int, int]  # of the input gradient
    problem: bytes  # Adder2dParams up to the pointers
    kind: int  # Adder2dType of the input gradient
    workspace_bytes: int


@functools.lru_cache(maxsize=4096)
def _grad_input_args(
    grad_size: tuple[int, ...],
    grad_stride: tuple[int, ...],
    grad_dtype: torch.dtype,
    input_size: tuple[int, ...],
    input_stride: tuple[int, ...],
    channels_last: bool,
    weight_size: tuple[int, ...],
    dtype: torch.dtype,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    device: int,
) -> _GradInputArgs:
    """Checks the problem and packs it. `device` is the current CUDA device, or -1 for the CPU."""
    size = kernel_size("adder2d_grad_input", input_size, weight_size, None, stride, padding, dilation, groups)
    check_grad_size("adder2d_grad_input", grad_size, size)
    _, C, H, W = input_size
    output_stride = (C * H * W, 1, C * W, C) if channels_last else (C * H * W, H * W, W, 1)
    kind = KERNEL_TYPES[dtype]
    problem = library.PROBLEM.pack(
        *input_size, size[1], *weight_size[2:], *size[2:], *stride, *padding, *dilation, groups,
        kind, kind, KERNEL_TYPES[grad_dtype], 0, *input_stride, *grad_stride,
    )  # fmt: skip
    params = problem + library.POINTERS.pack(0, 0, 0, 0, 0, 0, 0, 0) + library.DGRAD.pack(kind, 0, *output_stride, 0)
    loaded = library.load()
    reason = loaded.adder2d_dgrad_check(params)
    if reason:
        raise ValueError(f"adder2d_grad_input: {reason.decode()}.")
    workspace_bytes = loaded.adder2d_dgrad_workspace(params) if device >= 0 else 0
    return _GradInputArgs(output_stride, problem, kind, workspace_bytes)


def _grad_input_kernel(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    channels_last: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    device: int,
) -> Tensor:
    """dx by adder2d_dgrad on the current CUDA device `device`, or by adder2d_dgrad_cpu where that is -1."""
    args = _grad_input_args(
        tensor_size(grad_output), grad_output.stride(), grad_output.dtype, tensor_size(input), input.stride(), channels_last,
        tensor_size(weight), input.dtype, tuple(stride), tuple(padding), tuple(dilation), groups, device,
    )  # fmt: skip
    grad_input = input.new_empty_strided(tensor_size(input), args.stride)
    if tensor_size(input)[0] == 0:
        return grad_input
    weight = weight.contiguous()
    workspace = None
    if args.workspace_bytes:
        workspace = torch.empty(args.workspace_bytes, dtype=torch.uint8, device=input.device)
    params = (
        args.problem
        + library.POINTERS.pack(
            input.data_ptr(),
            weight.data_ptr(),
            0,
            grad_output.data_ptr(),
            0 if workspace is None else workspace.data_ptr(),
            args.workspace_bytes,
            0,
            0,
        )
        + library.DGRAD.pack(args.kind, 0, *args.stride, grad_input.data_ptr())
    )
    loaded = library.load()
    if device < 0:
        error = loaded.adder2d_dgrad_cpu(params, torch.get_num_threads())
        if error:
            raise cpu_error("adder2d_grad_input", error)
        return grad_input
    error = loaded.adder2d_dgrad(params, torch._C._cuda_getCurrentRawStream(device))
    if error:
        raise launch_error("adder2d_grad_input", device, error)
    return grad_input


def grad_input_cuda(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    check_grad_arguments("adder2d_grad_input", grad_output, input, weight)
    device = input.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return grad_input_cuda(grad_output, input, weight, stride, padding, dilation, groups)
    if input.dtype is torch.float64:
        return grad_input_torch(grad_output, input, weight, stride, padding, dilation, groups)
    if grad_output.dtype not in KERNEL_TYPES:
        grad_output = grad_output.float()
    return _grad_input_kernel(
        grad_output, input, weight, is_channels_last(input), stride, padding, dilation, groups, device
    )


def grad_input_cpu(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    check_grad_arguments("adder2d_grad_input", grad_output, input, weight)
    if input.dtype is torch.float64:
        return grad_input_torch(grad_output, input, weight, stride, padding, dilation, groups)
    channels_last = is_channels_last(input)  # of what came in, not of its float32 copy
    dx = _grad_input_kernel(
        grad_output.float(), input.float(), weight.float(), channels_last, stride, padding, dilation, groups, -1
    )
    return dx.to(input.dtype)


class _GradWeightArgs(NamedTuple):
    """What a launch needs beyond pointers."""

    stride: tuple[int, int, int, int]  # of the gradient, which is that of the weight
    problem: bytes  # Adder2dParams up to the pointers
    complete: bool  # adder2d_wgrad computes the gradient without a convolution before it
    workspace_bytes: int


@functools.lru_cache(maxsize=4096)
def _grad_weight_args(
    grad_size: tuple[int, ...],
    grad_stride: tuple[int, ...],
    grad_dtype: torch.dtype,
    input_size: tuple[int, ...],
    input_stride: tuple[int, ...],
    channels_last: bool,
    weight_size: tuple[int, ...],
    dtype: torch.dtype,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    eta: float,
    device: int,
) -> _GradWeightArgs:
    """Checks the problem and packs it. `channels_last` is about the weight, `device` the current CUDA device."""
    size = kernel_size("adder2d_grad_weight", input_size, weight_size, None, stride, padding, dilation, groups)
    check_grad_size("adder2d_grad_weight", grad_size, size)
    K, C, R, S = weight_size
    kind = KERNEL_TYPES[dtype]
    problem = library.PROBLEM.pack(
        *input_size, K, R, S, *size[2:], *stride, *padding, *dilation, groups, kind, kind, KERNEL_TYPES[grad_dtype], 0,
        *input_stride, *grad_stride,
    )  # fmt: skip
    params = problem + library.POINTERS.pack(0, 0, 0, 0, 0, 0, 0, 0)
    params += library.WGRAD.pack(channels_last, 0, 0, 0, 0, 0, eta, 0, 0)
    loaded = library.load()
    reason = loaded.adder2d_wgrad_check(params)
    if reason:
        raise ValueError(f"adder2d_grad_weight: {reason.decode()}.")
    return _GradWeightArgs(
        (C * R * S, 1, C * S, C) if channels_last else (C * R * S, R * S, S, 1),
        problem,
        bool(loaded.adder2d_wgrad_takes(params)),
        loaded.adder2d_wgrad_workspace(params),
    )


def grad_weight_cuda(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eta: float | None = None,
) -> Tensor:
    """dw = sum over n,p,q of dy * (x - w) by adder2d_wgrad, often after the weight gradient of a convolution."""
    check_grad_arguments("adder2d_grad_weight", grad_output, input, weight)
    arguments.check_eta("adder2d_grad_weight", eta)
    device = input.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return grad_weight_cuda(grad_output, input, weight, stride, padding, dilation, groups, eta)
    if weight.dtype not in KERNEL_TYPES or len(input) == 0:
        return grad_weight_torch(grad_output, input, weight, stride, padding, dilation, groups, eta)
    if grad_output.dtype not in KERNEL_TYPES:
        grad_output = grad_output.float()
    channels_last = is_channels_last(weight)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = weight.contiguous(memory_format=layout)
    eta = 0.0 if eta is None else eta
    args = _grad_weight_args(
        grad_output.shape, grad_output.stride(), grad_output.dtype, input.shape, input.stride(), channels_last,
        weight.shape, input.dtype, tuple(stride), tuple(padding), tuple(dilation), groups, eta, device,
    )  # fmt: skip
    dw = convolved = None
    if not args.complete:
        convolved = convolved_gradient(grad_output, input, weight, stride, padding, dilation, groups)
        if convolved.is_contiguous(memory_format=layout):
            dw = convolved
    if dw is None:
        dw = weight.new_empty_strided(weight.shape, args.stride, dtype=torch.float32)
    workspace = torch.empty(args.workspace_bytes, dtype=torch.uint8, device=input.device)
    tensors = input.data_ptr(), weight.data_ptr(), 0, grad_output.data_ptr()
    params = (
        args.problem
        + library.POINTERS.pack(*tensors, workspace.data_ptr(), args.workspace_bytes, 0, 0)
        + library.WGRAD.pack(
            channels_last,
            0,
            *(args.stride if convolved is None else convolved.stride()),
            eta,
            0 if convolved is None else convolved.data_ptr(),
            dw.data_ptr(),
        )
    )
    loaded = library.load()
    error = loaded.adder2d_wgrad(params, torch._C._cuda_getCurrentRawStream(device))
    if error:
        raise launch_error("adder2d_grad_weight", device, error)
    return dw


def grad_weight_cpu(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eta: float | None = None,
) -> Tensor:
    check_grad_arguments("adder2d_grad_weight", grad_output, input, weight)
    arguments.check_eta("adder2d_grad_weight", eta)
    return grad_weight_torch(grad_output, input, weight, stride, padding, dilation, groups, eta)
