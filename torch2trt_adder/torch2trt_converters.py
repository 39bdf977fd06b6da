"""Converters that replace torch2trt's own where those are wrong or absent. tracing.py imports it; it needs torch2trt.

Only layers that networks with adder layers use are here: pooling, padding, shapes, slices, activations and arithmetic of VGG,
DenseNet, MobileNet, ShuffleNet, U-Net, YOLO and SSD. Each is built from layers that TensorRT 8.5 to 11 share, and follows
every argument of the PyTorch function; what it cannot follow raises NotImplementedError. Shapes are never taken from
the example input: an extent that may change at run time is read from the network's tensor.

A converter that someone else registered for the same function before this file was imported stays, and one that is
registered later replaces ours: see `converts`.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorrt as trt
import torch
import torch2trt  # noqa: F401
from torch import Tensor
from torch2trt import tensorrt_converter
from torch.utils._pytree import tree_leaves

host = sys.modules["torch2trt.torch2trt"]  # the attribute torch2trt.torch2trt is the function
ITensor: TypeAlias = Any  # trt.ITensor
Extent: TypeAlias = int  # a plain int, or torch2trt's IntWrapper where it is known at run time only
Context: TypeAlias = Any  # tracing.ConversionContext

_SLICE_MODES = getattr(trt, "SampleMode", None) or trt.SliceMode  # renamed in TensorRT 8.5
_RESIZE_MODES = getattr(trt, "InterpolationMode", None) or trt.ResizeMode


# ---- registration


def converts(*names: str) -> Callable[[Callable[..., ITensor | None]], Callable[..., ITensor | None]]:
    """Registers a function as the converter of the PyTorch functions `names`, in the place of torch2trt's own.

    The function gets the context and the call's arguments, and returns the result's TensorRT tensor, or None where it has set
    those of several results. Calls without a tensor of the network are left to PyTorch: their results are constants.
    """

    def register(convert: Callable[..., ITensor | None]) -> Callable[..., ITensor | None]:
        def converter(ctx: Context) -> None:
            leaves = tree_leaves((ctx.method_args, ctx.method_kwargs))
            if ctx.method_return is NotImplemented or not any(hasattr(leaf, "_trt") for leaf in leaves):
                return
            itensor = convert(ctx, *ctx.method_args, **ctx.method_kwargs)
            if itensor is not None:
                traced = next(leaf for leaf in leaves if hasattr(leaf, "_trt"))
                if isinstance(traced, Tensor) and ctx.method_return.dtype is not traced.dtype:
                    raise NotImplementedError(
                        f"{ctx.method_str} of a {traced.dtype} tensor with a result of type {ctx.method_return.dtype}; an "
                        "engine here keeps the type."
                    )
                ctx.method_return._trt = itensor

        for name in names:
            known = host.CONVERTERS.get(name)
            if known is None or known["converter"].__module__.partition(".")[0] == "torch2trt":
                tensorrt_converter(name)(converter)
        return convert

    return register


# ---- shapes: an extent is a plain int where the network's tensor has it fixed


def _shape(tensor: Tensor) -> list[int]:
    with host.use_shape_wrapping(False):
        return list(tensor.shape)


def _extents(tensor: Tensor) -> list[Extent]:
    """The shape of a tensor, as it will be in the engine."""
    shape = _shape(tensor)
    if not hasattr(tensor, "_trt"):
        return shape
    fixed = list(tensor._trt.shape)
    if min(fixed, default=0) >= 0:
        return shape
    wrapped = host._size_wrapper(tensor)
    return [extent if known >= 0 else wrapped[i] for i, (extent, known) in enumerate(zip(shape, fixed, strict=True))]


def _plain(extent: Extent) -> int:
    """The extent in the example, as an int that adds no layers to the network."""
    return int.__add__(extent, 0)


def _is_fixed(extents: Sequence[Extent]) -> bool:
    return not any(isinstance(extent, host.IntWrapper) for extent in extents)


def _given(ctx: Context, values: Sequence[Extent]) -> list[Extent]:
    """Extents that the network's code has computed, which are plain ints where all inputs have one shape."""
    network = ctx.network._network
    varies = any(min(network.get_input(i).shape, default=0) < 0 for i in range(network.num_inputs))
    return list(values) if varies else list(map(_plain, values))


def _as_shape(ctx: Context, extents: Sequence[Extent]) -> ITensor:
    return host.make_size_wrapper(extents)._trt


