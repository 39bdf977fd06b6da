"""What an ONNX file says about adder layers: the node Adder2d, the limits of its dynamic axes, its weights' files.

y = Adder2d(x, weight, bias)      x [N, C, H, W], weight [K, C / groups, R, S], bias [K]  ->  y [N, K, P, Q]
stride, padding, dilation         two ints each, height before width
groups                            int
output_type                       int, TensorRT's DataType of y: 0 float32, 1 float16
plugin_namespace                  "": makes TensorRT 10.15 and newer prefer the plugin to the function
"""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

DOMAIN, OP_TYPE = "torch2trt_adder", "Adder2d"
EXTENTS = "torch2trt_adder.extents"  # in the file's metadata: for which extents of its dynamic axes it holds
_MAX = 2**31 - 1  # the plugin's fields are int32
_PAIRS = {"stride": 1, "padding": 0, "dilation": 1}  # and the smallest value of each
_REMEDY = "export the network again"
Shape = tuple[int | None, ...]


def nodes(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Every node of an onnx.GraphProto with the graph that holds it, those of subgraphs included."""
    for node in graph.node:
        yield graph, node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from nodes(subgraph)


def is_adder(node: Any) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, OP_TYPE)


def adder_nodes(graph: Any) -> list[Any]:
    """The Adder2d nodes of an onnx.GraphProto, those of its subgraphs included."""
    return [node for _, node in nodes(graph) if is_adder(node)]


# ---- the limits of dynamic axes


def extents(proto: Any) -> dict[str, tuple[int, int | None]]:
    """By the name of a dynamic axis: the smallest and the largest extent (None: any) for which the file is valid.

    Raises:
        ValueError: the file's metadata do not say that in the way in which `export_onnx` writes it.
    """
    text = next((entry.value for entry in proto.metadata_props if entry.key == EXTENTS), "{}")
    try:
        limits = json.loads(text)
    except (ValueError, RecursionError):
        limits = None
    if not isinstance(limits, dict) or not all(map(_is_limit, limits.values())):
        raise ValueError(
            f'the metadata {EXTENTS} of the file must map axes to limits, as {{"batch": [0, 8]}}, got {text[:80]!r}; '
            f"{_REMEDY}."
        )
    return {axis: (min_extent, max_extent) for axis, (min_extent, max_extent) in limits.items()}


def _is_limit(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    min_extent, max_extent = value
    if type(min_extent) is not int or min_extent < 0:
        return False
    return max_extent is None or (type(max_extent) is int and max_extent >= min_extent)


# ---- files of weights


def external_files(proto: Any, folder: pathlib.Path) -> dict[pathlib.Path, int]:
    """The files beside the ONNX file that hold its tensors, and the minimum size of each in bytes."""
    sizes: dict[pathlib.Path, int] = {}
    for tensor in (tensor for holder in (proto.graph, *proto.functions) for tensor in _tensors(holder)):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        path = folder / where.get("location", "")
        try:
            end = int(where.get("offset", 0)) + int(where.get("length", 0))
        except ValueError:
            raise ValueError(
                f"tensor {tensor.name!r} lies in {path} at {where.get('offset', 0)!r} with {where.get('length', 0)!r} bytes, "
                f"which are not numbers; {_REMEDY}."
            ) from None
        sizes[path] = max(sizes.get(path, 0), end)
    return sizes


def _tensors(graph: Any) -> Iterator[Any]:
    """The tensors of a graph or function, those of its subgraphs included."""
    yield from getattr(graph, "initializer", ())
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)


def check_external_files(proto: Any, folder: pathlib.Path) -> None:
    """Raises an OSError unless the files beside the ONNX file that hold its tensors are all there, and complete."""
    for path, size in external_files(proto, folder).items():
        if not path.is_file():
            raise FileNotFoundError(
                f"the weights of the ONNX file lie in {path}, which is not there; put it beside the file."
            )
        if path.stat().st_size < size:
            raise OSError(
                f"{path} has {path.stat().st_size} bytes of the {size} that the ONNX file needs; copy it again."
            )


# ---- the node


def check_nodes(proto: Any) -> None:
    """Raises a ValueError that names the node unless every Adder2d node of an onnx.ModelProto is one that can be computed.

    TensorRT's parser itself fills in what is missing and cuts integers to 32 bits. Shapes are checked where the file
    tells them.
    """
    for holder in (proto.graph, *proto.functions):
        if (getattr(holder, "domain", ""), holder.name) != (DOMAIN, OP_TYPE):
            _check_graph(holder, {}, {})


def _check_graph(graph: Any, shapes: Mapping[str, Shape], types: Mapping[str, int]) -> None:
    shapes, types = dict(shapes), dict(types)  # a subgraph sees the values of the graphs around it
    for entry in (*getattr(graph, "value_info", ()), *getattr(graph, "output", ()), *getattr(graph, "input", ())):
        if isinstance(entry, str) or not entry.type.HasField("tensor_type"):  # a function's are names
            continue
        tensor = entry.type.tensor_type
        types[entry.name] = tensor.elem_type
        if tensor.HasField("shape"):
            shapes[entry.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    constants = [(t.name, t) for t in getattr(graph, "initializer", ())]
    constants += [
        (node.output[0], node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value"
    ]
    for name, tensor in constants:
        shapes[name], types[name] = tuple(tensor.dims), tensor.data_type
    for node in graph.node:
        if is_adder(node):
            try:
                _check_node(node, shapes, types)
            except ValueError as error:
                label = (
                    f" {node.name!r}" if node.name else f" with the output {node.output[0]!r}" if node.output else ""
                )
                raise ValueError(f"the Adder2d node{label} {error}; {_REMEDY}.") from None
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                _check_graph(subgraph, shapes, types)


def _check_node(node: Any, shapes: Mapping[str, Shape], types: Mapping[str, int]) -> None:
    if len(node.input) != 3 or not all(node.input) or len(node.output) != 1:
        raise ValueError(
            f"must have the inputs x, weight and bias and one output, got {len([n for n in node.input if n])} inputs and "
            f"{len(node.output)} outputs"
        )
    given = {attribute.name: attribute for attribute in node.attribute}
    values: dict[str, list[int]] = {}
    for name, (minimum, maximum, count) in {
        **{name: (minimum, _MAX, 2) for name, minimum in _PAIRS.items()},
        "groups": (1, _MAX, 1),
        "output_type": (0, 1, 1),
    }.items():
        if name not in given:
            raise ValueError(f"has no attribute {name}")
        attribute = given[name]
        if attribute.ref_attr_name:  # inside a function: the caller gives it
            continue
        if attribute.type != (attribute.INTS if count == 2 else attribute.INT):
            raise ValueError(f"must have {'two integers' if count == 2 else 'an integer'} as {name}, got another type")
        numbers = list(attribute.ints) if count == 2 else [attribute.i]
        if len(numbers) != count or not all(minimum <= number <= maximum for number in numbers):
            wanted = f"{'two integers' if count == 2 else 'an integer'} from {minimum} to {maximum}"
            raise ValueError(f"must have {wanted} as {name}, got {numbers if count == 2 else numbers[0]}")
        values[name] = numbers
    namespace = given.get("plugin_namespace")
    if namespace is not None and not namespace.ref_attr_name and (namespace.type != namespace.STRING or namespace.s):
        raise ValueError('must have "" as plugin_namespace, got another value')
    _check_types(node, types)
    _check_shapes(values, *(shapes.get(name) for name in node.input))


def _check_types(node: Any, types: Mapping[str, int]) -> None:
    names = {1: "float32", 10: "float16"}  # TensorProto's numbers
    for what, name in zip(("x", "weight", "bias"), node.input):
        allowed = (1, 10) if what == "x" else (1,)
        if types.get(name, 0) not in (0, *allowed):
            raise ValueError(
                f"must have {' or '.join(names[t] for t in allowed)} as {what} ({name!r}), got the type {types[name]} of ONNX"
            )


def _check_shapes(values: Mapping[str, list[int]], x: Shape | None, weight: Shape | None, bias: Shape | None) -> None:
    for what, shape, rank in (("x", x, 4), ("weight", weight, 4), ("bias", bias, 1)):
        if shape is not None and len(shape) != rank:
            raise ValueError(f"must have a tensor of {rank} axes as {what}, got the shape {_text(shape)}")
    if weight is not None and 0 in weight:
        raise ValueError(f"must have a weight without empty axes, got the shape {_text(weight)}")
    K = weight[0] if weight is not None else None
    if bias is not None and None not in (K, bias[0]) and bias[0] != K:
        raise ValueError(f"has {K} filters and a bias of {bias[0]} values")
    if "groups" in values and weight is not None:
        (groups,) = values["groups"]
        if K is not None and K % groups:
            raise ValueError(f"has {K} filters, which {groups} groups do not divide")
        if x is not None and x[1] is not None and weight[1] is not None and x[1] != weight[1] * groups:
            raise ValueError(f"has an input of {x[1]} channels, its weight and groups want {weight[1]} x {groups}")
    if x is None or weight is None or not _PAIRS.keys() <= values.keys():
        return
    for axis, extent, kernel, padding, dilation in zip("HW", x[2:], weight[2:], values["padding"], values["dilation"]):
        if extent is not None and kernel is not None and dilation * (kernel - 1) + 1 > extent + 2 * padding:
            raise ValueError(
                f"has a kernel that reaches over {dilation * (kernel - 1) + 1} values of {axis}, the padded input has "
                f"{extent + 2 * padding}"
            )


def _text(shape: Shape) -> str:
    return f"[{', '.join('?' if extent is None else str(extent) for extent in shape)}]"


_TENSORRT_TYPES = {torch.float32: 0, torch.float16: 1}


# ---- the node, and torch's exporter


def node_attributes(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, output_dtype: torch.dtype
) -> dict[str, Any]:
    if output_dtype not in _TENSORRT_TYPES:
        raise TypeError(
            f"adder2d: {output_dtype} cannot be exported, TensorRT's plugin takes float32 and float16; convert the "
            "model with .float() or .half()."
        )
    return {
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "groups": int(groups),
        "output_type": _TENSORRT_TYPES[output_dtype],
        "plugin_namespace": "",
    }
