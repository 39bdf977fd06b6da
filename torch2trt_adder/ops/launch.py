"""Calls of the launchers of ``csrc/adder2d.h`` on torch tensors: what all passes share, and the forward pass."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import library
from .checks import (
    as_contiguous,
    check_memory,
    check_tensors,
    is_channels_last,
    kernel_size,
    tensor_size,
)
from .fallback import adder2d_torch

KERNEL_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # Adder2dType


# ---- forward on float32, float16, bfloat16: the launchers of adder2d.h


def launch_error(name: str, device: int, error: int) -> RuntimeError:
    return RuntimeError(
        f"{name}: the launch on cuda:{device} failed with error {error}, "
        f"{library.load().adder2d_error_string(error).decode()}; if the GPU is newer or older than the build of "
        f"{library.path()}, build that again on this machine."
    )


def cpu_error(name: str, error: int) -> RuntimeError:
    return RuntimeError(f"{name}: {library.load().adder2d_cpu_error_string(error).decode()}.")


class LaunchArgs(NamedTuple):
    """What a launch needs beyond pointers."""

    size: tuple[int, int, int, int]
    stride: tuple[int, int, int, int]
    problem: bytes  # Adder2dParams up to the pointers
    workspace_bytes: int
    element_bytes: int
    input_bytes: int  # from its first element to the end of its last
    weight_bytes: int


@functools.lru_cache(maxsize=4096)
def launch_args(
    input_size: tuple[int, ...],
    input_stride: tuple[int, ...],
    channels_last: bool,
    weight_size: tuple[int, ...],
    bias_size: tuple[int, ...] | None,
    dtype: torch.dtype,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    device: int,
) -> LaunchArgs:
    """Checks the problem and packs it. `device` is the current CUDA device, or -1 for the CPU."""
    size = N, K, P, Q = kernel_size("adder2d", input_size, weight_size, bias_size, stride, padding, dilation, groups)
    output_stride = (K * P * Q, 1, K * Q, K) if channels_last else (K * P * Q, P * Q, Q, 1)
    kind = KERNEL_TYPES[dtype]
    problem = library.PROBLEM.pack(
        *input_size, K, *weight_size[2:], P, Q, *stride, *padding, *dilation, groups, kind, kind, kind, 0,
        *input_stride, *output_stride,
    )  # fmt: skip
    params = problem + library.POINTERS.pack(0, 0, 0, 0, 0, 0, 0, 0)
    loaded = library.load()
    reason = loaded.adder2d_check(params)
    if reason:
        raise ValueError(f"adder2d: {reason.decode()}.")
    workspace_bytes = loaded.adder2d_fprop_workspace(params) if device >= 0 else 0
    reach = 1 + sum((n - 1) * step for n, step in zip(input_size, input_stride, strict=True)) if N else 0
    input_bytes, weight_bytes = reach * dtype.itemsize, math.prod(weight_size) * dtype.itemsize
    return LaunchArgs(size, output_stride, problem, workspace_bytes, dtype.itemsize, input_bytes, weight_bytes)


def check_forward_memory(args: LaunchArgs, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`_check_memory` of all three, in a third of its time: the weight and the bias are contiguous, the sizes known."""
    size = args.element_bytes
    if (
        input.untyped_storage().nbytes() < args.input_bytes + size * input.storage_offset()
        or weight.untyped_storage().nbytes() < args.weight_bytes + size * weight.storage_offset()
        or (bias is not None and bias.untyped_storage().nbytes() < size * (args.size[1] + bias.storage_offset()))
    ):
        for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
            check_memory(name, tensor)


def adder2d_cuda(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    check_tensors(input, weight, bias)
    device = input.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return adder2d_cuda(input, weight, bias, stride, padding, dilation, groups)
    if input.dtype is torch.float64:
        return adder2d_torch(input, weight, bias, stride, padding, dilation, groups)
    args = launch_args(
        tensor_size(input), input.stride(), is_channels_last(input), tensor_size(weight), None if bias is None else tensor_size(bias),
        input.dtype, tuple(stride), tuple(padding), tuple(dilation), groups, device,
    )  # fmt: skip
    output = input.new_empty_strided(args.size, args.stride)
    if args.size[0] == 0:
        return output
    weight = as_contiguous("weight", weight)
    bias = None if bias is None else as_contiguous("bias", bias)
    check_forward_memory(args, input, weight, bias)
    workspace = None
    if args.workspace_bytes:
        workspace = torch.empty(args.workspace_bytes, dtype=torch.uint8, device=input.device)
    params = args.problem + library.POINTERS.pack(
        input.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        args.workspace_bytes,
        0,
        0,
    )
    loaded = library.load()
    error = loaded.adder2d_fprop(params, torch._C._cuda_getCurrentRawStream(device))
    if error:
        raise launch_error("adder2d", device, error)
    return output


def adder2d_cpu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    check_tensors(input, weight, bias)
    dtype = input.dtype
    if dtype is torch.float64:
        return adder2d_torch(input, weight, bias, stride, padding, dilation, groups)
    channels_last = is_channels_last(input)  # of what came in, not of its float32 copy
    if dtype is not torch.float32:
        for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
            check_memory(name, tensor)
        input, weight = input.float(), weight.float()
        bias = None if bias is None else bias.float()
    args = launch_args(
        tensor_size(input), input.stride(), channels_last, tensor_size(weight), None if bias is None else tensor_size(bias),
        torch.float32, tuple(stride), tuple(padding), tuple(dilation), groups, -1,
    )  # fmt: skip
    output = input.new_empty_strided(args.size, args.stride)
    if args.size[0] == 0:
        return output.to(dtype)
    weight = as_contiguous("weight", weight)
    bias = None if bias is None else as_contiguous("bias", bias)
    check_forward_memory(args, input, weight, bias)
    params = args.problem + library.POINTERS.pack(
        input.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), output.data_ptr(), 0, 0, 0, 0
    )
    error = library.load().adder2d_fprop_cpu(params, torch.get_num_threads())
    if error:
        raise cpu_error("adder2d", error)
    return output.to(dtype)
