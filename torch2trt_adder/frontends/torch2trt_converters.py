"""Converters for torch2trt that compute values: arithmetic, activations, reductions, normalization, transposed convolution."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt
import torch
from torch import Tensor

from .host import host
from .torch2trt_layers import (
    SLICE_MODES,
    Context,
    ITensor,
    add_activation,
    add_arithmetic,
    add_binary,
    add_reduce,
    add_reshape,
    add_slice,
    add_unary,
    axes_of,
    axis_of,
    converts,
    drop_last,
    extents_of,
    itensor_of,
    pair_of,
    tensors_of_network,
)

# ---- arithmetic


@converts("torch.add", "torch.Tensor.add", "torch.Tensor.add_")
def convert_add(ctx: Context, input: Any, other: Any, *, alpha: float = 1, out: None = None) -> ITensor:
    return add_arithmetic(ctx, input, other, "SUM", alpha)


@converts("torch.sub", "torch.Tensor.sub", "torch.Tensor.sub_")
def convert_sub(ctx: Context, input: Any, other: Any, *, alpha: float = 1, out: None = None) -> ITensor:
    return add_arithmetic(ctx, input, other, "SUB", alpha)


@converts("torch.mul", "torch.Tensor.mul", "torch.Tensor.mul_")
def convert_mul(ctx: Context, input: Any, other: Any, *, out: None = None) -> ITensor:
    return add_arithmetic(ctx, input, other, "PROD")


@converts("torch.div", "torch.Tensor.div", "torch.Tensor.div_")
def convert_div(ctx: Context, input: Any, other: Any, *, rounding_mode: str | None = None, out: None = None) -> ITensor:
    if rounding_mode is not None:
        raise NotImplementedError(
            f"{ctx.method_str} with rounding_mode={rounding_mode!r}; divide, then call torch.floor."
        )
    return add_arithmetic(ctx, input, other, "DIV")


@converts("torch.pow", "torch.Tensor.pow", "torch.Tensor.__pow__", "torch.square", "torch.Tensor.square")
def convert_pow(ctx: Context, input: Any, exponent: Any = 2, *, out: None = None) -> ITensor:
    if isinstance(exponent, (int, float)) and exponent == 2:  # exact for either sign, at any precision
        return add_binary(ctx, tensors_of_network(input), tensors_of_network(input), "PROD")
    return add_arithmetic(ctx, input, exponent, "POW")


# ---- activations


@converts("torch.Tensor.relu_")
def convert_relu_(ctx: Context, input: Tensor) -> ITensor:
    return add_activation(ctx, tensors_of_network(input), "RELU")


@converts("torch.Tensor.sigmoid_", "torch.sigmoid_")
def convert_sigmoid_(ctx: Context, input: Tensor) -> ITensor:
    return add_activation(ctx, tensors_of_network(input), "SIGMOID")


@converts("torch.Tensor.tanh", "torch.Tensor.tanh_")
def convert_tanh(ctx: Context, input: Tensor) -> ITensor:
    return add_activation(ctx, tensors_of_network(input), "TANH")


@converts("torch.nn.functional.hardtanh", "torch.nn.functional.hardtanh_")  # nn.ReLU6 calls it
def convert_hardtanh(
    ctx: Context, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> ITensor:
    return add_activation(ctx, tensors_of_network(input), "CLIP", min_val, max_val)


@converts("torch.clamp_", "torch.Tensor.clamp_")
def convert_clamp_(ctx: Context, input: Tensor, min: Any = None, max: Any = None) -> ITensor:
    itensor = tensors_of_network(input)
    for bound, operation in ((min, "MAX"), (max, "MIN")):
        if bound is not None:
            itensor = add_binary(ctx, itensor, itensor_of(ctx, bound, input, input.dim()), operation)
    return itensor


@converts("torch.nn.functional.hardsigmoid")
def convert_hardsigmoid(ctx: Context, input: Tensor, inplace: bool = False) -> ITensor:
    return add_activation(ctx, tensors_of_network(input), "HARD_SIGMOID", 1 / 6, 0.5)


@converts("torch.nn.functional.hardswish")
def convert_hardswish(ctx: Context, input: Tensor, inplace: bool = False) -> ITensor:
    return add_binary(
        ctx,
        tensors_of_network(input),
        add_activation(ctx, tensors_of_network(input), "HARD_SIGMOID", 1 / 6, 0.5),
        "PROD",
    )


@converts("torch.nn.functional.softplus")
def convert_softplus(ctx: Context, input: Tensor, beta: float = 1, threshold: float = 20) -> ITensor:
    # PyTorch's threshold only avoids an overflow: the difference beyond it is below 1e-8.
    return add_activation(ctx, tensors_of_network(input), "SOFTPLUS", 1 / beta, beta)


@converts("torch.nn.functional.mish")
def convert_mish(ctx: Context, input: Tensor, inplace: bool = False) -> ITensor:
    softplus = add_activation(ctx, tensors_of_network(input), "SOFTPLUS", 1, 1)
    return add_binary(ctx, tensors_of_network(input), add_activation(ctx, softplus, "TANH"), "PROD")


@converts("torch.nn.functional.gelu")
def convert_gelu(ctx: Context, input: Tensor, approximate: str = "none") -> ITensor:
    x, ndim = tensors_of_network(input), input.dim()

    def number(value: float) -> ITensor:
        return itensor_of(ctx, value, input, ndim)

    if approximate == "tanh":
        cube = add_binary(ctx, add_binary(ctx, x, x, "PROD"), x, "PROD")
        inner = add_binary(ctx, x, add_binary(ctx, cube, number(0.044715), "PROD"), "SUM")
        curve = add_activation(ctx, add_binary(ctx, inner, number(math.sqrt(2 / math.pi)), "PROD"), "TANH")
    else:
        curve = add_unary(ctx, add_binary(ctx, x, number(math.sqrt(0.5)), "PROD"), "ERF")
    return add_binary(ctx, add_binary(ctx, x, number(0.5), "PROD"), add_binary(ctx, curve, number(1), "SUM"), "PROD")


def _softmax_axis(dim: int | None, ndim: int) -> int:
    if dim is None:  # as torch.nn.functional._get_softmax_dim
        return 0 if ndim in (0, 1, 3) else 1
    return axis_of(dim, ndim)


@converts("torch.nn.functional.softmax", "torch.softmax", "torch.Tensor.softmax")
def convert_softmax(
    ctx: Context, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> ITensor:
    layer = ctx.network.add_softmax(tensors_of_network(input))
    layer.axes = 1 << _softmax_axis(dim, input.dim())
    return layer.get_output(0)


@converts("torch.nn.functional.log_softmax", "torch.log_softmax", "torch.Tensor.log_softmax")
def convert_log_softmax(
    ctx: Context, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> ITensor:
    # The logarithm of a softmax would be -inf where the softmax underflows.
    axes = [_softmax_axis(dim, input.dim())]
    x = add_binary(ctx, tensors_of_network(input), add_reduce(ctx, tensors_of_network(input), "MAX", axes, True), "SUB")
    total = add_reduce(ctx, add_unary(ctx, x, "EXP"), "SUM", axes, True)
    return add_binary(ctx, x, add_unary(ctx, total, "LOG"), "SUB")


# ---- reductions


@converts("torch.mean", "torch.Tensor.mean")
def convert_mean(
    ctx: Context, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> ITensor:
    return add_reduce(ctx, tensors_of_network(input), "AVG", axes_of(dim, input.dim()), keepdim)


@converts("torch.sum", "torch.Tensor.sum")
def convert_sum(
    ctx: Context, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> ITensor:
    return add_reduce(ctx, tensors_of_network(input), "SUM", axes_of(dim, input.dim()), keepdim)


def _extreme(ctx: Context, operation: str, input: Tensor, dim: Any, keepdim: bool) -> ITensor | None:
    if isinstance(dim, Tensor):  # of two tensors, element by element
        return add_arithmetic(ctx, input, dim, operation)
    result = ctx.method_return
    itensor = add_reduce(ctx, tensors_of_network(input), operation, axes_of(dim, input.dim()), keepdim)
    if isinstance(result, Tensor):
        return itensor
    result[0]._trt = itensor  # the indices stay without: whoever uses them is told
    return None


@converts("torch.max", "torch.Tensor.max", "torch.amax", "torch.Tensor.amax")
def convert_max(
    ctx: Context, input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Tensor | None = None
) -> ITensor | None:
    return _extreme(ctx, "MAX", input, dim if other is None else other, keepdim)


@converts("torch.min", "torch.Tensor.min", "torch.amin", "torch.Tensor.amin")
def convert_min(
    ctx: Context, input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Tensor | None = None
) -> ITensor | None:
    return _extreme(ctx, "MIN", input, dim if other is None else other, keepdim)


@converts("torch.nn.functional.normalize")
def convert_normalize(
    ctx: Context, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None
) -> ITensor:
    x, axes = tensors_of_network(input), axes_of(dim, input.dim())
    if p == 2:
        norm = add_unary(ctx, add_reduce(ctx, add_binary(ctx, x, x, "PROD"), "SUM", axes, True), "SQRT")
    elif p == 1:
        norm = add_reduce(ctx, add_unary(ctx, x, "ABS"), "SUM", axes, True)
    else:
        raise NotImplementedError(f"{ctx.method_str} with p={p}: an engine here normalizes by p = 1 or 2.")
    return add_binary(ctx, x, add_binary(ctx, norm, itensor_of(ctx, eps, input, input.dim()), "MAX"), "DIV")


# ---- normalization


def _affine(ctx: Context, input: Tensor, y: ITensor, weight: Tensor | None, bias: Tensor | None) -> ITensor:
    """y * weight + bias, one value for each channel."""
    for value, operation in ((weight, "PROD"), (bias, "SUM")):
        if value is not None:
            with ctx.unhooked():
                shaped = value.detach().view(-1, *[1] * (input.dim() - 2))
            y = add_binary(ctx, y, itensor_of(ctx, shaped, input, input.dim()), operation)
    return y


def _standardize(ctx: Context, input: Tensor, x: ITensor, axes: Sequence[int], eps: float) -> ITensor:
    centred = add_binary(ctx, x, add_reduce(ctx, x, "AVG", axes, True), "SUB")
    variance = add_reduce(ctx, add_binary(ctx, centred, centred, "PROD"), "AVG", axes, True)
    floor = itensor_of(ctx, eps, input, len(x.shape))
    return add_binary(ctx, centred, add_unary(ctx, add_binary(ctx, variance, floor, "SUM"), "SQRT"), "DIV")


@converts("torch.nn.functional.batch_norm")
def convert_batch_norm(
    ctx: Context,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ITensor:
    if running_mean is None or running_var is None:
        axes = [0, *range(2, input.dim())]
        return _affine(ctx, input, _standardize(ctx, input, tensors_of_network(input), axes, eps), weight, bias)
    with ctx.unhooked():
        scale = (running_var.detach().double() + eps).rsqrt() * (1 if weight is None else weight.detach().double())
        shift = (0 if bias is None else bias.detach().double()) - running_mean.detach().double() * scale
        arrays = [values.to(input.dtype).cpu().numpy() for values in (shift, scale, torch.ones_like(scale))]
    extents = extents_of(input)
    x = (
        tensors_of_network(input)
        if len(extents) > 3
        else add_reshape(ctx, tensors_of_network(input), [*extents, *[1] * (4 - len(extents))])
    )
    y = ctx.network.add_scale_nd(x, trt.ScaleMode.CHANNEL, *arrays, 1).get_output(0)
    return y if len(extents) > 3 else add_reshape(ctx, y, extents)


@converts("torch.nn.functional.group_norm", "torch.group_norm")
def convert_group_norm(
    ctx: Context,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> ITensor:
    extents = extents_of(input)
    grouped = [extents[0], num_groups, extents[1] // num_groups, *extents[2:]]
    y = _standardize(
        ctx, input, add_reshape(ctx, tensors_of_network(input), grouped), list(range(2, len(grouped))), eps
    )
    return _affine(ctx, input, add_reshape(ctx, y, extents), weight, bias)


@converts("torch.nn.functional.instance_norm", "torch.instance_norm")
def convert_instance_norm(
    ctx: Context,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> ITensor:
    if not use_input_stats:
        return convert_batch_norm(ctx, input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _affine(
        ctx, input, _standardize(ctx, input, tensors_of_network(input), list(range(2, input.dim())), eps), weight, bias
    )


# ---- layers with weights


@converts(
    "torch.nn.functional.conv_transpose1d",
    "torch.nn.functional.conv_transpose2d",
    "torch.nn.functional.conv_transpose3d",
)
def convert_conv_transpose(
    ctx: Context,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> ITensor:
    n = int(ctx.method_str[-2])
    if input.dim() != n + 2 or any(
        hasattr(t, "_trt") and ctx.tracker.origin(t) for t in (weight, bias) if t is not None
    ):
        raise NotImplementedError(
            f"{ctx.method_str} of an input without batch axis, or of weights that depend on the input."
        )
    step, pad, more, spread = (pair_of(value, n) for value in (stride, padding, output_padding, dilation))
    with ctx.unhooked():
        kernel = weight.detach().cpu().numpy()
        offset = trt.Weights(host.torch_dtype_to_trt(weight.dtype)) if bias is None else bias.detach().cpu().numpy()
    x, extents = tensors_of_network(input), extents_of(input)
    if n == 1:  # TensorRT has it for two and three axes
        x, extents, kernel = add_reshape(ctx, x, [*extents, 1]), [*extents, 1], kernel[..., None]
        step, pad, more, spread = (*step, 1), (*pad, 0), (*more, 0), (*spread, 1)
    # TensorRT only cuts from the full result: where output_padding passes it, the input gets zeros at the end.
    zeros = [max(0, -((p - m) // s)) for s, p, m in zip(step, pad, more, strict=True)]
    if any(zeros):
        size = [*extents[:2], *(extent + z for extent, z in zip(extents[2:], zeros, strict=True))]
        x = add_slice(ctx, x, [0] * len(size), size, None, SLICE_MODES.FILL, itensor_of(ctx, 0.0, input, 0))
    maps = kernel.shape[1] * groups
    layer = ctx.network.add_deconvolution_nd(x, maps, kernel.shape[2:], np.ascontiguousarray(kernel), offset)
    layer.stride_nd, layer.dilation_nd, layer.num_groups = step, spread, groups
    layer.pre_padding = pad
    layer.post_padding = tuple(p - m + z * s for p, m, z, s in zip(pad, more, zeros, step, strict=True))
    y = layer.get_output(0)
    return drop_last(ctx, y) if n == 1 else y
