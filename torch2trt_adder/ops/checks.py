"""Checks of sizes, types and memory that all implementations of the operator share."""

from collections.abc import Sequence

import torch
from torch import Tensor

ETA = 0.2  # of the adaptive scaling in the published code
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# torch2trt replaces Tensor.shape and Tensor.size while it traces: on a traced tensor both add layers to the network.
tensor_size = torch.Tensor.size


# ---- checks, shared by all implementations


def output_size(
    input: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """[N, K, P, Q] from the sizes of the tensors, or a ValueError that says what does not fit."""
    if len(input) != 4:
        raise ValueError(
            f"adder2d: input must be [N, C, H, W], got {list(input)}; add the missing axis with unsqueeze."
        )
    if len(weight) != 4:
        raise ValueError(f"adder2d: weight must be [K, C / groups, R, S], got {list(weight)}; reshape it to four axes.")
    (N, C, *image), (K, per_group, *kernel) = input, weight
    for name, values, minimum in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or values[0] < minimum or values[1] < minimum:
            raise ValueError(f"adder2d: {name} must be an int or a pair, each >= {minimum}, got {list(values)}.")
        if values[0] >= 2**31 or values[1] >= 2**31:
            raise ValueError(f"adder2d: {name} must be below 2^31, got {list(values)}.")
    if groups < 1 or C % groups != 0 or K % groups != 0:
        raise ValueError(f"adder2d: groups must divide the {C} input channels and the {K} filters, got {groups}.")
    if per_group * groups != C:
        raise ValueError(
            f"adder2d: an input of {C} channels in {groups} groups needs a weight [K, {C // groups}, R, S], got "
            f"{list(weight)}; give the layer {per_group * groups} channels or another weight."
        )
    if C < 1 or K < 1 or image[0] < 1 or image[1] < 1 or kernel[0] < 1 or kernel[1] < 1:
        raise ValueError(f"adder2d: only the batch may be empty, got input {list(input)} and weight {list(weight)}.")
    if bias is not None and (len(bias) != 1 or bias[0] != K):
        raise ValueError(f"adder2d: bias must be [{K}], one value per filter, got {list(bias)}.")
    room = [image[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1 for i in (0, 1)]
    if room[0] < 0 or room[1] < 0:
        raise ValueError(
            f"adder2d: the {kernel[0]}x{kernel[1]} kernel with dilation {list(dilation)} does not fit the "
            f"{image[0]}x{image[1]} input with padding {list(padding)}; enlarge the input or the padding."
        )
    return N, K, room[0] // stride[0] + 1, room[1] // stride[1] + 1


def kernel_size(
    caller: str,
    input: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """`output_size` for the kernels, whose sizes are int32."""
    size = output_size(input, weight, bias, stride, padding, dilation, groups)
    for extent in (*input, *weight, *size):
        if extent >= 2**31:
            raise ValueError(f"{caller}: every axis must be below 2^31, got {extent}; split the call along that axis.")
    return size


def check_grad_size(caller: str, grad: Sequence[int], size: tuple[int, int, int, int]) -> None:
    if tuple(grad) != size:
        raise ValueError(f"{caller}: grad_output must be {list(size)}, the shape of the output, got {list(grad)}.")


def check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dtype = input.dtype
    if dtype not in _DTYPES:
        raise TypeError(
            f"adder2d: dtype {dtype} is not supported; convert input and weight to torch.float32, torch.float16 or "
            "torch.bfloat16."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype is not dtype:
            raise TypeError(
                f"adder2d: {name} is {tensor.dtype} and input is {dtype}; convert one of them, or call under "
                "torch.autocast."
            )
        if tensor.device != input.device:
            raise RuntimeError(f"adder2d: {name} is on {tensor.device} and input on {input.device}; move one of them.")


def check_grad_tensors(caller: str, grad_output: Tensor, input: Tensor, weight: Tensor) -> None:
    check_tensors(input, weight, None)
    if not grad_output.is_floating_point():
        raise TypeError(f"{caller}: grad_output must have a floating-point dtype, got {grad_output.dtype}; convert it.")
    if grad_output.device != input.device:
        raise RuntimeError(
            f"{caller}: grad_output is on {grad_output.device} and input on {input.device}; move one of them."
        )


def check_grad_arguments(caller: str, grad_output: Tensor, input: Tensor, weight: Tensor) -> None:
    check_grad_tensors(caller, grad_output, input, weight)
    for name, tensor in (("grad_output", grad_output), ("input", input), ("weight", weight)):
        check_memory(name, tensor)


def check_memory(name: str, tensor: Tensor | None) -> None:
    """Raises a RuntimeError where a tensor's storage is too small for it: kernels would read beyond it."""
    if tensor is None or tensor.numel() == 0:
        return
    size = tensor.element_size()
    start, held = size * tensor.storage_offset(), tensor.untyped_storage().nbytes()
    if tensor.is_contiguous() and held >= start + size * tensor.numel():
        return
    needed = (
        start + size + size * sum((n - 1) * step for n, step in zip(tensor_size(tensor), tensor.stride(), strict=True))
    )
    if held < needed:
        raise RuntimeError(
            f"adder2d: the storage of {name} {list(tensor_size(tensor))} holds {held} of the {needed} bytes that it needs; "
            "its memory was freed or resized, so restore it or pass another tensor."
        )


def as_contiguous(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor
    check_memory(name, tensor)
    return tensor.contiguous()


def is_channels_last(input: Tensor) -> bool:
    return not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout of an output or gradient, from that of the input or of what the gradient is of."""
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


# ---- the gradient rule


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
