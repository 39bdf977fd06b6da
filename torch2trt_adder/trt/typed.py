"""float16 in TensorRT 11, whose networks have the types of their file."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..export.format import DOMAIN, OP_TYPE

# ---- precision, TensorRT 11

_IN_HALF = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_EITHER = {"Relu", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}


def to_float16(proto: Any, folder: pathlib.Path) -> None:
    """Rewrites a float32 onnx.ModelProto so that convolutions and matrix products compute in float16.

    Adder layers read float16 and sum in float32, which is also the type of their output: it passes 65504. Layers that
    only move values stay in the type that they get; everything else, BatchNorm above all, computes in float32. Inputs,
    outputs and their names stay as they are. `folder` is where the file's external tensors are.
    """
    import onnx

    graph, FLOAT, FLOAT16 = proto.graph, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(proto).graph.value_info  # some exporters write no types
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT}
    floats |= {
        entry.name
        for entry in (*graph.input, *graph.output, *graph.value_info, *inferred)
        if entry.type.tensor_type.elem_type == FLOAT
    }
    nodes: list[Any] = []
    halves: dict[str, str] = {}  # of a float32 tensor: its float16 twin
    made = {entry.name for entry in graph.input} | set(initializers)  # in float32
    outputs = {entry.name for entry in graph.output}

    def half(name: str) -> str:
        if name not in halves:
            halves[name] = f"{name}.float16"
            if name in initializers:
                array = onnx.numpy_helper.to_array(initializers[name], str(folder)).astype(np.float16)
                graph.initializer.append(onnx.numpy_helper.from_array(array, halves[name]))
            else:
                nodes.append(onnx.helper.make_node("Cast", [name], [halves[name]], f"{name}:to_float16", to=FLOAT16))
        return halves[name]

    def single(name: str) -> None:
        if name in halves and name not in made:
            made.add(name)
            nodes.append(onnx.helper.make_node("Cast", [halves[name]], [name], f"{name}:to_float32", to=FLOAT))

    def captured(node: Any) -> Iterator[str]:
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                for inner in subgraph.node:
                    yield from inner.input
                    yield from captured(inner)
                yield from (entry.name for entry in subgraph.output)

    for original in graph.node:
        node = type(original)()
        node.CopyFrom(original)
        adder = (node.domain, node.op_type) == (DOMAIN, OP_TYPE)
        standard = node.domain in ("", "ai.onnx") and node.output[0] in floats
        in_half = standard and node.op_type in _IN_HALF and all(not name or name in floats for name in node.input)
        moves = standard and node.op_type in _EITHER and len(node.output) == 1 and node.input[0] in halves
        if in_half or (moves and node.input[0] not in made):
            for i, name in enumerate(node.input):
                if name in floats:
                    node.input[i] = half(name)
            name = node.output[0]
            halves[name] = node.output[0] = f"{name}.float16"
            nodes.append(node)
            if name in outputs:
                single(name)
            continue
        for i, name in enumerate(node.input):
            if adder and i == 0 and name in floats:
                node.input[i] = half(name)
            else:
                single(name)
        for name in captured(node):
            single(name)
        made.update(node.output)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in (*node.input, *captured(node))} | outputs
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    del graph.value_info[:]  # the types of what lies between have changed