def _reshape(ctx: Context, itensor: ITensor, extents: Sequence[Extent]) -> ITensor:
    layer = ctx.network.add_shuffle(itensor)
    unknown = [isinstance(extent, host.IntWrapper) for extent in extents]
    if sum(unknown) + list(map(_plain, extents)).count(-1) <= 1 and 0 not in map(_plain, extents):
        layer.reshape_dims = tuple(-1 if u else _plain(e) for u, e in zip(unknown, extents, strict=True))
    else:
        layer.zero_is_placeholder = False
        layer.set_input(1, _as_shape(ctx, extents))
    return layer.get_output(0)


def _slice(
    ctx: Context,
    itensor: ITensor,
    start: Sequence[Extent],
    size: Sequence[Extent],
    stride: Sequence[int] | None = None,
    mode: Any = None,
    fill: ITensor | None = None,
) -> ITensor:
    stride = [1] * len(start) if stride is None else stride
    fixed = _is_fixed((*start, *size))
    dims = [tuple(map(_plain, values)) for values in (start, size, stride)]
    layer = ctx.network.add_slice(itensor, *dims)
    if not fixed:
        for i, values in enumerate((start, size, stride), 1):
            layer.set_input(i, _as_shape(ctx, values))
    if mode is not None:
        layer.mode = mode
    if fill is not None:
        layer.set_input(4, fill)
    return layer.get_output(0)


