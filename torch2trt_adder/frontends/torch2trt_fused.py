"""torch2trt's converter for ``adder2d_fused``: an adder layer and layers after it, which the network's fusion joins again.

So there is one place that decides what an engine's adder layers take over, and in which type, and ``fuse=False`` works for
networks of `torch2trt_adder.fuse`, too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt
import torch
from torch import Tensor

from ..trt import api, plugin
from .torch2trt_layers import Context, ITensor, add_activation, add_binary, converts, itensor_of


@converts("torch2trt_adder.ops.adder2d_fused")
def convert_adder2d_fused(
    ctx: Context,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    lower: float | None = None,
    upper: float | None = None,
) -> ITensor:
    for role, tensor in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if tensor is not None and ctx.tracker.origin(tensor):
            raise RuntimeError(
                f"adder2d_fused in {ctx.place()}: the {role} is computed from the network's inputs, but an engine has "
                f"constant weights; compute the {role} from parameters only."
            )
    half = input.dtype is torch.float16
    if half:
        api.allow_float16(trt, ctx.builder_config)
    layer = plugin.add_adder2d(
        ctx.network,
        itensor_of(ctx, input, input, 4),
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        output_type=trt.DataType.FLOAT,  # sums pass float16's 65504 before they are scaled
        name=f"{ctx.current_module_name() or 'model'}:adder2d_{len(ctx.adder_layers)}",
    )
    ctx.adder_layers[layer.name] = layer
    ctx.geometries[layer.name] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    y = layer.get_output(0)
    if scale is not None or shift is not None:
        with ctx.unhooked():
            one = torch.ones(len(weight))
            values = (torch.zeros_like(one) if shift is None else shift, one if scale is None else scale, one)
            arrays = [tensor.detach().cpu().numpy() for tensor in values]
        y = ctx.network.add_scale_nd(y, trt.ScaleMode.CHANNEL, *arrays, 1).get_output(0)
    if residual is not None:
        other = itensor_of(ctx, residual, input, 4)
        y = add_binary(ctx, y, _cast(ctx, other, trt.DataType.FLOAT) if half else other, "SUM")
    y = _limited(ctx, y, lower, upper)
    return _cast(ctx, y, trt.DataType.HALF) if half else y


def _limited(ctx: Context, itensor: ITensor, lower: float | None, upper: float | None) -> ITensor:
    if lower == 0 and upper is None:
        return add_activation(ctx, itensor, "RELU")
    if lower is not None and upper is not None:
        return add_activation(ctx, itensor, "CLIP", lower, upper)
    for limit, operation in ((lower, "MAX"), (upper, "MIN")):
        if limit is not None:
            array = np.full((1, 1, 1, 1), limit, np.float32)
            itensor = add_binary(ctx, itensor, ctx.network.add_constant(array.shape, array).get_output(0), operation)
    return itensor


def _cast(ctx: Context, itensor: ITensor, dtype: Any) -> ITensor:
    if hasattr(ctx.network._network, "add_cast"):  # TensorRT 8.6 and newer
        return ctx.network.add_cast(itensor, dtype).get_output(0)
    layer = ctx.network.add_identity(itensor)
    layer.set_output_type(0, dtype)
    return layer.get_output(0)
