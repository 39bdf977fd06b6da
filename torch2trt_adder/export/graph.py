"""Between torch's exporter and the file: names, constants and the opset of its onnxscript.ir.Model."""

from collections.abc import Iterator, Sequence
from typing import Any

from . import format


def finish(model: Any, input_names: Sequence[str] | None, output_names: Sequence[str] | None, opset: int) -> None:
    """Names inputs and outputs, makes all names different, folds constants and converts to `opset`; in place.

    Instead of the exporter's own optimiser: it takes numbers for 0 and 1 that are close to them, so that ``x + 1e-10``
    becomes ``x``; it tells values apart by names, which the exporter may give twice; and it merges Min and Max in an
    order that no graph may have. Runtimes optimise anyway.

    Raises:
        ValueError: not one name for each input and output, or one name twice.
    """
    from onnxscript import optimizer, version_converter

    graph = model.graph
    optimizer.inline(model)
    _separate_outputs(graph)
    _name("input", graph.inputs, input_names, [])
    _name("output", graph.outputs, output_names, graph.inputs)
    _make_names_unique(graph)
    if graph.opset_imports.get("", opset) < opset:
        version_converter.convert_version(model, opset, fallback=True)
        _make_names_unique(graph)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    optimizer.remove_unused_nodes(model)
    _separate_outputs(graph)  # a folded output may be a constant now
    _make_names_unique(graph)


def _separate_outputs(graph: Any) -> None:
    """Copies what is returned twice, or as it came in: each output needs a value of its own."""
    from onnxscript import ir

    taken = {*map(id, graph.inputs), *map(id, graph.initializers.values())}
    for i, value in enumerate(list(graph.outputs)):
        if id(value) in taken:
            copy = ir.Node("", "Identity", [value])
            output = copy.outputs[0]
            output.name, output.type, output.shape = f"{value.name}_output", value.type, value.shape
            graph.append(copy)
            graph.outputs[i] = output
        taken.add(id(value))


def _name(what: str, values: Sequence[Any], names: Sequence[str] | None, others: Sequence[Any]) -> None:
    if names is None:
        return
    names = list(names)
    if len(set(names)) != len(values) or len(names) != len(values) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(
            f"export_onnx: {what}_names must hold {len(values)} different names, one for each {what}, got {names}."
        )
    for name in {other.name for other in others} & set(names):
        raise ValueError(f"export_onnx: {what}_names holds {name!r}, which is the name of an input; choose another.")
    for value, name in zip(values, names):
        value.name = name


def _make_names_unique(graph: Any) -> None:
    """Inputs and outputs keep their names, then parameters do; what else has a name that is taken gets a number."""
    graphs = list(_graphs(graph))
    initializers = [list(each.initializers.values()) for each in graphs]
    inner = [(*each.inputs, *(output for node in each for output in node.outputs)) for each in graphs]
    values = [*graph.inputs, *graph.outputs, *(value for each in (*initializers, *inner) for value in each)]
    taken: set[str] = set()
    for each in graphs:
        each.initializers.clear()
    for value in {id(value): value for value in values}.values():
        name, i = value.name or "value", 0
        while name in taken:
            i += 1
            name = f"{value.name or 'value'}_{i}"
        taken.add(name)
        if value.name != name:
            value.name = name
    for each, those in zip(graphs, initializers):
        for value in those:
            each.initializers[value.name] = value


def _graphs(graph: Any) -> Iterator[Any]:
    """The graph and the subgraphs of its nodes."""
    from onnxscript import ir

    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            for value in attribute.value if isinstance(attribute.value, list | tuple) else [attribute.value]:
                if isinstance(value, ir.Graph):
                    yield from _graphs(value)


def lift_constants(graph: Any) -> None:
    """Makes initializers of the Constant nodes of an onnx.GraphProto, as the exporter's optimiser does."""
    import onnx

    outputs, rest = {entry.name for entry in graph.output}, []
    for node in graph.node:
        attribute = node.attribute[0] if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
        tensor = None
        if attribute is None or node.output[0] in outputs:
            pass
        elif attribute.name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(attribute.t)
        elif attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
            value = onnx.helper.get_attribute_value(attribute)
            kind = onnx.TensorProto.INT64 if "int" in attribute.name else onnx.TensorProto.FLOAT
            shape = [len(value)] if attribute.name.endswith("s") else []
            tensor = onnx.helper.make_tensor("", kind, shape, value if shape else [value])
        if tensor is None:
            rest.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    if len(rest) < len(graph.node):
        del graph.node[:]
        graph.node.extend(rest)


def simplify_shapes(proto: Any) -> None:
    """Shape arithmetic of an onnx.ModelProto as TensorRT 8.6 understands it; in place.

    * A Reshape whose target has one extent that is only known at run time gets a constant target with -1 in its place. The
      others are extents of a valid network, so it is the same number, and engines compute no shape there.
    * Shape reads all axes, and Slice takes some: TensorRT 8.6 ignores the attributes start and end, which are newer.
    """
    import onnx

    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    inferred = [*onnx.shape_inference.infer_shapes(proto).graph.value_info, *graph.output]
    taken = {name for _, node in format.nodes(graph) for name in (*node.input, *node.output)}
    sizes = {entry.name: [dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in inferred}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] not in producers:
            continue
        target: list[int] = []
        concat = producers[node.input[1]]
        for name in concat.input if concat.op_type == "Concat" else [node.input[1]]:
            if name in constants:
                target += onnx.numpy_helper.to_array(constants[name]).tolist()
            else:
                target.append(-1 if sizes.get(name) == [1] else 0)
        known = sizes.get(node.output[0], [])
        if len(known) == len(target):  # the -1 of the network's own code may be a number
            target = [extent or asked for extent, asked in zip(known, target, strict=True)]
        if target.count(-1) != 1 or min(target) < -1 or 0 in target:  # 0: several extents, or unknown how many
            continue
        node.input[1] = _unused(taken, f"{node.output[0]}.shape")
        graph.initializer.append(onnx.helper.make_tensor(node.input[1], onnx.TensorProto.INT64, [len(target)], target))
        del node.attribute[:]  # allowzero, which is about zeros
    for owner, node in list(format.nodes(graph)):
        limits = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type != "Shape" or not limits:
            continue
        name = node.output[0]
        node.output[0] = _unused(taken, f"{name}.all")
        del node.attribute[:]
        given = {"starts": limits.get("start", 0), "ends": limits.get("end", 2**31 - 1), "axes": 0}
        inputs = [_unused(taken, f"{name}.{what}") for what in given]
        for own, value in zip(inputs, given.values(), strict=True):
            owner.initializer.append(onnx.helper.make_tensor(own, onnx.TensorProto.INT64, [1], [value]))
        after = onnx.helper.make_node("Slice", [node.output[0], *inputs], [name])
        owner.node.insert(next(i for i, other in enumerate(owner.node) if other == node) + 1, after)
    drop_unused(graph)


def opset_entry(proto: Any) -> Any:
    """The entry of ONNX's standard operators."""
    return next(entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def _unused(taken: set[str], name: str) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def drop_unused(graph: Any) -> None:
    """Removes the nodes and constants that nothing reads any more."""
    while True:
        used = _read_names(graph) | {output.name for output in graph.output}
        idle = [node for node in graph.node if not used & set(node.output)]
        for node in idle:
            graph.node.remove(node)
        for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
            graph.initializer.remove(tensor)
        if not idle:
            return


def _read_names(graph: Any) -> set[str]:
    names = {name for node in graph.node for name in node.input}
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                names |= _read_names(subgraph) | {output.name for output in subgraph.output}
    return names
