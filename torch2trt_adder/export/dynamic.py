"""The option `dynamic` of export_onnx: names of axes."""

import inspect
import json
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils._pytree import tree_leaves, tree_map

from .format import EXTENTS

Axes = Mapping[int, str]


def make_dynamic_shapes(args: tuple[Any, ...], dynamic: Axes | Sequence[Axes | None] | None) -> Any:
    """The mapping of each tensor of `args`, in the structure of `args`, as torch's exporter wants it."""
    if dynamic is None:
        return None
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    if isinstance(dynamic, Mapping):
        each = [_axes(dynamic)] * len(tensors)
    elif isinstance(dynamic, list | tuple):
        each = [{} if axes is None else _axes(axes) for axes in dynamic]
    else:
        raise _wrong_axes(dynamic)
    if len(each) != len(tensors):
        raise ValueError(
            f"export_onnx: dynamic holds {len(each)} mappings, but args {len(tensors)} tensors; give one mapping for "
            "each, or one for all."
        )
    for i, (tensor, axes) in enumerate(zip(tensors, each)):
        for axis, name in axes.items():
            if axis >= tensor.dim() and not isinstance(dynamic, Mapping):
                raise ValueError(f"export_onnx: input {i} has {tensor.dim()} axes and no axis {axis} ({name!r}).")
            if all(axis >= other.dim() for other in tensors):
                raise ValueError(f"export_onnx: no input has an axis {axis} ({name!r}).")
    _check_extents(tensors, each)
    remaining = iter(each)

    def shapes(leaf: Any) -> dict[int, str] | None:
        if not isinstance(leaf, Tensor):
            return None
        return {axis: name for axis, name in next(remaining).items() if axis < leaf.dim()}

    return tree_map(shapes, args)


def _check_extents(tensors: Sequence[Tensor], each: Sequence[dict[int, str]]) -> None:
    """Axes of one name must have one extent in the example as well."""
    first: dict[str, tuple[int, int, int]] = {}
    for i, (tensor, axes) in enumerate(zip(tensors, each)):
        for axis, name in axes.items():
            if axis < tensor.dim():
                j, other, extent = first.setdefault(name, (i, axis, tensor.shape[axis]))
                if tensor.shape[axis] != extent:
                    raise ValueError(
                        f"export_onnx: dynamic gives axis {other} of input {j} and axis {axis} of input {i} one name, {name!r}, "
                        f"but their extents are {extent} and {tensor.shape[axis]}; give them different names."
                    )


def _axes(axes: Any) -> dict[int, str]:
    """One mapping of `dynamic`, checked; NumPy's integers are integers."""
    if not isinstance(axes, Mapping):
        raise _wrong_axes(axes)
    checked: dict[int, str] = {}
    for axis, name in axes.items():
        if not isinstance(axis, numbers.Integral) or isinstance(axis, bool) or not isinstance(name, str):
            raise _wrong_axes(axes)
        if axis < 0 or not name:
            raise ValueError(
                f'export_onnx: dynamic must map axes, counted from 0, to names, as {{0: "batch"}}, got {axes}.'
            )
        checked[int(axis)] = name
    return checked


def by_parameter(model: Any, shapes: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """`shapes` of the arguments as torch's exporter wants them: those of *args as one tuple."""
    if shapes is None:
        return None
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    i = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else len(shapes)
    return (*shapes[:i], shapes[i:]) if i < len(shapes) else shapes


def _wrong_axes(value: Any) -> TypeError:
    return TypeError(
        f'export_onnx: dynamic must map axes to names, as {{0: "batch"}}, or be a list of such mappings or None, one for '
        f"each tensor in args, got {value!r}."
    )


def name_axes(proto: Any, axes: Sequence[Axes]) -> None:
    """Gives the dynamic axes their names, one mapping for each input: torch's exporter does not where an argument is not a tensor."""
    names: dict[str, str] = {}
    for entry, each in zip(proto.graph.input, axes, strict=True):
        for axis, name in each.items():
            old = entry.type.tensor_type.shape.dim[axis].dim_param
            if old:
                names.setdefault(old, name)
    if not names:
        return
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")
    for entry in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in entry.type.tensor_type.shape.dim:
            if dim.dim_param:  # a name, or an expression of some
                dim.dim_param = pattern.sub(lambda match: names[match[0]], dim.dim_param)


def note_extents(proto: Any, program: torch.export.ExportedProgram) -> None:
    """Writes into the file for which extents of its dynamic axes it holds, where the exporter has found limits.

    A network that branches on an extent is exported as the example went, and only the program's constraints tell.
    """
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    specs = program.graph_signature.input_specs
    # Arguments that are no tensors are constants of the file, and none of its inputs.
    names = [s.arg.name for s in specs if s.kind is InputKind.USER_INPUT and not isinstance(s.arg, ConstantArgument)]
    limits = {}
    for entry, name in zip(proto.graph.input, names, strict=True):
        for dim, extent in zip(entry.type.tensor_type.shape.dim, getattr(values[name], "shape", ())):
            within = program.range_constraints.get(extent.node.expr) if isinstance(extent, torch.SymInt) else None
            if within is None:
                continue
            min_extent, max_extent = (
                int(v) if v.is_Integer and v < 2**31 else None for v in (within.lower, within.upper)
            )
            min_extent = (
                min_extent if min_extent is not None and min_extent > 2 else 0
            )  # torch.export says 2 where it knows nothing
            if min_extent or max_extent is not None:
                limits[dim.dim_param] = (min_extent, max_extent)
    if limits:
        entry = proto.metadata_props.add()
        entry.key, entry.value = EXTENTS, json.dumps(limits)
