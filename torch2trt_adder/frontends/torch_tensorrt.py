"""Adder layers in Torch-TensorRT's dynamo frontend. Importing this file needs torch_tensorrt and registers the converter.

    import torch2trt_adder, torch_tensorrt
    model_trt = torch_tensorrt.compile(model, ir="dynamo", inputs=[x], min_block_size=1)

Torch-TensorRT leaves blocks below ``min_block_size`` operators (5 by default) to PyTorch silently. Engines that it
has saved load after ``import torch2trt_adder``, which registers the plugin.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

from ..trt import api, plugin


@dynamo_tensorrt_converter(torch.ops.torch2trt_adder.adder2d.default, supports_dynamic_shapes=True)
def convert_adder2d(ctx: Any, target: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    """One plugin layer for one call, whose weight and bias are parameters or constants."""
    input, weight, bias, stride, padding, dilation, groups = args
    for role, tensor in (("weight", weight), ("bias", bias)):
        if not isinstance(tensor, (torch.Tensor, np.ndarray, type(None))):
            raise RuntimeError(
                f"adder2d in {name}: the {role} is computed from the network's inputs, but an engine has constant weights; "
                f"compute the {role} from parameters only, or give torch_tensorrt torch_executed_ops={{{str(target)!r}}}."
            )
    trt = api.import_tensorrt()
    input = get_trt_tensor(ctx, input, f"{name}_input")
    half = input.dtype == trt.DataType.HALF  # the operator's output has the type of its input
    layer = plugin.add_adder2d(
        ctx.net,
        input,
        weight,
        bias,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        trt.DataType.HALF if half else trt.DataType.FLOAT,
        name,
    )
    return layer.get_output(0)


plugin.register()
