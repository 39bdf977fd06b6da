"""Calls of the forward launchers of ``csrc/adder2d.h`` with an epilogue: scale, shift, residual and limits."""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import library
from .checks import as_contiguous, check_memory, check_tensors, is_channels_last, tensor_size
from .fallback import adder2d_torch
from .launch import KERNEL_TYPES, check_forward_memory, cpu_error, launch_args, launch_error

Extents = Sequence[int]
# Stored tensors lie at multiples of this at least; the workspace is asked for before their addresses are known.
_ALIGNED = 256

# ---- checks


def check_epilogue(
    input: Tensor, K: int, scale: Tensor | None, shift: Tensor | None, lower: float | None, upper: float | None
) -> None:
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is None:
            continue
        if tensor.dtype is not torch.float32:
            raise TypeError(
                f"adder2d_fused: {name} must be torch.float32, got {tensor.dtype}; convert it with .float()."
            )
        if tuple(tensor_size(tensor)) != (K,):
            raise ValueError(
                f"adder2d_fused: {name} must be [{K}], one value per filter, got {list(tensor_size(tensor))}."
            )
        _check_device(name, tensor, input)
    for name, value in (("lower", lower), ("upper", upper)):
        if value is not None and math.isnan(value):
            raise ValueError(f"adder2d_fused: {name} must be a number or None, got nan.")
    if lower is not None and upper is not None and lower > upper:
        raise ValueError(f"adder2d_fused: lower must not be above upper, got {lower} and {upper}.")


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise RuntimeError(
            f"adder2d_fused: {name} is on {tensor.device} and input on {input.device}; move one of them."
        )


def expanded(residual: Tensor | None, input: Tensor, size: Extents) -> Tensor | None:
    """The residual with the output's shape. One that was broadcast is copied, so that its strides are ordinary."""
    if residual is None:
        return None
    if residual.dtype is not input.dtype:
        raise TypeError(
            f"adder2d_fused: residual is {residual.dtype} and input is {input.dtype}; convert one of them, or call under "
            "torch.autocast."
        )
    _check_device("residual", residual, input)
    if tuple(tensor_size(residual)) == tuple(size):
        return residual
    try:
        return residual.expand(size).contiguous()
    except RuntimeError:
        raise ValueError(
            f"adder2d_fused: residual must be {list(size)}, the shape of the output, or broadcast to it, got "
            f"{list(tensor_size(residual))}."
        ) from None


# ---- implementations


def _fused_torch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Extents,
    padding: Extents,
    dilation: Extents,
    groups: int,
    lower: float | None,
    upper: float | None,
) -> Tensor:
    """float64, in plain torch."""
    y: Tensor = adder2d_torch(input, weight, bias, stride, padding, dilation, groups)
    check_epilogue(input, y.shape[1], scale, shift, lower, upper)
    residual = expanded(residual, input, y.shape)
    for name, tensor in (("scale", scale), ("shift", shift), ("residual", residual)):
        check_memory(name, tensor)
    if scale is not None:
        y *= scale[:, None, None]
    if shift is not None:
        y += shift[:, None, None]
    if residual is not None:
        y += residual
    return y if lower is None and upper is None else y.clamp_(lower, upper)


def _float32(value: float | None, missing: float) -> float:
    """A limit as float32; beyond its range that is an infinity."""
    return missing if value is None else ctypes.c_float(value).value


def _pack_epilogue(
    addresses: Sequence[int], stride: Extents, kind: int, lower: float | None, upper: float | None
) -> Any:
    """An Adder2dEpilogue; the addresses are those of scale, shift and residual."""
    packed = library.EPILOGUE.pack(*addresses, *stride, kind, 0, _float32(lower, -math.inf), _float32(upper, math.inf))
    return library.Adder2dEpilogue.from_buffer_copy(packed)


