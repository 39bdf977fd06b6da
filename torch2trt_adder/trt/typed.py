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
    _Rewriter(proto, folder).rewrite()


class _Rewriter:
    """Makes the new list of nodes, with a cast where a tensor is first needed in its other type."""

    def __init__(self, proto: Any, folder: pathlib.Path) -> None:
        import onnx

        self.onnx: Any = onnx
        self.graph, self.folder = proto.graph, folder
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(proto).graph.value_info  # some exporters write no types
        kind = onnx.TensorProto.FLOAT
        self.floats = {tensor.name for tensor in self.graph.initializer if tensor.data_type == kind}
        self.floats |= {
            entry.name
            for entry in (*self.graph.input, *self.graph.output, *self.graph.value_info, *inferred)
            if entry.type.tensor_type.elem_type == kind
        }
        self.nodes: list[Any] = []
        self.halves: dict[str, str] = {}  # of a float32 tensor: its float16 copy
        self.made = {entry.name for entry in self.graph.input} | set(self.initializers)  # in float32
        self.outputs = {entry.name for entry in self.graph.output}

    def rewrite(self) -> None:
        graph = self.graph
        for original in graph.node:
            node = type(original)()
            node.CopyFrom(original)
            if self._computes_in_half(node):
                self._add_in_half(node)
            else:
                self._add_in_float(node)
        del graph.node[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in (*node.input, *_captured(node))} | self.outputs
        for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
            graph.initializer.remove(tensor)
        del graph.value_info[:]  # the types of intermediate tensors have changed

    def _computes_in_half(self, node: Any) -> bool:
        if node.domain not in ("", "ai.onnx") or node.output[0] not in self.floats:
            return False
        if node.op_type in _IN_HALF:
            return all(not name or name in self.floats for name in node.input)
        moves = node.op_type in _EITHER and len(node.output) == 1
        return moves and node.input[0] in self.halves and node.input[0] not in self.made

    def _add_in_half(self, node: Any) -> None:
        for i, name in enumerate(node.input):
            if name in self.floats:
                node.input[i] = self._half(name)
        name = node.output[0]
        self.halves[name] = node.output[0] = f"{name}.float16"
        self.nodes.append(node)
        if name in self.outputs:
            self._single(name)

    def _add_in_float(self, node: Any) -> None:
        """The node as it is; of an adder layer, x in float16."""
        adder = (node.domain, node.op_type) == (DOMAIN, OP_TYPE)
        for i, name in enumerate(node.input):
            if adder and i == 0 and name in self.floats:
                node.input[i] = self._half(name)
            else:
                self._single(name)
        for name in _captured(node):
            self._single(name)
        self.made.update(node.output)
        self.nodes.append(node)

    def _half(self, name: str) -> str:
        """The name of the float16 copy of a float32 tensor."""
        if name not in self.halves:
            half = self.halves[name] = f"{name}.float16"
            helper = self.onnx.numpy_helper
            if name in self.initializers:
                array = helper.to_array(self.initializers[name], str(self.folder)).astype(np.float16)
                self.graph.initializer.append(helper.from_array(array, half))
            else:
                self._cast(name, half, f"{name}:to_float16", self.onnx.TensorProto.FLOAT16)
        return self.halves[name]

    def _single(self, name: str) -> None:
        """Makes a tensor in float32 that exists only in float16 so far."""
        if name in self.halves and name not in self.made:
            self.made.add(name)
            self._cast(self.halves[name], name, f"{name}:to_float32", self.onnx.TensorProto.FLOAT)

    def _cast(self, source: str, target: str, name: str, kind: int) -> None:
        self.nodes.append(self.onnx.helper.make_node("Cast", [source], [target], name, to=kind))


def _captured(node: Any) -> Iterator[str]:
    """The names that the subgraphs of a node read."""
    for attribute in node.attribute:
        for subgraph in (attribute.g, *attribute.graphs):
            for inner in subgraph.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (entry.name for entry in subgraph.output)
