"""Computes a TensorRT network layer by layer in PyTorch, where there is no GPU to build an engine of it.

It follows TensorRT's documentation of each layer, and checks every shape that TensorRT itself inferred.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def run(trt: Any, network: Any, *inputs: Tensor) -> list[Tensor]:
    """The outputs of `network`, made with the module `trt` (the API of TensorRT 10 or 11), for `inputs`."""
    values = {network.get_input(i).name: tensor for i, tensor in enumerate(inputs)}
    pending = [network.get_layer(i) for i in range(network.num_layers)]
    while pending:  # the order of the layers is not that of their inputs
        layer = next(each for each in pending if all(name is None or name in values for name in _inputs(each)))
        pending = [each for each in pending if each is not layer]
        kind = layer.type.name
        if kind in _CLASSES:
            layer.__class__ = getattr(trt, _CLASSES[kind])
        args = [None if name is None else values[name] for name in _inputs(layer)]
        result = _FUNCTIONS[kind](trt, layer, *args)
        output = layer.get_output(0)
        inferred = list(output.shape)
        assert len(inferred) == result.dim(), (layer.name, inferred, list(result.shape))
        assert all(a in (-1, b) for a, b in zip(inferred, result.shape)), (layer.name, inferred, list(result.shape))
        values[output.name] = result
    return [values[network.get_output(i).name] for i in range(network.num_outputs)]


def _inputs(layer: Any) -> list[str | None]:
    itensors = [layer.get_input(i) for i in range(layer.num_inputs)]
    return [None if itensor is None else itensor.name for itensor in itensors]


def _weights(weights: Any) -> Tensor:
    return torch.from_numpy(np.array(weights))


def _type(trt: Any, layer: Any) -> Any:
    """ILayer.type is hidden by the property of that name that some layers have."""
    return type(layer).type.__get__(layer)


def _constant(trt: Any, layer: Any) -> Tensor:
    return _weights(layer.weights).reshape(tuple(layer.shape))


def _shuffle(trt: Any, layer: Any, x: Tensor, shape: Tensor | None = None) -> Tensor:
    x = x.permute([layer.first_transpose[i] for i in range(x.dim())])
    if shape is not None:
        x = x.reshape(shape.tolist())
    elif layer.reshape_dims is not None:
        try:
            dims = list(layer.reshape_dims)
        except (TypeError, ValueError):  # none is set
            dims = list(x.shape)
        if dims or x.numel() == 1:
            x = x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(dims)])
    return x.permute([layer.second_transpose[i] for i in range(x.dim())]).contiguous()


def _slice(
    trt: Any,
    layer: Any,
    x: Tensor,
    start: Tensor | None = None,
    size: Tensor | None = None,
    stride: Tensor | None = None,
    fill: Tensor | None = None,
) -> Tensor:
    starts, sizes, strides = (
        list(fixed) if given is None else given.tolist()
        for given, fixed in ((start, layer.start), (size, layer.shape), (stride, layer.stride))
    )
    modes = trt.SampleMode
    for axis, n in enumerate(x.shape):
        at = torch.arange(sizes[axis]) * strides[axis] + starts[axis]
        outside = (at < 0) | (at >= n)
        if layer.mode == modes.REFLECT:
            at = torch.where(at.abs() >= n, 2 * (n - 1) - at.abs(), at.abs())
        elif layer.mode == modes.WRAP:
            at = at % n
        elif layer.mode in (modes.CLAMP, modes.FILL):
            at = at.clamp(0, n - 1)
        else:
            assert not outside.any(), f"{layer.name} reads past the end of axis {axis}"
        x = x.index_select(axis, at)
        if layer.mode == modes.FILL:
            x = torch.where(outside.view([-1 if a == axis else 1 for a in range(x.dim())]), fill, x)
    return x


def _elementwise(trt: Any, layer: Any, a: Tensor, b: Tensor) -> Tensor:
    assert a.dim() == b.dim() and a.dtype is b.dtype, (layer.name, a.shape, b.shape, a.dtype, b.dtype)
    names = {"SUM": "add", "PROD": "mul", "MAX": "maximum", "MIN": "minimum", "FLOOR_DIV": "floor_divide"}
    return getattr(torch, names.get(layer.op.name, layer.op.name.lower()))(a, b)


def _activation(trt: Any, layer: Any, x: Tensor) -> Tensor:
    a, b = layer.alpha, layer.beta
    return {
        "RELU": lambda: x.relu(),
        "SIGMOID": lambda: x.sigmoid(),
        "TANH": lambda: x.tanh(),
        "CLIP": lambda: x.clamp(a, b),
        "HARD_SIGMOID": lambda: (a * x + b).clamp(0, 1),
        "LEAKY_RELU": lambda: F.leaky_relu(x, a),
        "SOFTPLUS": lambda: a * torch.log1p(torch.exp(b * x)),
    }[_type(trt, layer).name]()


def _reduce(trt: Any, layer: Any, x: Tensor) -> Tensor:
    axes = [axis for axis in range(x.dim()) if layer.axes >> axis & 1]
    function = {"SUM": torch.sum, "AVG": torch.mean, "MAX": torch.amax, "MIN": torch.amin}[layer.op.name]
    return function(x, axes, keepdim=layer.keep_dims)


def _pooling(trt: Any, layer: Any, x: Tensor) -> Tensor:
    kernel, stride = list(layer.window_size_nd), list(layer.stride_nd)
    before, after, n = list(layer.pre_padding), list(layer.post_padding), len(kernel)
    spaces = [x.shape[2 + i] + before[i] + after[i] - kernel[i] for i in range(n)]
    if layer.padding_mode == trt.PaddingMode.EXPLICIT_ROUND_UP:
        after = [after[i] + -spaces[i] % stride[i] for i in range(n)]
    padding = [p for i in reversed(range(n)) for p in (before[i], after[i])]
    if _type(trt, layer) == trt.PoolingType.MAX:
        return (F.max_pool2d, F.max_pool3d)[n - 2](F.pad(x, padding, value=-math.inf), kernel, stride)
    pool = (F.avg_pool2d, F.avg_pool3d)[n - 2]
    y = pool(F.pad(x, padding), kernel, stride)
    return y / pool(F.pad(torch.ones_like(x), padding), kernel, stride) if layer.average_count_excludes_padding else y


def _resize(trt: Any, layer: Any, x: Tensor, shape: Tensor | None = None) -> Tensor:
    transforms, scales = trt.ResizeCoordinateTransformation, list(layer.scales)
    if layer.resize_mode == trt.InterpolationMode.NEAREST:
        asymmetric = layer.coordinate_transformation == transforms.ASYMMETRIC
        rounding = trt.ResizeRoundMode.FLOOR if asymmetric else trt.ResizeRoundMode.HALF_UP
        assert layer.nearest_rounding == rounding, layer.nearest_rounding
        options: dict[str, Any] = {"mode": "nearest" if asymmetric else "nearest-exact"}
    else:
        assert layer.resize_mode == trt.InterpolationMode.LINEAR
        options = {"mode": "bilinear", "align_corners": layer.coordinate_transformation == transforms.ALIGN_CORNERS}
    if shape is None and scales:
        return F.interpolate(x, scale_factor=scales[2:], **options)
    return F.interpolate(x, size=(list(layer.shape) if shape is None else shape.tolist())[2:], **options)


def _convolution(trt: Any, layer: Any, x: Tensor) -> Tensor:
    bias = _weights(layer.bias)
    kernel = _weights(layer.kernel).view(layer.num_output_maps, -1, *layer.kernel_size_nd)
    padding, rest = list(layer.pre_padding), (list(layer.dilation_nd), layer.num_groups)
    assert padding == list(layer.post_padding)
    return F.conv2d(x, kernel, bias if bias.numel() else None, list(layer.stride_nd), padding, *rest)


def _deconvolution(trt: Any, layer: Any, x: Tensor) -> Tensor:
    bias, maps, groups = _weights(layer.bias), layer.num_output_maps, layer.num_groups
    kernel = _weights(layer.kernel).view(x.shape[1], maps // groups, *layer.kernel_size_nd)
    bias = bias if bias.numel() else None
    y = F.conv_transpose2d(x, kernel, bias, list(layer.stride_nd), 0, 0, groups, list(layer.dilation_nd))
    before, after = list(layer.pre_padding), list(layer.post_padding)
    assert min(before + after) >= 0
    return y[:, :, before[0] : y.shape[2] - after[0], before[1] : y.shape[3] - after[1]]


def _scale(trt: Any, layer: Any, x: Tensor) -> Tensor:
    power, shape = _weights(layer.power), [1, -1] + [1] * (x.dim() - 2)
    assert power.numel() == 0 or bool((power == 1).all())
    return x * _weights(layer.scale).view(shape) + _weights(layer.shift).view(shape)


def _matrix_multiply(trt: Any, layer: Any, a: Tensor, b: Tensor) -> Tensor:
    turned = trt.MatrixOperation.TRANSPOSE
    return (a.mT if layer.op0 == turned else a) @ (b.mT if layer.op1 == turned else b)


_CLASSES = {
    "CONSTANT": "IConstantLayer",
    "SHUFFLE": "IShuffleLayer",
    "SLICE": "ISliceLayer",
    "CONCATENATION": "IConcatenationLayer",
    "ELEMENTWISE": "IElementWiseLayer",
    "ACTIVATION": "IActivationLayer",
    "UNARY": "IUnaryLayer",
    "REDUCE": "IReduceLayer",
    "SOFTMAX": "ISoftMaxLayer",
    "POOLING": "IPoolingLayer",
    "RESIZE": "IResizeLayer",
    "CONVOLUTION": "IConvolutionLayer",
    "DECONVOLUTION": "IDeconvolutionLayer",
    "SCALE": "IScaleLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "GATHER": "IGatherLayer",
}
_FUNCTIONS = {
    "CONSTANT": _constant,
    "SHAPE": lambda trt, layer, x: torch.tensor(x.shape),
    "IDENTITY": lambda trt, layer, x: x,
    "CAST": lambda trt, layer, x: x.to(
        {trt.float32: torch.float32, trt.float16: torch.float16}[layer.get_output(0).dtype]
    ),
    "SHUFFLE": _shuffle,
    "SLICE": _slice,
    "CONCATENATION": lambda trt, layer, *parts: torch.cat(parts, layer.axis),
    "ELEMENTWISE": _elementwise,
    "ACTIVATION": _activation,
    "UNARY": lambda trt, layer, x: getattr(torch, layer.op.name.lower())(x),
    "REDUCE": _reduce,
    "SOFTMAX": lambda trt, layer, x: x.softmax(layer.axes.bit_length() - 1),
    "POOLING": _pooling,
    "RESIZE": _resize,
    "CONVOLUTION": _convolution,
    "DECONVOLUTION": _deconvolution,
    "SCALE": _scale,
    "MATRIX_MULTIPLY": _matrix_multiply,
    "GATHER": lambda trt, layer, x, at: x.index_select(layer.axis, at.long()),
}
