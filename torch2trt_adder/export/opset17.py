"""Opset 18 rewritten to 17, the newest that TensorRT 8.6 reads."""

from typing import Any

import numpy as np

from .format import nodes
from .graph import opset_entry


def in_opset_17(proto: Any) -> Any:
    """A copy of an opset 18 model in opset 17.

    onnx's own converter leaves reductions with an attribute that opset 17 does not know, and refuses Pad and Split.

    Raises:
        RuntimeError: an operator, or a use of it, that opset 17 does not have.
    """
    import onnx

    older = type(proto)()
    older.CopyFrom(proto)
    graph = older.graph
    integers = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT64}
    integers |= {
        node.output[0]: node.attribute[0].t
        for _, node in nodes(graph)
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    shapes = {entry.name: entry.type.tensor_type.shape.dim for entry in (*graph.input, *graph.value_info)}

    for owner, node in nodes(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        new = onnx.defs.get_schema(node.op_type, opset_entry(proto).version, "")
        try:
            old = onnx.defs.get_schema(node.op_type, 17, "")
        except onnx.defs.SchemaError as error:
            raise RuntimeError(f"{node.op_type} came with opset {new.since_version}") from error
        given = {attribute.name: attribute for attribute in node.attribute}
        if len(node.input) > 1 and "axes" in old.attributes:  # a reduction, whose axes became an input
            if node.input[1] not in integers:
                raise RuntimeError(f"the axes of {node.op_type} must be constant before opset {new.since_version}")
            axes = onnx.numpy_helper.to_array(integers[node.input[1]]).tolist()
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
            del node.input[1]
        if node.op_type == "Split" and "num_outputs" in given:
            axis = given["axis"].i if "axis" in given else 0
            shape = shapes.get(node.input[0], [])
            if not -len(shape) <= axis < len(shape) or not shape[axis].HasField("dim_value"):
                raise RuntimeError(f"Split has no num_outputs before opset {new.since_version}")
            extent, parts = shape[axis].dim_value, given["num_outputs"].i
            largest = -(-extent // parts)
            sizes = np.array([min(largest, extent - i * largest) for i in range(parts)], np.int64)
            owner.initializer.append(onnx.numpy_helper.from_array(sizes, f"{node.output[0]}.sizes"))
            node.input.append(f"{node.output[0]}.sizes")
            node.attribute.remove(given["num_outputs"])
            del given["num_outputs"]
        for name, attribute in given.items():
            if name not in old.attributes:
                if attribute != new.attributes[name].default_value:
                    raise RuntimeError(f"{node.op_type} has no {name} before opset {new.since_version}")
                node.attribute.remove(attribute)
            if name == "reduction" and attribute.s in (b"max", b"min"):
                raise RuntimeError(f"{node.op_type} has no {attribute.s.decode()} before opset {new.since_version}")
        while len(node.input) > old.max_input and not node.input[-1]:
            del node.input[-1]
        if len(node.input) > old.max_input:
            raise RuntimeError(f"{node.op_type} has at most {old.max_input} inputs before opset {new.since_version}")
    opset_entry(older).version = 17
    return older
