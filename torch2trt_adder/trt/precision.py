"""float16 in TensorRT 8 to 10: which layers stay in float32."""

import pathlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..export.format import adder_nodes
from . import api
from .fusion import DEVIATIONS

# ---- precision, TensorRT 8 to 10


def batch_norm_magnitudes(proto: Any, folder: pathlib.Path) -> dict[str, float]:
    """By the name of the output of each BatchNormalization node of an onnx.ModelProto: how large its values become.

    Normalised values rarely lie more than 8 standard deviations from their mean. `folder` is where external tensors are.
    """
    import onnx

    graph, magnitudes = proto.graph, {}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "BatchNormalization" and {*node.input[1:3]} <= tensors.keys():
            gamma, beta = (
                np.abs(onnx.numpy_helper.to_array(tensors[name], str(folder)).astype(np.float64))
                for name in node.input[1:3]
            )
            magnitudes[node.output[0]] = float((beta + DEVIATIONS * gamma).max(initial=0))
    return magnitudes


def set_precision(
    trt: ModuleType,
    network: Any,
    config: Any,
    proto: Any,
    fp16: bool,
    exposed: Sequence[Any] | None = None,
    largest: Mapping[str, float] | None = None,
) -> None:
    """Sets the flags for float16 in a weakly typed network, and holds the layers after adder layers in float32.

    `exposed` are the adder layers whose sums leave the plugin, all of them where None; `largest` as in `hold_float32`.
    """
    if api.is_strongly_typed(trt):
        return
    half = 10  # TensorProto.FLOAT16
    in_half = any(tensor.data_type == half for tensor in proto.graph.initializer) or any(
        entry.type.tensor_type.elem_type == half for entry in (*proto.graph.input, *proto.graph.output)
    )
    if fp16 or in_half:
        api.allow_float16(trt, config)  # a file in float16 needs it as well
    names = [node.name for node in adder_nodes(proto.graph)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    plugins = [layer for layer in layers if "PLUGIN" in layer.type.name]
    adders = [layer for layer in plugins if layer.name in names]
    if len(adders) != len(names):  # nodes without names of their own: hold the outputs of all plugins
        adders = plugins
    sources = adders if exposed is None else exposed
    if fp16 and hold_float32(network, sources, largest, trt=trt, adders={layer.name for layer in adders}):
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)


def hold_float32(
    network: Any,
    adder_layers: Sequence[Any],
    largest: Mapping[str, float] | None = None,
    *,
    trt: ModuleType,
    adders: Collection[str] | None = None,
) -> bool:
    """Holds every layer between an adder layer's float32 output and the next scaling layer in float32.

    In a weakly typed network TensorRT may round an adder layer's sums, which pass 65504 in wide layers, to float16 before
    BatchNorm scales them down. The scaling layer (BatchNorm) itself computes in float32, and its output is free, unless
    it is known to be still within a factor of 16 of float16's largest value.

    Args:
        network: of TensorRT 8 to 10.
        adder_layers: its plugin layers Adder2d whose sums leave the plugin.
        largest: magnitudes seen, by the name of the tensor.
        trt: the TensorRT module.
        adders: the names of all its plugin layers Adder2d; those of `adder_layers` where None.

    Returns:
        Whether any layer is held, so that BuilderFlag.OBEY_PRECISION_CONSTRAINTS is needed.
    """
    scaling = api.scaling_layers(trt)
    adders = {layer.name for layer in adder_layers} if adders is None else adders
    consumers = defaultdict(list)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for j in range(layer.num_inputs):
            itensor = layer.get_input(j)
            if itensor is not None:
                consumers[itensor.name].append(layer)
    pending = [layer.get_output(0) for layer in adder_layers]
    pending = [itensor for itensor in pending if itensor.dtype == trt.DataType.FLOAT]
    held: set[str] = set()
    while pending:
        for layer in consumers[pending.pop().name]:
            outputs = {j: layer.get_output(j) for j in range(layer.num_outputs)}
            outputs = {j: t for j, t in outputs.items() if t.dtype in (trt.DataType.FLOAT, trt.DataType.HALF)}
            if layer.name in held or not outputs:  # the shape of a tensor has no range
                continue
            held.add(layer.name)
            layer.precision = trt.DataType.FLOAT
            if layer.name in adders:
                continue
            # The magnitude is unknown for the network's outputs, which nothing reads.
            seen = max((largest or {}).get(t.name, 0) for t in outputs.values())
            if layer.type in scaling and seen <= torch.finfo(torch.float16).max / 16:
                continue
            for j, itensor in outputs.items():
                layer.set_output_type(j, trt.DataType.FLOAT)
                pending.append(itensor)
    return bool(held)
