"""What torch's exporter leaves to do."""

import ast
from typing import Any

import numpy as np

from .body import BODY
from .format import DOMAIN, adder_nodes
from .graph import drop_unused, opset_entry


def name_nodes(proto: Any) -> None:
    """Adder2d nodes are named after their modules, as torch2trt's layers are: TensorRT names its layers after them."""
    for i, node in enumerate(adder_nodes(proto.graph)):
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
        modules = [name for name in ast.literal_eval(scopes)[:-1] if name]
        node.name = f"{modules[-1] if modules else 'model'}:adder2d_{i}"


# ---- what the exporter leaves to do


def add_body(proto: Any) -> None:
    """Gives the nodes their float32 initializers, and the model the function Adder2d."""
    import onnx

    graph, adders = proto.graph, adder_nodes(proto.graph)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    known: dict[str, np.ndarray] = {}  # by the name of the tensor

    def constant(name: str) -> np.ndarray | None:
        """The float32 value of a tensor that is a parameter or made of one by casts."""
        if name in initializers:
            return onnx.numpy_helper.to_array(initializers[name]).astype(np.float32)
        node = producers.get(name)
        if node is not None and node.op_type in ("Cast", "Identity"):
            return constant(node.input[0])
        if node is not None and node.op_type == "Constant" and node.attribute[0].name == "value":
            return onnx.numpy_helper.to_array(node.attribute[0].t).astype(np.float32)
        return None

    for node in adders:
        for i in (1, 2):
            name = node.input[i]
            tensor = initializers.get(name)
            if tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT:
                continue
            if name not in known:
                value = constant(name)
                if value is None:  # computed from something else: TensorRT and ONNX Runtime compute it as well
                    continue
                known[name] = value
                graph.initializer.append(onnx.numpy_helper.from_array(value, f"{name}.float32"))
            node.input[i] = f"{name}.float32"
    drop_unused(graph)
    if adders:
        if not any(entry.domain == DOMAIN for entry in proto.opset_import):
            proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
        opset = opset_entry(proto).version
        proto.functions.append(onnx.parser.parse_function(BODY % opset))
        # 8 is the first version with functions and goes with opset 17.
        proto.ir_version = max(8, min(proto.ir_version, 8 if opset <= 17 else 10))
