"""Converters for torch2trt that move values: shapes, slices, padding, resizing, pooling."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt
import torch
from torch import Tensor

from .host import host
from .torch2trt_layers import (
    RESIZE_MODES,
    SLICE_MODES,
    Context,
    Extent,
    ITensor,
    add_binary,
    add_reduce,
    add_reshape,
    add_slice,
    as_shape,
    axes_of,
    axis_of,
    converts,
    drop_last,
    extents_of,
    given_arguments,
    is_fixed,
    itensor_of,
    pair_of,
    plain_value,
    shape_of,
    tensors_of_network,
)

# ---- shapes


@converts("torch.reshape", "torch.Tensor.reshape", "torch.Tensor.view")
def convert_reshape(ctx: Context, input: Tensor, *size: Any, shape: Any = None) -> ITensor:
    wanted = size if shape is None else (shape,)
    if len(wanted) == 1 and isinstance(wanted[0], torch.dtype):
        raise NotImplementedError(f"{ctx.method_str}({wanted[0]}): an engine does not reinterpret bits.")
    extents = given_arguments(ctx, wanted[0] if len(wanted) == 1 and isinstance(wanted[0], (list, tuple)) else wanted)
    if is_fixed(extents_of(input)):
        extents = list(map(plain_value, extents))
    return add_reshape(ctx, tensors_of_network(input), extents)


@converts("torch.flatten", "torch.Tensor.flatten")
def convert_flatten(ctx: Context, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> ITensor:
    extents = extents_of(input) or [1]
    first, last = axis_of(start_dim, len(extents)), axis_of(end_dim, len(extents))
    middle = extents[first : last + 1]
    merged = math.prod(map(plain_value, middle))
    if not is_fixed(middle):
        merged = middle[0]
        for extent in middle[1:]:
            merged = merged * extent
    return add_reshape(ctx, tensors_of_network(input), [*extents[:first], merged, *extents[last + 1 :]])


@converts("torch.squeeze", "torch.Tensor.squeeze")
def convert_squeeze(ctx: Context, input: Tensor, dim: Any = None) -> ITensor:
    extents = extents_of(input)
    axes = axes_of(dim, len(extents))
    for axis in axes:
        if isinstance(extents[axis], host.IntWrapper) and (dim is not None or plain_value(extents[axis]) == 1):
            raise NotImplementedError(
                f"{ctx.method_str}: axis {axis} has more than one extent in this engine; name the axes to remove."
            )
    return add_reshape(
        ctx, tensors_of_network(input), [e for a, e in enumerate(extents) if not (a in axes and plain_value(e) == 1)]
    )


@converts("torch.unsqueeze", "torch.Tensor.unsqueeze")
def convert_unsqueeze(ctx: Context, input: Tensor, dim: int) -> ITensor:
    extents = extents_of(input)
    extents.insert(axis_of(dim, len(extents) + 1), 1)
    return add_reshape(ctx, tensors_of_network(input), extents)


@converts("torch.permute", "torch.Tensor.permute")
def convert_permute(ctx: Context, input: Tensor, *axes: Any, dims: Any = None) -> ITensor:
    order = dims if dims is not None else axes[0] if isinstance(axes[0], (list, tuple)) else axes
    layer = ctx.network.add_shuffle(tensors_of_network(input))
    layer.second_transpose = tuple(axis_of(d, input.dim()) for d in order)
    return layer.get_output(0)


@converts("torch.transpose", "torch.Tensor.transpose")
def convert_transpose(ctx: Context, input: Tensor, dim0: int, dim1: int) -> ITensor:
    order = list(range(input.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    layer = ctx.network.add_shuffle(tensors_of_network(input))
    layer.second_transpose = tuple(order)
    return layer.get_output(0)


@converts("torch.nn.functional.channel_shuffle", "torch.channel_shuffle")
def convert_channel_shuffle(ctx: Context, input: Tensor, groups: int) -> ITensor:
    n, c, *others = extents_of(input)
    layer = ctx.network.add_shuffle(add_reshape(ctx, tensors_of_network(input), [n, groups, c // groups, *others]))
    layer.second_transpose = (0, 2, 1, *range(3, 3 + len(others)))
    return add_reshape(ctx, layer.get_output(0), [n, c, *others])


def _expand(ctx: Context, input: Tensor, extents: Sequence[Extent]) -> ITensor:
    """`input` repeated to `extents`; -1 keeps an axis."""
    ndim = len(extents)
    itensor = itensor_of(ctx, input, input, ndim)
    own = [1] * (ndim - input.dim()) + extents_of(input)
    size = [have if plain_value(want) == -1 else want for have, want in zip(own, extents, strict=True)]
    stride = [int(isinstance(have, host.IntWrapper) or have != 1) for have in own]
    return add_slice(ctx, itensor, [0] * ndim, size, stride)


@converts("torch.Tensor.expand")
def convert_expand(ctx: Context, input: Tensor, *sizes: Any) -> ITensor | None:
    return _expand(ctx, input, given_arguments(ctx, sizes[0] if isinstance(sizes[0], (list, tuple)) else sizes))


@converts("torch.Tensor.expand_as")
def convert_expand_as(ctx: Context, input: Tensor, other: Tensor) -> ITensor:
    return _expand(ctx, input, extents_of(other))


@converts("torch.stack")
def convert_stack(ctx: Context, tensors: Sequence[Tensor], dim: int = 0, *, out: None = None) -> ITensor:
    axis = axis_of(dim, tensors[0].dim() + 1)
    parts = []
    for tensor in tensors:
        extents = extents_of(tensor)
        parts.append(add_reshape(ctx, itensor_of(ctx, tensor, tensors[0], 0), [*extents[:axis], 1, *extents[axis:]]))
    layer = ctx.network.add_concatenation(parts)
    layer.axis = axis
    return layer.get_output(0)


@converts("torch.cat", "torch.concat", "torch.concatenate")
def convert_cat(ctx: Context, tensors: Sequence[Tensor], dim: int = 0, *, out: None = None) -> ITensor:
    parts = [t for t in tensors if shape_of(t) != [0]]  # PyTorch skips these, whatever the others are
    layer = ctx.network.add_concatenation([itensor_of(ctx, tensor, parts[0], 0) for tensor in parts])
    layer.axis = axis_of(dim, parts[0].dim())
    return layer.get_output(0)


# ---- slices


@converts(
    "torch.chunk", "torch.Tensor.chunk", "torch.split", "torch.Tensor.split", "torch.unbind", "torch.Tensor.unbind"
)
def convert_split(ctx: Context, input: Tensor, *sizes: Any, dim: int | None = None, **named: Any) -> None:
    unbinds = ctx.method_str.endswith("unbind")
    positional = sizes[:1] if unbinds else sizes[1:2]
    axis = axis_of(dim if dim is not None else positional[0] if positional else 0, input.dim())
    extents, offset = extents_of(input), 0
    if isinstance(extents[axis], host.IntWrapper):
        raise NotImplementedError(f"{ctx.method_str} along axis {axis}, whose extent differs between inputs.")
    for output in ctx.method_return:
        start, size = [0] * len(extents), list(extents)
        start[axis], size[axis] = offset, 1 if unbinds else shape_of(output)[axis]
        offset += size[axis]
        output._trt = add_slice(ctx, tensors_of_network(input), start, size)
        if unbinds:
            output._trt = add_reshape(ctx, tensors_of_network(output), [*size[:axis], *size[axis + 1 :]])


@converts("torch.narrow", "torch.Tensor.narrow")
def convert_narrow(ctx: Context, input: Tensor, dim: int, start: int, length: int) -> ITensor:
    size = extents_of(input)
    begin, axis = [0] * len(size), axis_of(dim, len(size))
    begin[axis], size[axis] = start + size[axis] if start < 0 else start, length
    return add_slice(ctx, tensors_of_network(input), begin, size)


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

    extents, axis = extents_of(input), 0
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
            (at,) = given_arguments(ctx, [part])
            start[axis], size[axis] = at + extents[axis] if at < 0 else at, 1
        else:
            with ctx.unhooked():
                indices = torch.as_tensor(part)
            if gathered is not None or indices.dtype is torch.bool or indices.dim() != 1 or ctx.tracker.origin(part):
                raise NotImplementedError(
                    f"{ctx.method_str}: at most one list of constant integers may be an index, got {type(part).__name__} of "
                    f"{indices.dtype}, shape {list(indices.shape)}."
                )
            with ctx.unhooked():
                extent = plain_value(extents[axis])
                gathered = axis, (indices.cpu() % extent).to(torch.int32).numpy()
            result.append(len(gathered[1]))
        axis += 1
    itensor = tensors_of_network(input)
    if gathered is not None:  # PyTorch moves the axis to the front where an integer stands apart from the list
        if any(_is_int(part) for part in parts):
            raise NotImplementedError(f"{ctx.method_str}: a list and an integer as indices at once; index twice.")
        indices = ctx.network.add_constant(gathered[1].shape, gathered[1]).get_output(0)
        itensor = ctx.network.add_gather(itensor, indices, gathered[0]).get_output(0)
        size[gathered[0]] = len(gathered[1])
    if any(_is_int(part) or (isinstance(part, slice) and part != slice(None)) for part in parts):
        itensor = add_slice(ctx, itensor, start, size, stride)
    return add_reshape(ctx, itensor, result) if any(part is None or _is_int(part) for part in parts) else itensor


def _is_int(part: Any) -> bool:
    return isinstance(part, int) and not isinstance(part, bool)


def _slice_of(ctx: Context, part: slice, extent: Extent) -> tuple[Extent, Extent, int]:
    """Start, size and step of a slice of an axis, which Python cuts to its extent."""
    if not isinstance(extent, host.IntWrapper):
        values = [None if v is None else plain_value(v) for v in (part.start, part.stop, part.step)]
        start, stop, step = slice(*values).indices(extent)
        return start, max(0, -(-(stop - start) // step)), step
    start, stop, step = part.start or 0, part.stop, plain_value(part.step or 1)
    begin = start + extent if start < 0 else start
    # At run time nothing cuts a bound to the axis: one that the example passes would be read past its end.
    if plain_value(begin) > plain_value(extent) or (stop is not None and plain_value(stop) > plain_value(extent)):
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
    extents = extents_of(input)
    start, size, fixed = [0] * len(extents), list(extents), is_fixed(extents)
    for i in range(len(pad) // 2):
        axis = len(extents) - 1 - i
        before, after = (plain_value(p) if fixed else p for p in pad[2 * i : 2 * i + 2])
        start[axis], size[axis] = 0 - before, extents[axis] + before + after
    modes = {"constant": "FILL", "reflect": "REFLECT", "replicate": "CLAMP", "circular": "WRAP"}
    fill = itensor_of(ctx, value or 0.0, input, 0) if mode == "constant" else None
    return add_slice(ctx, tensors_of_network(input), start, size, None, getattr(SLICE_MODES, modes[mode]), fill)


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
        raise NotImplementedError(
            f"{ctx.method_str}: mode {mode!r}, antialias={antialias}; modes are {', '.join(kinds)}."
        )
    layer = ctx.network.add_resize(tensors_of_network(input))
    layer.resize_mode = getattr(RESIZE_MODES, kinds[mode])
    transforms = trt.ResizeCoordinateTransformation
    if mode == "nearest":
        layer.coordinate_transformation, layer.nearest_rounding = transforms.ASYMMETRIC, trt.ResizeRoundMode.FLOOR
    elif mode == "nearest-exact":
        layer.coordinate_transformation, layer.nearest_rounding = transforms.HALF_PIXEL, trt.ResizeRoundMode.HALF_UP
    else:
        layer.coordinate_transformation = transforms.ALIGN_CORNERS if align_corners else transforms.HALF_PIXEL
    extents, n = extents_of(input), input.dim() - 2
    wanted = size if size is not None else scale_factor
    values = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted] * n
    if size is None and (not recompute_scale_factor or not is_fixed(extents[2:])):
        if recompute_scale_factor and any(scale != int(scale) for scale in values):
            raise NotImplementedError(f"{ctx.method_str} with recompute_scale_factor of an input without a fixed size.")
        layer.scales = [1.0, 1.0, *map(float, values)]
        return layer.get_output(0)
    if size is None:
        values = shape_of(ctx.method_return)[2:]
    values = given_arguments(ctx, values)
    shape = [*extents[:2], *values]
    if is_fixed(shape):
        layer.shape = tuple(shape)
    else:
        layer.set_input(1, as_shape(ctx, shape))
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
    kernel, pad = pair_of(kernel_size, n), pair_of(padding, n)
    step = kernel if stride is None or stride == [] or stride == () else pair_of(stride, n)
    extents, x = extents_of(input), tensors_of_network(input)
    outputs = shape_of(ctx.method_return)[2:]
    more = []  # padding on the right for the last window
    for i in range(n):
        if ceil_mode and isinstance(extents[2 + i], host.IntWrapper):
            if pad[i] or step[i] > kernel[i]:
                raise NotImplementedError(
                    f"{ctx.method_str} with ceil_mode and padding of an input without a fixed size."
                )
            more.append(0)
        else:
            more.append(max(0, (outputs[i] - 1) * step[i] + kernel[i] - plain_value(extents[2 + i]) - 2 * pad[i]))
    if n == 1:  # TensorRT pools two or three axes
        x = add_reshape(ctx, x, [*extents, 1])
        kernel, step, pad, more = (*kernel, 1), (*step, 1), (*pad, 0), [*more, 0]
    partial = average and include and divisor is None and any(more)
    if partial and any(pad):
        # PyTorch counts the padding, but not what the last window passes it by: so the padding becomes part of the input.
        zeros, spatial = itensor_of(ctx, 0.0, input, 0), [*extents[2:], *[1] * (n == 1)]
        size = [*extents[:2], *(extent + 2 * p for extent, p in zip(spatial, pad, strict=True))]
        x = add_slice(ctx, x, [0, 0, *(-p for p in pad)], size, None, SLICE_MODES.FILL, zeros)
        pad = (0,) * len(pad)
    layer = ctx.network.add_pooling_nd(x, trt.PoolingType.AVERAGE if average else trt.PoolingType.MAX, kernel)
    layer.stride_nd = step
    layer.pre_padding, layer.post_padding = pad, tuple(p + m for p, m in zip(pad, more, strict=True))
    dynamic = ceil_mode and not is_fixed(extents[2:])
    layer.padding_mode = trt.PaddingMode.EXPLICIT_ROUND_UP if dynamic else trt.PaddingMode.EXPLICIT_ROUND_DOWN
    if average:
        layer.average_count_excludes_padding = partial or dynamic or (not include and divisor is None)
    y = layer.get_output(0)
    if divisor is not None:
        y = add_binary(ctx, y, itensor_of(ctx, math.prod(kernel) / divisor, input, len(x.shape)), "PROD")
    return drop_last(ctx, y) if n == 1 else y


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
    if return_indices or any(d != 1 for d in pair_of(dilation, 1)):
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
    extents = extents_of(input)
    x, operation, ndim = tensors_of_network(input), "AVG" if average else "MAX", len(extents)
    wanted = {axis: plain_value(size) for axis, size in enumerate(sizes, ndim - n) if size is not None}
    ones = [axis for axis, size in wanted.items() if size == 1]
    if ones:
        x = add_reduce(ctx, x, operation, ones, True)
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
            parts.append(add_reduce(ctx, add_slice(ctx, x, start, part), operation, [axis], True))
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