@functools.lru_cache(maxsize=4096)
def _workspace_bytes(
    problem: bytes,
    scale: bool,
    shift: bool,
    residual_stride: tuple[int, ...] | None,
    kind: int,
    lower: float | None,
    upper: float | None,
    device: int,
) -> int:
    """Checks the problem with its epilogue. `device` is the current CUDA device, or -1 for the CPU, which needs none."""
    stride = residual_stride or (0, 0, 0, 0)
    there = scale, shift, residual_stride is not None
    epilogue = _pack_epilogue([_ALIGNED if given else 0 for given in there], stride, kind, lower, upper)
    params = problem + library.POINTERS.pack(0, 0, 0, 0, 0, 0, ctypes.addressof(epilogue), 0)
    loaded = library.load()
    reason = loaded.adder2d_check(params)
    if reason:
        raise ValueError(f"adder2d_fused: {reason.decode()}.")
    return int(loaded.adder2d_fprop_workspace(params)) if device >= 0 else 0


def _dense(
    weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The tensors of the layer as kernels read them: contiguous."""
    bias, scale, shift = (
        None if tensor is None else as_contiguous(name, tensor)
        for name, tensor in (("bias", bias), ("scale", scale), ("shift", shift))
    )
    return as_contiguous("weight", weight), bias, scale, shift


def _call(device: int, params: bytes) -> None:
    loaded = library.load()
    if device < 0:
        error = loaded.adder2d_fprop_cpu(params, torch.get_num_threads())
        if error:
            raise cpu_error("adder2d_fused", error)
        return
    error = loaded.adder2d_fprop(params, torch._C._cuda_getCurrentRawStream(device))
    if error:
        raise launch_error("adder2d_fused", device, error)


def _launch(
    device: int,
    channels_last: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Extents,
    padding: Extents,
    dilation: Extents,
    groups: int,
    lower: float | None,
    upper: float | None,
) -> Tensor:
    """By adder2d_fprop on the current CUDA device `device`, or by adder2d_fprop_cpu where that is -1."""
    args = launch_args(
        tensor_size(input), input.stride(), channels_last, tensor_size(weight), None if bias is None else tensor_size(bias),
        input.dtype, tuple(stride), tuple(padding), tuple(dilation), groups, device,
    )  # fmt: skip
    check_epilogue(input, args.size[1], scale, shift, lower, upper)
    residual = expanded(residual, input, args.size)
    kind = KERNEL_TYPES[input.dtype]
    residual_stride = None if residual is None else residual.stride()
    size = _workspace_bytes(
        args.problem, scale is not None, shift is not None, residual_stride, kind, lower, upper, device
    )
    output = input.new_empty_strided(args.size, args.stride)
    if args.size[0] == 0:
        return output
    weight, bias, scale, shift = _dense(weight, bias, scale, shift)
    check_forward_memory(args, input, weight, bias)
    for name, tensor in (("scale", scale), ("shift", shift), ("residual", residual)):
        check_memory(name, tensor)
    workspace = torch.empty(size, dtype=torch.uint8, device=input.device) if size else None
    w, b, *addresses = (0 if t is None else t.data_ptr() for t in (weight, bias, scale, shift, residual))
    epilogue = _pack_epilogue(addresses, residual_stride or (0, 0, 0, 0), kind, lower, upper)
    params = args.problem + library.POINTERS.pack(
        input.data_ptr(),
        w,
        b,
        output.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        size,
        ctypes.addressof(epilogue),
        0,
    )
    _call(device, params)  # which reads `epilogue`
    return output


def adder2d_fused_cuda(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    check_tensors(input, weight, bias)
    device = input.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return adder2d_fused_cuda(input, weight, bias, *options)
    if input.dtype is torch.float64:
        return _fused_torch(input, weight, bias, *options)
    return _launch(device, is_channels_last(input), input, weight, bias, *options)


def adder2d_fused_cpu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    *options: Any,
) -> Tensor:
    check_tensors(input, weight, bias)
    dtype = input.dtype
    if dtype is torch.float64:
        return _fused_torch(input, weight, bias, scale, shift, residual, *options)
    channels_last = is_channels_last(input)  # of what came in, not of its float32 copy
    if dtype is not torch.float32:
        expanded(residual, input, () if residual is None else tensor_size(residual))  # its dtype and device
        halves = {"input": input, "weight": weight, "bias": bias, "residual": residual}
        for name, tensor in halves.items():
            check_memory(name, tensor)
        input, weight = input.float(), weight.float()
        bias, residual = (None if t is None else t.float() for t in (bias, residual))
    output = _launch(-1, channels_last, input, weight, bias, scale, shift, residual, *options)
    return output if dtype is torch.float32 else output.to(dtype)
