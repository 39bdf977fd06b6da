"""Converters for torch2trt that compute values: arithmetic, activations, reductions, normalization, transposed convolution."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt
import torch
from torch import Tensor

from .torch2trt_layers import (
    SLICE_MODES,
    Context,
    ITensor,
    _activation,
    _arithmetic,
    _axes,
    _axis,
    _binary,
    _drop_last,
    _extents,
    _itensor,
    _pair,
    _reduce,
    _reshape,
    _slice,
    _traced,
    _unary,
    converts,
    host,
)

# ---- arithmetic


@converts("torch.add", "torch.Tensor.add", "torch.Tensor.add_")
def convert_add(ctx: Context, input: Any, other: Any, *, alpha: float = 1, out: None = None) -> ITensor:
    return _arithmetic(ctx, input, other, "SUM", alpha)


@converts("torch.sub", "torch.Tensor.sub", "torch.Tensor.sub_")
def convert_sub(ctx: Context, input: Any, other: Any, *, alpha: float = 1, out: None = None) -> ITensor:
    return _arithmetic(ctx, input, other, "SUB", alpha)


@converts("torch.mul", "torch.Tensor.mul", "torch.Tensor.mul_")
def convert_mul(ctx: Context, input: Any, other: Any, *, out: None = None) -> ITensor:
    return _arithmetic(ctx, input, other, "PROD")


@converts("torch.div", "torch.Tensor.div", "torch.Tensor.div_")
def convert_div(ctx: Context, input: Any, other: Any, *, rounding_mode: str | None = None, out: None = None) -> ITensor:
    if rounding_mode is not None:
        raise NotImplementedError(
            f"{ctx.method_str} with rounding_mode={rounding_mode!r}; divide, then call torch.floor."
        )
    return _arithmetic(ctx, input, other, "DIV")


@converts("torch.pow", "torch.Tensor.pow", "torch.Tensor.__pow__", "torch.square", "torch.Tensor.square")
def convert_pow(ctx: Context, input: Any, exponent: Any = 2, *, out: None = None) -> ITensor:
    if isinstance(exponent, (int, float)) and exponent == 2:  # exact for either sign, at any precision
        return _binary(ctx, _traced(input), _traced(input), "PROD")
    return _arithmetic(ctx, input, exponent, "POW")


# ---- activations


@converts("torch.Tensor.relu_")
def convert_relu_(ctx: Context, input: Tensor) -> ITensor:
    return _activation(ctx, _traced(input), "RELU")


@converts("torch.Tensor.sigmoid_", "torch.sigmoid_")
def convert_sigmoid_(ctx: Context, input: Tensor) -> ITensor:
    return _activation(ctx, _traced(input), "SIGMOID")


@converts("torch.Tensor.tanh", "torch.Tensor.tanh_")
def convert_tanh(ctx: Context, input: Tensor) -> ITensor:
    return _activation(ctx, _traced(input), "TANH")


@converts("torch.nn.functional.hardtanh", "torch.nn.functional.hardtanh_")  # nn.ReLU6 calls it
def convert_hardtanh(
    ctx: Context, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> ITensor:
    return _activation(ctx, _traced(input), "CLIP", min_val, max_val)


@converts("torch.clamp_", "torch.Tensor.clamp_")
def convert_clamp_(ctx: Context, input: Tensor, min: Any = None, max: Any = None) -> ITensor:
    itensor = _traced(input)
    for bound, operation in ((min, "MAX"), (max, "MIN")):
        if bound is not None:
            itensor = _binary(ctx, itensor, _itensor(ctx, bound, input, input.dim()), operation)
    return itensor


@converts("torch.nn.functional.hardsigmoid")
def convert_hardsigmoid(ctx: Context, input: Tensor, inplace: bool = False) -> ITensor:
    return _activation(ctx, _traced(input), "HARD_SIGMOID", 1 / 6, 0.5)


@converts("torch.nn.functional.hardswish")
def convert_hardswish(ctx: Context, input: Tensor, inplace: bool = False) -> ITensor:
    return _binary(ctx, _traced(input), _activation(ctx, _traced(input), "HARD_SIGMOID", 1 / 6, 0.5), "PROD")


@converts("torch.nn.functional.softplus")
def convert_softplus(ctx: Context, input: Tensor, beta: float = 1, threshold: float = 20) -> ITensor:
    # PyTorch's threshold only avoids an overflow: the difference beyond it is below 1e-8.
    return _activation(ctx, _traced(input), "SOFTPLUS", 1 / beta, beta)


@converts("torch.nn.functional.mish")
def convert_mish(ctx: Context, input: Tensor, inplace: bool = False) -> ITensor:
    softplus = _activation(ctx, _traced(input), "SOFTPLUS", 1, 1)
    return _binary(ctx, _traced(input), _activation(ctx, softplus, "TANH"), "PROD")


@converts("torch.nn.functional.gelu")
def convert_gelu(ctx: Context, input: Tensor, approximate: str = "none") -> ITensor:
    x, ndim = _traced(input), input.dim()

    def number(value: float) -> ITensor:
        return _itensor(ctx, value, input, ndim)

    if approximate == "tanh":
        cube = _binary(ctx, _binary(ctx, x, x, "PROD"), x, "PROD")
        inner = _binary(ctx, x, _binary(ctx, cube, number(0.044715), "PROD"), "SUM")
        curve = _activation(ctx, _binary(ctx, inner, number(math.sqrt(2 / math.pi)), "PROD"), "TANH")
    else:
        curve = _unary(ctx, _binary(ctx, x, number(math.sqrt(0.5)), "PROD"), "ERF")
    return _binary(ctx, _binary(ctx, x, number(0.5), "PROD"), _binary(ctx, curve, number(1), "SUM"), "PROD")


def _softmax_axis(dim: int | None, ndim: int) -> int:
    if dim is None:  # as torch.nn.functional._get_softmax_dim
        return 0 if ndim in (0, 1, 3) else 1
    return _axis(dim, ndim)


@converts("torch.nn.functional.softmax", "torch.softmax", "torch.Tensor.softmax")
def convert_softmax(
    ctx: Context, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> ITensor:
    layer = ctx.network.add_softmax(_traced(input))
    layer.axes = 1 << _softmax_axis(dim, input.dim())
    return layer.get_output(0)


@converts("torch.nn.functional.log_softmax", "torch.log_softmax", "torch.Tensor.log_softmax")
def convert_log_softmax(
    ctx: Context, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> ITensor:
    # The logarithm of a softmax would be -inf where the softmax underflows.
    axes = [_softmax_axis(dim, input.dim())]
    x = _binary(ctx, _traced(input), _reduce(ctx, _traced(input), "MAX", axes, True), "SUB")
    total = _reduce(ctx, _unary(ctx, x, "EXP"), "SUM", axes, True)
    return _binary(ctx, x, _unary(ctx, total, "LOG"), "SUB")


# ---- reductions


@converts("torch.mean", "torch.Tensor.mean")
def convert_mean(
    ctx: Context, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> ITensor:
    return _reduce(ctx, _traced(input), "AVG", _axes(dim, input.dim()), keepdim)


@converts("torch.sum", "torch.Tensor.sum")
def convert_sum(
    ctx: Context, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> ITensor:
    return _reduce(ctx, _traced(input), "SUM", _axes(dim, input.dim()), keepdim)


def _extreme(ctx: Context, operation: str, input: Tensor, dim: Any, keepdim: bool) -> ITensor | None:
    if isinstance(dim, Tensor):  # of two tensors, element by element
        return _arithmetic(ctx, input, dim, operation)
    result = ctx.method_return
    itensor = _reduce(ctx, _traced(input), operation, _axes(dim, input.dim()), keepdim)
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
    x, axes = _traced(input), _axes(dim, input.dim())
    if p == 2:
        norm = _unary(ctx, _reduce(ctx, _binary(ctx, x, x, "PROD"), "SUM", axes, True), "SQRT")
    elif p == 1:
        norm = _reduce(ctx, _unary(ctx, x, "ABS"), "SUM", axes, True)
    else:
        raise NotImplementedError(f"{ctx.method_str} with p={p}: an engine here normalizes by p = 1 or 2.")
    return _binary(ctx, x, _binary(ctx, norm, _itensor(ctx, eps, input, input.dim()), "MAX"), "DIV")


# ---- normalization


def _affine(ctx: Context, input: Tensor, y: ITensor, weight: Tensor | None, bias: Tensor | None) -> ITensor:
    """y * weight + bias, one value for each channel."""
    for value, operation in ((weight, "PROD"), (bias, "SUM")):
        if value is not None:
            with ctx.unhooked():
                shaped = value.detach().view(-1, *[1] * (input.dim() - 2))
            y = _binary(ctx, y, _itensor(ctx, shaped, input, input.dim()), operation)
    return y


def _standardize(ctx: Context, input: Tensor, x: ITensor, axes: Sequence[int], eps: float) -> ITensor:
    centred = _binary(ctx, x, _reduce(ctx, x, "AVG", axes, True), "SUB")
    variance = _reduce(ctx, _binary(ctx, centred, centred, "PROD"), "AVG", axes, True)
    floor = _itensor(ctx, eps, input, len(x.shape))
    return _binary(ctx, centred, _unary(ctx, _binary(ctx, variance, floor, "SUM"), "SQRT"), "DIV")


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
        return _affine(ctx, input, _standardize(ctx, input, _traced(input), axes, eps), weight, bias)
    with ctx.unhooked():
        scale = (running_var.detach().double() + eps).rsqrt() * (1 if weight is None else weight.detach().double())
        shift = (0 if bias is None else bias.detach().double()) - running_mean.detach().double() * scale
        arrays = [values.to(input.dtype).cpu().numpy() for values in (shift, scale, torch.ones_like(scale))]
    extents = _extents(input)
    x = _traced(input) if len(extents) > 3 else _reshape(ctx, _traced(input), [*extents, *[1] * (4 - len(extents))])
    y = ctx.network.add_scale_nd(x, trt.ScaleMode.CHANNEL, *arrays, 1).get_output(0)
    return y if len(extents) > 3 else _reshape(ctx, y, extents)


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
    extents = _extents(input)
    grouped = [extents[0], num_groups, extents[1] // num_groups, *extents[2:]]
    y = _standardize(ctx, input, _reshape(ctx, _traced(input), grouped), list(range(2, len(grouped))), eps)
    return _affine(ctx, input, _reshape(ctx, y, extents), weight, bias)


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
    return _affine(ctx, input, _standardize(ctx, input, _traced(input), list(range(2, input.dim())), eps), weight, bias)


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
    if input.dim() != n + 2 or any(hasattr(t, "_trt") and ctx.flow.origin(t) for t in (weight, bias) if t is not None):
        raise NotImplementedError(
            f"{ctx.method_str} of an input without batch axis, or of weights that depend on the input."
        )
    step, pad, more, spread = (_pair(value, n) for value in (stride, padding, output_padding, dilation))
    with ctx.unhooked():
        kernel = weight.detach().cpu().numpy()
        offset = trt.Weights(host.torch_dtype_to_trt(weight.dtype)) if bias is None else bias.detach().cpu().numpy()
    x, extents = _traced(input), _extents(input)
    if n == 1:  # TensorRT has it for two and three axes
        x, extents, kernel = _reshape(ctx, x, [*extents, 1]), [*extents, 1], kernel[..., None]
        step, pad, more, spread = (*step, 1), (*pad, 0), (*more, 0), (*spread, 1)
    # TensorRT only cuts from the full result: where output_padding passes it, the input gets zeros at the end.
    zeros = [max(0, -((p - m) // s)) for s, p, m in zip(step, pad, more, strict=True)]
    if any(zeros):
        size = [*extents[:2], *(extent + z for extent, z in zip(extents[2:], zeros, strict=True))]
        x = _slice(ctx, x, [0] * len(size), size, None, SLICE_MODES.FILL, _itensor(ctx, 0.0, input, 0))
    maps = kernel.shape[1] * groups
    layer = ctx.network.add_deconvolution_nd(x, maps, kernel.shape[2:], np.ascontiguousarray(kernel), offset)
    layer.stride_nd, layer.dilation_nd, layer.num_groups = step, spread, groups
    layer.pre_padding = pad
    layer.post_padding = tuple(p - m + z * s for p, m, z, s in zip(pad, more, zeros, step, strict=True))
    y = layer.get_output(0)
    return _drop_last(ctx, y) if n == 1 else y