def _axis(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def _axes(dim: Any, ndim: int) -> list[int]:
    """The axes that `dim` names: an int, a sequence, or None or () for all."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(ndim))
    return [_axis(d, ndim) for d in ([dim] if isinstance(dim, int) else dim)]


def _mask(axes: Sequence[int]) -> int:
    return sum(1 << axis for axis in set(axes))


def _pair(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return tuple(map(_plain, values * n if len(values) == 1 else values))


# ---- tensors and arithmetic


def _itensor(ctx: Context, value: Tensor | float, like: Tensor, ndim: int) -> ITensor:
    """An operand of at least `ndim` axes: a tensor of the network, or a constant in the type of `like`."""
    if isinstance(value, host.IntWrapper):
        raise NotImplementedError(f"{ctx.method_str}: arithmetic of a tensor with an extent of a shape; use a plain number.")
    if not isinstance(value, Tensor):
        with ctx.unhooked():
            array = torch.full([1] * ndim, value, dtype=like.dtype).numpy()
        return ctx.network.add_constant(array.shape, array).get_output(0)
    if value.dtype is not like.dtype:
        raise NotImplementedError(
            f"{ctx.method_str} of a {like.dtype} and a {value.dtype} tensor: TensorRT does not promote types; convert one."
        )
    itensor = getattr(value, "_trt", None)
    if itensor is None:
        with ctx.unhooked():
            array = value.detach().cpu().numpy()
        itensor = ctx.network.add_constant(array.shape, array).get_output(0)
    extra = ndim - len(itensor.shape)
    if extra <= 0:
        return itensor
    extents = list(itensor.shape)
    if min(extents, default=0) < 0:
        extents = _extents(value)
    return _reshape(ctx, itensor, [1] * extra + extents)


def _binary(ctx: Context, a: ITensor, b: ITensor, operation: str) -> ITensor:
    return ctx.network.add_elementwise(a, b, getattr(trt.ElementWiseOperation, operation)).get_output(0)


def _unary(ctx: Context, a: ITensor, operation: str) -> ITensor:
    return ctx.network.add_unary(a, getattr(trt.UnaryOperation, operation)).get_output(0)


def _activation(ctx: Context, a: ITensor, kind: str, alpha: float = 0.0, beta: float = 0.0) -> ITensor:
    layer = ctx.network.add_activation(a, getattr(trt.ActivationType, kind))
    layer.alpha, layer.beta = alpha, beta
    return layer.get_output(0)


def _reduce(ctx: Context, a: ITensor, operation: str, axes: Sequence[int], keepdim: bool) -> ITensor:
    return ctx.network.add_reduce(a, getattr(trt.ReduceOperation, operation), _mask(axes), keepdim).get_output(0)


def _arithmetic(ctx: Context, a: Any, b: Any, operation: str, alpha: float = 1) -> ITensor:
    """a (operation) alpha * b, each a tensor or a number."""
    like, ndim = next(t for t in (a, b) if isinstance(t, Tensor)), ctx.method_return.dim()
    left, right = _itensor(ctx, a, like, ndim), _itensor(ctx, b, like, ndim)
    if alpha != 1:
        right = _binary(ctx, right, _itensor(ctx, alpha, like, ndim), "PROD")
    return _binary(ctx, left, right, operation)


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
        raise NotImplementedError(f"{ctx.method_str} with rounding_mode={rounding_mode!r}; divide, then call torch.floor.")
    return _arithmetic(ctx, input, other, "DIV")


@converts("torch.pow", "torch.Tensor.pow", "torch.Tensor.__pow__", "torch.square", "torch.Tensor.square")
def convert_pow(ctx: Context, input: Any, exponent: Any = 2, *, out: None = None) -> ITensor:
    if isinstance(exponent, (int, float)) and exponent == 2:  # exact for either sign, at any precision
        return _binary(ctx, input._trt, input._trt, "PROD")
    return _arithmetic(ctx, input, exponent, "POW")


# ---- activations


@converts("torch.Tensor.relu_")
def convert_relu_(ctx: Context, input: Tensor) -> ITensor:
    return _activation(ctx, input._trt, "RELU")


@converts("torch.Tensor.sigmoid_", "torch.sigmoid_")
def convert_sigmoid_(ctx: Context, input: Tensor) -> ITensor:
    return _activation(ctx, input._trt, "SIGMOID")


@converts("torch.Tensor.tanh", "torch.Tensor.tanh_")
def convert_tanh(ctx: Context, input: Tensor) -> ITensor:
    return _activation(ctx, input._trt, "TANH")


@converts("torch.nn.functional.hardtanh", "torch.nn.functional.hardtanh_")  # nn.ReLU6 calls it
def convert_hardtanh(
    ctx: Context, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> ITensor:
    return _activation(ctx, input._trt, "CLIP", min_val, max_val)


@converts("torch.clamp_", "torch.Tensor.clamp_")
def convert_clamp_(ctx: Context, input: Tensor, min: Any = None, max: Any = None) -> ITensor:
    itensor = input._trt
    for bound, operation in ((min, "MAX"), (max, "MIN")):
        if bound is not None:
            itensor = _binary(ctx, itensor, _itensor(ctx, bound, input, input.dim()), operation)
    return itensor


@converts("torch.nn.functional.hardsigmoid")
def convert_hardsigmoid(ctx: Context, input: Tensor, inplace: bool = False) -> ITensor:
    return _activation(ctx, input._trt, "HARD_SIGMOID", 1 / 6, 0.5)


@converts("torch.nn.functional.hardswish")
def convert_hardswish(ctx: Context, input: Tensor, inplace: bool = False) -> ITensor:
    return _binary(ctx, input._trt, _activation(ctx, input._trt, "HARD_SIGMOID", 1 / 6, 0.5), "PROD")


@converts("torch.nn.functional.softplus")
def convert_softplus(ctx: Context, input: Tensor, beta: float = 1, threshold: float = 20) -> ITensor:
    # PyTorch's threshold only avoids an overflow: the difference beyond it is below 1e-8.
    return _activation(ctx, input._trt, "SOFTPLUS", 1 / beta, beta)


@converts("torch.nn.functional.mish")
def convert_mish(ctx: Context, input: Tensor, inplace: bool = False) -> ITensor:
    softplus = _activation(ctx, input._trt, "SOFTPLUS", 1, 1)
    return _binary(ctx, input._trt, _activation(ctx, softplus, "TANH"), "PROD")


@converts("torch.nn.functional.gelu")
def convert_gelu(ctx: Context, input: Tensor, approximate: str = "none") -> ITensor:
    x, ndim = input._trt, input.dim()

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
    layer = ctx.network.add_softmax(input._trt)
    layer.axes = 1 << _softmax_axis(dim, input.dim())
    return layer.get_output(0)


@converts("torch.nn.functional.log_softmax", "torch.log_softmax", "torch.Tensor.log_softmax")
def convert_log_softmax(
    ctx: Context, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> ITensor:
    # The logarithm of a softmax would be -inf where the softmax underflows.
    axes = [_softmax_axis(dim, input.dim())]
    x = _binary(ctx, input._trt, _reduce(ctx, input._trt, "MAX", axes, True), "SUB")
    total = _reduce(ctx, _unary(ctx, x, "EXP"), "SUM", axes, True)
    return _binary(ctx, x, _unary(ctx, total, "LOG"), "SUB")


# ---- reductions


@converts("torch.mean", "torch.Tensor.mean")
def convert_mean(
    ctx: Context, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> ITensor:
    return _reduce(ctx, input._trt, "AVG", _axes(dim, input.dim()), keepdim)


@converts("torch.sum", "torch.Tensor.sum")
def convert_sum(
    ctx: Context, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> ITensor:
    return _reduce(ctx, input._trt, "SUM", _axes(dim, input.dim()), keepdim)


def _extreme(ctx: Context, operation: str, input: Tensor, dim: Any, keepdim: bool) -> ITensor | None:
    if isinstance(dim, Tensor):  # of two tensors, element by element
        return _arithmetic(ctx, input, dim, operation)
    result = ctx.method_return
    itensor = _reduce(ctx, input._trt, operation, _axes(dim, input.dim()), keepdim)
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
    x, axes = input._trt, _axes(dim, input.dim())
    if p == 2:
        norm = _unary(ctx, _reduce(ctx, _binary(ctx, x, x, "PROD"), "SUM", axes, True), "SQRT")
    elif p == 1:
        norm = _reduce(ctx, _unary(ctx, x, "ABS"), "SUM", axes, True)
    else:
        raise NotImplementedError(f"{ctx.method_str} with p={p}: an engine here normalizes by p = 1 or 2.")
    return _binary(ctx, x, _binary(ctx, norm, _itensor(ctx, eps, input, input.dim()), "MAX"), "DIV")


# ---- shapes


@converts("torch.reshape", "torch.Tensor.reshape", "torch.Tensor.view")
def convert_reshape(ctx: Context, input: Tensor, *size: Any, shape: Any = None) -> ITensor:
    wanted = size if shape is None else (shape,)
    if len(wanted) == 1 and isinstance(wanted[0], torch.dtype):
        raise NotImplementedError(f"{ctx.method_str}({wanted[0]}): an engine does not reinterpret bits.")
    extents = _given(ctx, wanted[0] if len(wanted) == 1 and isinstance(wanted[0], (list, tuple)) else wanted)
    if _is_fixed(_extents(input)):
        extents = list(map(_plain, extents))
    return _reshape(ctx, input._trt, extents)


@converts("torch.flatten", "torch.Tensor.flatten")
def convert_flatten(ctx: Context, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> ITensor:
    extents = _extents(input) or [1]
    first, last = _axis(start_dim, len(extents)), _axis(end_dim, len(extents))
    middle = extents[first : last + 1]
    merged = math.prod(map(_plain, middle))
    if not _is_fixed(middle):
        merged = middle[0]
        for extent in middle[1:]:
            merged = merged * extent
    return _reshape(ctx, input._trt, [*extents[:first], merged, *extents[last + 1 :]])


@converts("torch.squeeze", "torch.Tensor.squeeze")
def convert_squeeze(ctx: Context, input: Tensor, dim: Any = None) -> ITensor:
    extents = _extents(input)
    axes = _axes(dim, len(extents))
    for axis in axes:
        if isinstance(extents[axis], host.IntWrapper) and (dim is not None or _plain(extents[axis]) == 1):
            raise NotImplementedError(
                f"{ctx.method_str}: axis {axis} has more than one extent in this engine; name the axes to remove."
            )
    return _reshape(ctx, input._trt, [e for a, e in enumerate(extents) if not (a in axes and _plain(e) == 1)])


@converts("torch.unsqueeze", "torch.Tensor.unsqueeze")
def convert_unsqueeze(ctx: Context, input: Tensor, dim: int) -> ITensor:
    extents = _extents(input)
    extents.insert(_axis(dim, len(extents) + 1), 1)
    return _reshape(ctx, input._trt, extents)


@converts("torch.permute", "torch.Tensor.permute")
def convert_permute(ctx: Context, input: Tensor, *axes: Any, dims: Any = None) -> ITensor:
    order = dims if dims is not None else axes[0] if isinstance(axes[0], (list, tuple)) else axes
    layer = ctx.network.add_shuffle(input._trt)
    layer.second_transpose = tuple(_axis(d, input.dim()) for d in order)
    return layer.get_output(0)


@converts("torch.transpose", "torch.Tensor.transpose")
def convert_transpose(ctx: Context, input: Tensor, dim0: int, dim1: int) -> ITensor:
    order = list(range(input.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    layer = ctx.network.add_shuffle(input._trt)
    layer.second_transpose = tuple(order)
    return layer.get_output(0)


@converts("torch.nn.functional.channel_shuffle", "torch.channel_shuffle")
def convert_channel_shuffle(ctx: Context, input: Tensor, groups: int) -> ITensor:
    n, c, *others = _extents(input)
    layer = ctx.network.add_shuffle(_reshape(ctx, input._trt, [n, groups, c // groups, *others]))
    layer.second_transpose = (0, 2, 1, *range(3, 3 + len(others)))
    return _reshape(ctx, layer.get_output(0), [n, c, *others])


def _expand(ctx: Context, input: Tensor, extents: Sequence[Extent]) -> ITensor:
    """`input` repeated to `extents`; -1 keeps an axis."""
    ndim = len(extents)
    itensor = _itensor(ctx, input, input, ndim)
    own = [1] * (ndim - input.dim()) + _extents(input)
    size = [have if _plain(want) == -1 else want for have, want in zip(own, extents, strict=True)]
    stride = [int(isinstance(have, host.IntWrapper) or have != 1) for have in own]
    return _slice(ctx, itensor, [0] * ndim, size, stride)


@converts("torch.Tensor.expand")
def convert_expand(ctx: Context, input: Tensor, *sizes: Any) -> ITensor | None:
    return _expand(ctx, input, _given(ctx, sizes[0] if isinstance(sizes[0], (list, tuple)) else sizes))


@converts("torch.Tensor.expand_as")
def convert_expand_as(ctx: Context, input: Tensor, other: Tensor) -> ITensor:
    return _expand(ctx, input, _extents(other))


@converts("torch.stack")
def convert_stack(ctx: Context, tensors: Sequence[Tensor], dim: int = 0, *, out: None = None) -> ITensor:
    axis = _axis(dim, tensors[0].dim() + 1)
    parts = []
    for tensor in tensors:
        extents = _extents(tensor)
        parts.append(_reshape(ctx, _itensor(ctx, tensor, tensors[0], 0), [*extents[:axis], 1, *extents[axis:]]))
    layer = ctx.network.add_concatenation(parts)
    layer.axis = axis
    return layer.get_output(0)


@converts("torch.cat", "torch.concat", "torch.concatenate")
def convert_cat(ctx: Context, tensors: Sequence[Tensor], dim: int = 0, *, out: None = None) -> ITensor:
    parts = [t for t in tensors if _shape(t) != [0]]  # PyTorch skips these, whatever the others are
    layer = ctx.network.add_concatenation([_itensor(ctx, tensor, parts[0], 0) for tensor in parts])
    layer.axis = _axis(dim, parts[0].dim())
    return layer.get_output(0)


# ---- slices


@converts("torch.chunk", "torch.Tensor.chunk", "torch.split", "torch.Tensor.split", "torch.unbind", "torch.Tensor.unbind")
def convert_split(ctx: Context, input: Tensor, *sizes: Any, dim: int | None = None, **named: Any) -> None:
    unbinds = ctx.method_str.endswith("unbind")
    positional = sizes[:1] if unbinds else sizes[1:2]
    axis = _axis(dim if dim is not None else positional[0] if positional else 0, input.dim())
    extents, offset = _extents(input), 0
    if isinstance(extents[axis], host.IntWrapper):
        raise NotImplementedError(f"{ctx.method_str} along axis {axis}, whose extent differs between inputs.")
    for output in ctx.method_return:
        start, size = [0] * len(extents), list(extents)
        start[axis], size[axis] = offset, 1 if unbinds else _shape(output)[axis]
        offset += size[axis]
        output._trt = _slice(ctx, input._trt, start, size)
        if unbinds:
            output._trt = _reshape(ctx, output._trt, [*size[:axis], *size[axis + 1 :]])


@converts("torch.narrow", "torch.Tensor.narrow")
def convert_narrow(ctx: Context, input: Tensor, dim: int, start: int, length: int) -> ITensor:
    size = _extents(input)
    begin, axis = [0] * len(size), _axis(dim, len(size))
    begin[axis], size[axis] = start + size[axis] if start < 0 else start, length
    return _slice(ctx, input._trt, begin, size)


@converts("torch.Tensor.__getitem__")
def convert_getitem(ctx: Context, input: Tensor, index: Any) -> ITensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    parts = [int(part) if isinstance(part, np.integer) else part for part in parts]
    for part in parts:
        if not (part is None or part is Ellipsis or isinstance(part, (slice, list, Tensor)) or _is_int(part)):
            raise NotImplementedError(f"{ctx.method_str}: an index of type {type(part).__name__}.")
    named = sum(part is not None and part is not Ellipsis for part in parts)
    everything = [slice(None)] * (input.dim() - named)
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[at : at + 1] = everything

    extents, axis = _extents(input), 0
    start, size, stride = [0] * len(extents), list(extents), [1] * len(extents)
    result: list[Extent] = []
    gathered: tuple[int, Any] | None = None
    for part in parts:
        if part is None:
            result.append(1)
            continue
        if isinstance(part, slice):
            start[axis], size[axis], stride[axis] = _slice_of(ctx, part, extents[axis])
            result.append(size[axis])
        elif _is_int(part):
            (at,) = _given(ctx, [part])
            start[axis], size[axis] = at + extents[axis] if at < 0 else at, 1
        else:
            with ctx.unhooked():
                indices = torch.as_tensor(part)
            if gathered is not None or indices.dtype is torch.bool or indices.dim() != 1 or ctx.flow.origin(part):
                raise NotImplementedError(
                    f"{ctx.method_str}: at most one list of constant integers may be an index, got {type(part).__name__} of "
                    f"{indices.dtype}, shape {list(indices.shape)}."
                )
            with ctx.unhooked():
                extent = _plain(extents[axis])
                gathered = axis, (indices.cpu() % extent).to(torch.int32).numpy()
            result.append(len(gathered[1]))
        axis += 1
    itensor = input._trt
    if gathered is not None:  # PyTorch moves the axis to the front where an integer stands apart from the list
        if any(_is_int(part) for part in parts):
            raise NotImplementedError(f"{ctx.method_str}: a list and an integer as indices at once; index twice.")
        indices = ctx.network.add_constant(gathered[1].shape, gathered[1]).get_output(0)
        itensor = ctx.network.add_gather(itensor, indices, gathered[0]).get_output(0)
        size[gathered[0]] = len(gathered[1])
    if any(_is_int(part) or (isinstance(part, slice) and part != slice(None)) for part in parts):
        itensor = _slice(ctx, itensor, start, size, stride)
    return _reshape(ctx, itensor, result) if any(part is None or _is_int(part) for part in parts) else itensor


def _is_int(part: Any) -> bool:
    return isinstance(part, int) and not isinstance(part, bool)


def _slice_of(ctx: Context, part: slice, extent: Extent) -> tuple[Extent, Extent, int]:
    """Start, size and step of a slice of an axis, which Python cuts to its extent."""
    if not isinstance(extent, host.IntWrapper):
        values = [None if v is None else _plain(v) for v in (part.start, part.stop, part.step)]
        start, stop, step = slice(*values).indices(extent)
        return start, max(0, -(-(stop - start) // step)), step
    start, stop, step = part.start or 0, part.stop, _plain(part.step or 1)
    begin = start + extent if start < 0 else start
    # At run time nothing cuts a bound to the axis: one that the example passes would be read past its end.
    if _plain(begin) > _plain(extent) or (stop is not None and _plain(stop) > _plain(extent)):
        raise NotImplementedError(
            f"{ctx.method_str}: {part} passes the end of an axis whose extent differs between inputs."
        )
    end = extent if stop is None else stop + extent if stop < 0 else stop
    length = end - begin
    return begin, (length if step == 1 else (length + (step - 1)) // step), step


# ---- padding and resizing


@converts("torch.nn.functional.pad")
def convert_pad(
    ctx: Context, input: Tensor, pad: Sequence[Extent], mode: str = "constant", value: float | None = None
) -> ITensor:
    extents = _extents(input)
    start, size, fixed = [0] * len(extents), list(extents), _is_fixed(extents)
    for i in range(len(pad) // 2):
        axis = len(extents) - 1 - i
        before, after = (_plain(p) if fixed else p for p in pad[2 * i : 2 * i + 2])
        start[axis], size[axis] = 0 - before, extents[axis] + before + after
    modes = {"constant": "FILL", "reflect": "REFLECT", "replicate": "CLAMP", "circular": "WRAP"}
    fill = _itensor(ctx, value or 0.0, input, 0) if mode == "constant" else None
    return _slice(ctx, input._trt, start, size, None, getattr(_SLICE_MODES, modes[mode]), fill)


@converts("torch.nn.functional.interpolate", "torch.nn.functional.upsample")
def convert_interpolate(
    ctx: Context,
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> ITensor:
    kinds = {"nearest": "NEAREST", "nearest-exact": "NEAREST", "bicubic": "CUBIC"}
    kinds |= dict.fromkeys(("linear", "bilinear", "trilinear"), "LINEAR")
    if mode not in kinds or antialias:
        raise NotImplementedError(f"{ctx.method_str}: mode {mode!r}, antialias={antialias}; modes are {', '.join(kinds)}.")
    layer = ctx.network.add_resize(input._trt)
    layer.resize_mode = getattr(_RESIZE_MODES, kinds[mode])
    transforms = trt.ResizeCoordinateTransformation
    if mode == "nearest":
        layer.coordinate_transformation, layer.nearest_rounding = transforms.ASYMMETRIC, trt.ResizeRoundMode.FLOOR
    elif mode == "nearest-exact":
        layer.coordinate_transformation, layer.nearest_rounding = transforms.HALF_PIXEL, trt.ResizeRoundMode.HALF_UP
    else:
        layer.coordinate_transformation = transforms.ALIGN_CORNERS if align_corners else transforms.HALF_PIXEL
    extents, n = _extents(input), input.dim() - 2
    wanted = size if size is not None else scale_factor
    values = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted] * n
    if size is None and (not recompute_scale_factor or not _is_fixed(extents[2:])):
        if recompute_scale_factor and any(scale != int(scale) for scale in values):
            raise NotImplementedError(f"{ctx.method_str} with recompute_scale_factor of an input without a fixed size.")
        layer.scales = [1.0, 1.0, *map(float, values)]
        return layer.get_output(0)
    if size is None:
        values = _shape(ctx.method_return)[2:]
    values = _given(ctx, values)
    shape = [*extents[:2], *values]
    if _is_fixed(shape):
        layer.shape = tuple(shape)
    else:
        layer.set_input(1, _as_shape(ctx, shape))
    return layer.get_output(0)


# ---- pooling


def _pool(
    ctx: Context,
    input: Tensor,
    average: bool,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    include: bool = True,
    divisor: int | None = None,
) -> ITensor:
    """Pooling as PyTorch counts windows: in ceil mode one more, unless it would start in the padding on the right."""
    name = ctx.method_str.rpartition(".")[2]
    n = int(name[-2])  # max_pool2d
    if input.dim() != n + 2:
        raise NotImplementedError(f"{ctx.method_str} of an input of {input.dim()} axes; add a batch axis.")
    kernel, pad = _pair(kernel_size, n), _pair(padding, n)
    step = kernel if stride is None or stride == [] or stride == () else _pair(stride, n)
    extents, x = _extents(input), input._trt
    outputs = _shape(ctx.method_return)[2:]
    more = []  # padding on the right for the last window
    for i in range(n):
        if ceil_mode and isinstance(extents[2 + i], host.IntWrapper):
            if pad[i] or step[i] > kernel[i]:
                raise NotImplementedError(f"{ctx.method_str} with ceil_mode and padding of an input without a fixed size.")
            more.append(0)
        else:
            more.append(max(0, (outputs[i] - 1) * step[i] + kernel[i] - _plain(extents[2 + i]) - 2 * pad[i]))
    if n == 1:  # TensorRT pools two or three axes
        x = _reshape(ctx, x, [*extents, 1])
        kernel, step, pad, more = (*kernel, 1), (*step, 1), (*pad, 0), [*more, 0]
    partial = average and include and divisor is None and any(more)
    if partial and any(pad):
        # PyTorch counts the padding, but not what the last window passes it by: so the padding becomes part of the input.
        zeros, spatial = _itensor(ctx, 0.0, input, 0), [*extents[2:], *[1] * (n == 1)]
        size = [*extents[:2], *(extent + 2 * p for extent, p in zip(spatial, pad, strict=True))]
        x = _slice(ctx, x, [0, 0, *(-p for p in pad)], size, None, _SLICE_MODES.FILL, zeros)
        pad = (0,) * len(pad)
    layer = ctx.network.add_pooling_nd(x, trt.PoolingType.AVERAGE if average else trt.PoolingType.MAX, kernel)
    layer.stride_nd = step
    layer.pre_padding, layer.post_padding = pad, tuple(p + m for p, m in zip(pad, more, strict=True))
    dynamic = ceil_mode and not _is_fixed(extents[2:])
    layer.padding_mode = trt.PaddingMode.EXPLICIT_ROUND_UP if dynamic else trt.PaddingMode.EXPLICIT_ROUND_DOWN
    if average:
        layer.average_count_excludes_padding = partial or dynamic or (not include and divisor is None)
    y = layer.get_output(0)
    if divisor is not None:
        y = _binary(ctx, y, _itensor(ctx, math.prod(kernel) / divisor, input, len(x.shape)), "PROD")
    return _drop_last(ctx, y) if n == 1 else y


def _drop_last(ctx: Context, itensor: ITensor) -> ITensor:
    layer = ctx.network.add_shuffle(itensor)
    layer.reshape_dims = (0, 0, 0)  # each as it is
    return layer.get_output(0)


@converts(*(f"{place}.max_pool{n}d" for place in ("torch", "torch.nn.functional") for n in (1, 2, 3)))
def convert_max_pool(
    ctx: Context,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> ITensor:
    if return_indices or any(d != 1 for d in _pair(dilation, 1)):
        raise NotImplementedError(f"{ctx.method_str} with dilation {dilation}, return_indices={return_indices}.")
    return _pool(ctx, input, False, kernel_size, stride, padding, ceil_mode)


@converts("torch.avg_pool1d", *(f"torch.nn.functional.avg_pool{n}d" for n in (1, 2, 3)))
def convert_avg_pool(
    ctx: Context,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> ITensor:
    return _pool(ctx, input, True, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _adaptive_pool(ctx: Context, input: Tensor, output_size: Any, average: bool) -> ITensor:
    n = int(ctx.method_str[-2])
    if input.dim() != n + 2:
        raise NotImplementedError(f"{ctx.method_str} of an input of {input.dim()} axes; add a batch axis.")
    sizes = tuple(output_size) if isinstance(output_size, (list, tuple)) else (output_size,) * n
    extents = _extents(input)
    x, operation, ndim = input._trt, "AVG" if average else "MAX", len(extents)
    wanted = {axis: _plain(size) for axis, size in enumerate(sizes, ndim - n) if size is not None}
    ones = [axis for axis, size in wanted.items() if size == 1]
    if ones:
        x = _reduce(ctx, x, operation, ones, True)
    shape = [1 if axis in ones else extent for axis, extent in enumerate(extents)]
    for axis, size in wanted.items():
        if isinstance(shape[axis], host.IntWrapper):
            raise NotImplementedError(
                f"{ctx.method_str} to {size} of an axis whose extent differs between inputs; only 1 is possible."
            )
        if size == shape[axis]:
            continue
        parts = []
        for i in range(size):  # PyTorch's windows, which overlap where the extents do not divide
            start, part = [0] * ndim, list(shape)
            start[axis] = i * shape[axis] // size
            part[axis] = -(-(i + 1) * shape[axis] // size) - start[axis]
            parts.append(_reduce(ctx, _slice(ctx, x, start, part), operation, [axis], True))
        layer = ctx.network.add_concatenation(parts)
        layer.axis, shape[axis] = axis, size
        x = layer.get_output(0)
    return x


@converts(*(f"torch.nn.functional.adaptive_avg_pool{n}d" for n in (1, 2, 3)), "torch.adaptive_avg_pool1d")
def convert_adaptive_avg_pool(ctx: Context, input: Tensor, output_size: Any) -> ITensor:
    return _adaptive_pool(ctx, input, output_size, average=True)


@converts(*(f"torch.nn.functional.adaptive_max_pool{n}d" for n in (1, 2, 3)))
def convert_adaptive_max_pool(ctx: Context, input: Tensor, output_size: Any, return_indices: bool = False) -> ITensor:
    if return_indices:
        raise NotImplementedError(f"{ctx.method_str} with return_indices=True.")
    return _adaptive_pool(ctx, input, output_size, average=False)


# ---- layers with weights


@converts("torch.nn.functional.conv_transpose1d", "torch.nn.functional.conv_transpose2d", "torch.nn.functional.conv_transpose3d")
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
        raise NotImplementedError(f"{ctx.method_str} of an input without batch axis, or of weights that depend on the input.")
    step, pad, more, spread = (_pair(value, n) for value in (stride, padding, output_padding, dilation))
    with ctx.unhooked():
        kernel = weight.detach().cpu().numpy()
        offset = trt.Weights(host.torch_dtype_to_trt(weight.dtype)) if bias is None else bias.detach().cpu().numpy()
    x, extents = input._trt, _extents(input)
    if n == 1:  # TensorRT has it for two and three axes
        x, extents, kernel = _reshape(ctx, x, [*extents, 1]), [*extents, 1], kernel[..., None]
        step, pad, more, spread = (*step, 1), (*pad, 0), (*more, 0), (*spread, 1)
    # TensorRT only cuts from the full result: where output_padding passes it, the input gets zeros at the end.
    zeros = [max(0, -((p - m) // s)) for s, p, m in zip(step, pad, more, strict=True)]
    if any(zeros):
        size = [*extents[:2], *(extent + z for extent, z in zip(extents[2:], zeros, strict=True))]
        x = _slice(ctx, x, [0] * len(size), size, None, _SLICE_MODES.FILL, _itensor(ctx, 0.0, input, 0))
    maps = kernel.shape[1] * groups
    layer = ctx.network.add_deconvolution_nd(x, maps, kernel.shape[2:], np.ascontiguousarray(kernel), offset)
    layer.stride_nd, layer.dilation_nd, layer.num_groups = step, spread, groups
    layer.pre_padding = pad
    layer.post_padding = tuple(p - m + z * s for p, m, z, s in zip(pad, more, zeros, step, strict=True))
    y = layer.get_output(0)
    return _drop_last(ctx, y) if n == 1 else y


# ---- arithmetic with extents


def _exact_extents() -> None:
    """torch2trt's ints of shapes would cut a float operand to an int, so that height * 1.5 is height."""
    for name in ("add", "sub", "mul", "floordiv"):
        for method in (f"__{name}__", f"__r{name}__"):

            def ours(self: Any, other: Any, theirs: Any = getattr(host.IntWrapper, method)) -> Any:
                return theirs(self, other) if isinstance(other, int) else NotImplemented

            setattr(host.IntWrapper, method, ours)


_exact_extents()
