"""What our converters for torch2trt are made of: their registration, shapes that may change, and TensorRT's layers.

The converters themselves are in torch2trt_converters.py (values) and torch2trt_shapes.py (shapes, windows). They replace
torch2trt's own where those are wrong or absent, for the layers that networks with adder layers use: VGG, DenseNet,
MobileNet, ShuffleNet, U-Net, YOLO and SSD. Each uses layers that TensorRT 8.5 to 11 share, and follows every argument of the
PyTorch function; what it cannot follow raises NotImplementedError. Shapes are never taken from the example input: an
extent that may change at run time is read from the network's tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tensorrt as trt
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch2trt import tensorrt_converter

from ..trt import api
from .host import host

ITensor: TypeAlias = Any  # trt.ITensor
Extent: TypeAlias = int  # a plain int, or torch2trt's IntWrapper where it is known at run time only
Context: TypeAlias = Any  # tracing.ConversionContext
SLICE_MODES = api.slice_modes(trt)
RESIZE_MODES = api.resize_modes(trt)


# ---- registration


def converts(*names: str) -> Callable[[Callable[..., ITensor | None]], Callable[..., ITensor | None]]:
    """Registers a function as the converter of the PyTorch functions `names`, in the place of torch2trt's own.

    A converter that a third party registered for the same function before stays; one registered later replaces ours.

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


def tensors_of_network(tensor: Tensor) -> ITensor:
    """The TensorRT tensor of a tensor of the network."""
    return tensor._trt  # type: ignore[attr-defined]


def shape_of(tensor: Tensor) -> list[int]:
    with host.use_shape_wrapping(False):
        return list(tensor.shape)


def extents_of(tensor: Tensor) -> list[Extent]:
    """The shape of a tensor, as it will be in the engine."""
    shape = shape_of(tensor)
    if not hasattr(tensor, "_trt"):
        return shape
    fixed = list(tensors_of_network(tensor).shape)
    if min(fixed, default=0) >= 0:
        return shape
    wrapped = host._size_wrapper(tensor)
    return [extent if known >= 0 else wrapped[i] for i, (extent, known) in enumerate(zip(shape, fixed, strict=True))]


def plain_value(extent: Extent) -> int:
    """The extent in the example, as an int that adds no layers to the network."""
    return int.__add__(extent, 0)


def is_fixed(extents: Sequence[Extent]) -> bool:
    return not any(isinstance(extent, host.IntWrapper) for extent in extents)


def given_arguments(ctx: Context, values: Sequence[Extent]) -> list[Extent]:
    """Extents that the network's code has computed, which are plain ints where all inputs have one shape."""
    network = ctx.network._network
    varies = any(min(network.get_input(i).shape, default=0) < 0 for i in range(network.num_inputs))
    return list(values) if varies else list(map(plain_value, values))


def as_shape(ctx: Context, extents: Sequence[Extent]) -> ITensor:
    return host.make_size_wrapper(extents)._trt


def add_reshape(ctx: Context, itensor: ITensor, extents: Sequence[Extent]) -> ITensor:
    layer = ctx.network.add_shuffle(itensor)
    unknown = [isinstance(extent, host.IntWrapper) for extent in extents]
    if sum(unknown) + list(map(plain_value, extents)).count(-1) <= 1 and 0 not in map(plain_value, extents):
        layer.reshape_dims = tuple(-1 if u else plain_value(e) for u, e in zip(unknown, extents, strict=True))
    else:
        layer.zero_is_placeholder = False
        layer.set_input(1, as_shape(ctx, extents))
    return layer.get_output(0)


def add_slice(
    ctx: Context,
    itensor: ITensor,
    start: Sequence[Extent],
    size: Sequence[Extent],
    stride: Sequence[int] | None = None,
    mode: Any = None,
    fill: ITensor | None = None,
) -> ITensor:
    stride = [1] * len(start) if stride is None else stride
    fixed = is_fixed((*start, *size))
    dims = [tuple(map(plain_value, values)) for values in (start, size, stride)]
    layer = ctx.network.add_slice(itensor, *dims)
    if not fixed:
        for i, values in enumerate((start, size, stride), 1):
            layer.set_input(i, as_shape(ctx, values))
    if mode is not None:
        layer.mode = mode
    if fill is not None:
        layer.set_input(4, fill)
    return layer.get_output(0)


def axis_of(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def axes_of(dim: Any, ndim: int) -> list[int]:
    """The axes that `dim` names: an int, a sequence, or None or () for all."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(ndim))
    return [axis_of(d, ndim) for d in ([dim] if isinstance(dim, int) else dim)]


def _mask(axes: Sequence[int]) -> int:
    return sum(1 << axis for axis in set(axes))


def pair_of(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return tuple(map(plain_value, values * n if len(values) == 1 else values))


# ---- tensors and their layers


def itensor_of(ctx: Context, value: Tensor | float, like: Tensor, ndim: int) -> ITensor:
    """An operand of at least `ndim` axes: a tensor of the network, or a constant in the type of `like`."""
    if isinstance(value, host.IntWrapper):
        raise NotImplementedError(
            f"{ctx.method_str}: arithmetic of a tensor with an extent of a shape; use a plain number."
        )
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
        extents = extents_of(value)
    return add_reshape(ctx, itensor, [1] * extra + extents)


def add_binary(ctx: Context, a: ITensor, b: ITensor, operation: str) -> ITensor:
    return ctx.network.add_elementwise(a, b, getattr(trt.ElementWiseOperation, operation)).get_output(0)


def add_unary(ctx: Context, a: ITensor, operation: str) -> ITensor:
    return ctx.network.add_unary(a, getattr(trt.UnaryOperation, operation)).get_output(0)


def add_activation(ctx: Context, a: ITensor, kind: str, alpha: float = 0.0, beta: float = 0.0) -> ITensor:
    layer = ctx.network.add_activation(a, getattr(trt.ActivationType, kind))
    layer.alpha, layer.beta = alpha, beta
    return layer.get_output(0)


def add_reduce(ctx: Context, a: ITensor, operation: str, axes: Sequence[int], keepdim: bool) -> ITensor:
    return ctx.network.add_reduce(a, getattr(trt.ReduceOperation, operation), _mask(axes), keepdim).get_output(0)


def add_arithmetic(ctx: Context, a: Any, b: Any, operation: str, alpha: float = 1) -> ITensor:
    """a (operation) alpha * b, each a tensor or a number."""
    like, ndim = next(t for t in (a, b) if isinstance(t, Tensor)), ctx.method_return.dim()
    left, right = itensor_of(ctx, a, like, ndim), itensor_of(ctx, b, like, ndim)
    if alpha != 1:
        right = add_binary(ctx, right, itensor_of(ctx, alpha, like, ndim), "PROD")
    return add_binary(ctx, left, right, operation)


def drop_last(ctx: Context, itensor: ITensor) -> ITensor:
    layer = ctx.network.add_shuffle(itensor)
    layer.reshape_dims = (0, 0, 0)  # each as it is
    return layer.get_output(0)


# ---- arithmetic with extents


def make_extents_exact() -> None:
    """torch2trt's ints of shapes would cut a float operand to an int, so that height * 1.5 is height."""
    for name in ("add", "sub", "mul", "floordiv"):
        for method in (f"__{name}__", f"__r{name}__"):
            setattr(host.IntWrapper, method, _with_ints_only(getattr(host.IntWrapper, method)))


def _with_ints_only(theirs: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def ours(self: Any, other: Any) -> Any:
        return theirs(self, other) if isinstance(other, int) else NotImplemented

    return ours
