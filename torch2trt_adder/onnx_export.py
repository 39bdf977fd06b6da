"""export_onnx(): a network with adder layers as one ONNX file, checked against PyTorch.

Each adder layer becomes one node ``torch2trt_adder::Adder2d``. TensorRT's parser makes the plugin of it; every other
runtime runs the node's body, a local function of standard operators that travels in the same file. onnx_nodes.py
defines it.

Importing this file needs torch alone; exporting needs onnx and onnxscript, the check onnxruntime.
"""

import ast
import contextlib
import functools
import importlib.util
import inspect
import json
import logging
import numbers
import os
import pathlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from . import converter, files, interrupts, onnx_graph, ops
from .onnx_nodes import DOMAIN, EXTENTS, OP_TYPE, adder_nodes, extents, nodes

__all__ = ["EXTENTS", "adder_nodes", "export_onnx", "extents", "onnxruntime_session", "run_onnxruntime", "symbol"]

_DEFAULT_OPSET = 17  # the newest that TensorRT 8.6 reads
_LEAST_OPSET = 15  # of the body's operators
_EXPORTER_OPSET = 18  # the oldest that torch's exporter writes by itself
_TENSORRT_TYPES = {torch.float32: 0, torch.float16: 1}

Axes = Mapping[int, str]

# Inside export_onnx, which translates the operator itself. For all threads, as torch's own mark of an export is: a thread
# that compiles meanwhile must not take symbolic operators for its own. The lock lets one thread export at a time.
translating = False
_exporting = threading.RLock()


def export_onnx(
    model: nn.Module | torch.export.ExportedProgram,
    args: Tensor | Sequence[Any],
    path: str | os.PathLike,
    dynamic: Axes | Sequence[Axes | None] | None = None,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    check: bool = True,
) -> pathlib.Path:
    """Writes `model` to one ONNX file that TensorRT 8.6 to 11 and ONNX Runtime read, and compares it with PyTorch.

    Adder layers of other packages (see `adopt`) are exported too, once the network with `Adder2d` in their place has given
    the same outputs on `args`; `model` and `args` stay as they are. Warns where the network has no adder layer.

    Args:
        model: a network in eval mode, float32 or float16, on any device; or what torch.export gave.
        args: its positional arguments as a list or tuple, or one tensor.
        path: of the file; written beside and renamed.
        dynamic: the axes that may vary, each with a name: ``{0: "batch"}`` for every input that has that axis, or
            one such mapping (or None) for each tensor in `args`. Axes of one name have one extent. An exported program
            keeps the dynamic axes that it was exported with. Where the network's code branches on an extent, the file
            holds for the example's branch alone, which it says itself: `build_engine` allows no other range.
        input_names, output_names: of the graph; the exporter's own where None.
        opset: of ONNX's standard operators, at least 15; by default 17, or 18 for networks that 17 cannot express
            (TensorRT 8.6 reads no further than 17).
        check: run the file in ONNX Runtime on `args`, and on `args` with other extents of the dynamic axes, and compare
            within what rounding explains.

    Returns:
        `path`.

    Raises:
        ValueError: the model is in training mode; names or axes that do not fit.
        TypeError: an adder layer in bfloat16 or float64; no nn.Module, or no list of arguments; `dynamic` of another type.
        RuntimeError: onnx, onnxscript or (for the check) onnxruntime is missing; the network cannot be exported in
            that opset; ONNX Runtime, or the network with `Adder2d` in the place of its own adder layers, computes something
            else than the network as it was given.
        OSError: the file cannot be written.
    """
    _need("onnx", "onnxscript")
    import onnx

    path = pathlib.Path(path)
    if "custom_translation_table" not in inspect.signature(torch.onnx.export).parameters:
        raise RuntimeError(f"export_onnx: torch {torch.__version__} has an older exporter: use torch 2.6 or newer.")
    if not isinstance(args, Tensor | list | tuple):
        raise TypeError(
            f"export_onnx: args must be a list or tuple of the model's arguments, or a tensor, got {type(args).__name__}."
        )
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    latest = onnx.defs.onnx_opset_version()
    if opset is not None and not _LEAST_OPSET <= opset <= latest:
        raise ValueError(
            f"export_onnx: opset must be from {_LEAST_OPSET} to {latest} (the latest that onnx {onnx.__version__} knows), got "
            f"{opset}."
        )
    if check:
        _need("onnxruntime", remedy="or leave the check out with check=False (on the command line --no-check)")
    if isinstance(model, torch.export.ExportedProgram):
        if dynamic is not None:
            raise ValueError(
                "export_onnx: an exported program has its dynamic axes already; give dynamic_shapes to "
                "torch.export.export instead of dynamic to export_onnx."
            )
        own = module = model.module()
        dynamic_shapes = None
    else:
        converter.check_model("export_onnx", model)
        dynamic_shapes = _dynamic_shapes(args, dynamic)
        own, model = model, converter._adopted_copy(model)
        module = model
    files.check_writable(path)
    if own is not module:
        _compare_with_adopted(own, module, args)
    proto = _export(model, module, args, dynamic_shapes, input_names, output_names, opset)
    _finish(proto)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise RuntimeError(f"export_onnx: torch's exporter wrote no valid ONNX model ({error}).") from error
    data = proto.SerializeToString()
    if check:
        _compare_with_onnxruntime(data, own, module, args, extents(proto))
    files.write(path, data)
    if not adder_nodes(proto.graph):
        warnings.warn(
            f"export_onnx: {type(own).__name__} has no adder layer, so {path} holds none; adopt() and "
            "register_adder_class() recognise adder layers of other packages, adderize() makes them from convolutions.",
            stacklevel=2,
        )
    return path


def _need(*packages: str, remedy: str = "") -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        alternative = f", {remedy}" if remedy else ""
        raise RuntimeError(f"export_onnx: {missing[0]} is not installed: pip install {' '.join(missing)}{alternative}.")


def _dynamic_shapes(args: tuple, dynamic: Axes | Sequence[Axes | None] | None) -> Any:
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
    """Axes of one name must have one extent in the example, too."""
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


def _by_parameter(model: Any, shapes: tuple | None) -> tuple | None:
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


# ---- the node, and torch's exporter


def _attributes(
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


def symbol(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """What `ops.adder2d` stands for inside a plain ``torch.onnx.export``: the node alone, without its body."""
    if not hasattr(torch.onnx, "ops"):
        raise RuntimeError(
            f"adder2d: torch.onnx.export(..., dynamo=True) of torch {torch.__version__} knows no symbolic operators: use "
            "torch2trt_adder.export_onnx, dynamo=False, or torch 2.8 or newer."
        )
    stride, padding, dilation = (_pair(v) for v in (stride, padding, dilation))
    output = ops._adder2d_fake(input, weight, bias, stride, padding, dilation, groups)
    inputs = (input, weight.float(), weight.new_zeros(len(weight)).float() if bias is None else bias.float())
    attributes = _attributes(stride, padding, dilation, groups, output.dtype)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OP_TYPE}", inputs, attrs=attributes, dtype=output.dtype, shape=output.shape, version=1
    )


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _torchscript_symbol(g, input, weight, bias, stride, padding, dilation, groups):
    """The same for torch's older exporter, ``torch.onnx.export(..., dynamo=False)``."""
    kinds = {"Float": torch.float32, "Half": torch.float16}
    scalar = input.type().scalarType()
    attributes = _attributes(stride, padding, dilation, groups, kinds.get(scalar, scalar))
    if torch.onnx.symbolic_helper._is_none(bias):
        bias = g.op("Constant", value_t=torch.zeros(weight.type().sizes()[0]))
    elif scalar == "Half":
        bias = g.op("Cast", bias, to_i=1)
    if scalar == "Half":
        weight = g.op("Cast", weight, to_i=1)
    suffixes = {list: "i", int: "i", str: "s"}
    named = {f"{name}_{suffixes[type(value)]}": value for name, value in attributes.items()}
    output = g.op(f"{DOMAIN}::{OP_TYPE}", input, weight, bias, **named)
    image = input.type().sizes()
    if image is not None and None not in image:
        size = ops._output_size(image, weight.type().sizes(), None, stride, padding, dilation, groups)
        output.setType(input.type().with_sizes(size))
    return output


torch.onnx.register_custom_op_symbolic(
    f"{DOMAIN}::adder2d",
    torch.onnx.symbolic_helper.parse_args("v", "v", "v", "is", "is", "is", "i")(_torchscript_symbol),
    9,
)


def _translation() -> Any:
    """The exporter's translation of torch.ops.torch2trt_adder.adder2d."""
    import onnx
    import onnxscript

    Schema = onnx.defs.OpSchema
    integers, integer, string = Schema.AttrType.INTS, Schema.AttrType.INT, Schema.AttrType.STRING
    schema = Schema(
        OP_TYPE,
        DOMAIN,
        1,
        inputs=[
            Schema.FormalParameter("x", "T"),
            Schema.FormalParameter("weight", "tensor(float)"),
            Schema.FormalParameter("bias", "tensor(float)"),
        ],
        outputs=[Schema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[
            *(Schema.Attribute(name, integers, required=True) for name in ("stride", "padding", "dilation")),
            *(Schema.Attribute(name, integer, required=True) for name in ("groups", "output_type")),
            Schema.Attribute("plugin_namespace", string, required=False),
        ],
    )
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), OP_TYPE, schema)
    op = onnxscript.opset18
    dtypes = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.FLOAT16: torch.float16}

    def adder2d(input, weight, bias, stride, padding, dilation, groups):
        attributes = _attributes(stride, padding, dilation, groups, dtypes.get(int(input.dtype), input.dtype))
        if bias is None:
            zeros = np.zeros(int(weight.shape[0]), np.float32)
            bias = op.Constant(value=onnx.numpy_helper.from_array(zeros))
        elif input.dtype != onnx.TensorProto.FLOAT:
            bias = op.Cast(bias, to=onnx.TensorProto.FLOAT)
        if input.dtype != onnx.TensorProto.FLOAT:
            weight = op.Cast(weight, to=onnx.TensorProto.FLOAT)
        return node(input, weight, bias, **attributes)

    return adder2d


def _scalar_tensor_translation() -> Any:
    """That of torch.ops.aten.scalar_tensor, which the exporter rounds to float32 even where it is float64."""
    import onnx
    import onnxscript

    op = onnxscript.opset18

    def scalar_tensor(s, dtype=onnx.TensorProto.FLOAT, layout=None, device=None, pin_memory=None):
        if not isinstance(s, bool | int | float):  # computed from an extent
            return op.Cast(s, to=dtype)
        array = np.array(s, np.float64 if isinstance(s, float) else np.int64)
        value = op.Constant(value=onnx.numpy_helper.from_array(array))
        return value if dtype == onnx.helper.np_dtype_to_tensor_dtype(array.dtype) else op.Cast(value, to=dtype)

    return scalar_tensor


def _export(
    model: nn.Module | torch.export.ExportedProgram,
    module: nn.Module,
    args: tuple,
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    opset: int | None,
) -> Any:
    """The onnx.ModelProto that torch's exporter makes, in the opset asked for."""
    import onnx

    wanted = _DEFAULT_OPSET if opset is None else opset
    with interrupts.kept(), torch.no_grad(), _translated():
        try:
            program = torch.onnx.export(
                model,
                (*args, {}),  # the exporter takes a dict at the end for keyword arguments
                None,
                opset_version=_EXPORTER_OPSET,
                optimize=False,  # see onnx_graph
                dynamic_shapes=_by_parameter(model, dynamic_shapes),
                dynamo=True,
                external_data=False,
                verbose=False,
                custom_translation_table={
                    ops._adder2d: _translation(),
                    torch.ops.aten.scalar_tensor.default: _scalar_tensor_translation(),
                },
            )
        except RuntimeError as error:  # OnnxExporterError is one, what its passes raise is another
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, TypeError) and str(cause).startswith("adder2d:"):
                raise cause from None
            try:
                output = _call(module, *args)
            except Exception as own:
                raise RuntimeError(f"export_onnx: the network itself fails on args: {type(own).__name__}: {own}") from own
            for leaf in tree_leaves(output):
                if leaf is not None and not isinstance(leaf, Tensor):
                    raise RuntimeError(
                        f"export_onnx: the network returns {type(leaf).__name__} {str(leaf)[:40]!r}, ONNX files return tensors "
                        "only; make a tensor of it, or leave it out."
                    ) from error
            raise RuntimeError(
                f"export_onnx: torch's exporter cannot express the network: {type(cause).__name__}: {cause}"
            ) from error
    onnx_graph.finish(program.model, input_names, output_names, max(wanted, _EXPORTER_OPSET))
    proto = program.model_proto
    onnx_graph.lift_constants(proto.graph)
    tensors, inputs = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(args)), len(proto.graph.input)
    if inputs != tensors:
        raise RuntimeError(
            f"export_onnx: the file has {inputs} inputs, args {tensors} tensors: an input that "
            "the network does not use was dropped by the exporter; leave it out of args."
        )
    if not proto.graph.output:
        raise RuntimeError("export_onnx: the network returns no tensor, so the file would hold nothing.")
    _name_nodes(proto)
    if dynamic_shapes is not None:
        _name_axes(proto, [axes for axes in tree_structure(args).flatten_up_to(dynamic_shapes) if axes is not None])
    have = _opset(proto).version
    if have < wanted:  # the exporter has only logged it
        raise RuntimeError(f"export_onnx: torch's exporter cannot write opset {opset} here; leave opset out.")
    if have > wanted:
        try:
            older = _in_opset_17(proto)
            proto = older if wanted == 17 else onnx.version_converter.convert_version(older, wanted)
        except RuntimeError as error:
            if opset is not None:
                raise RuntimeError(
                    f"export_onnx: the network cannot be written in opset {opset} "
                    f"({str(error).strip().splitlines()[-1]}); leave opset out, which gives {have}."
                ) from error
    _note_extents(proto, program.exported_program)
    return proto


def _opset(proto: Any) -> Any:
    """The entry of ONNX's standard operators."""
    return next(entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def _name_axes(proto: Any, axes: Sequence[Axes]) -> None:
    """Gives the dynamic axes their names, one mapping for each input: torch's exporter does not where an argument is no tensor."""
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


def _note_extents(proto: Any, program: torch.export.ExportedProgram) -> None:
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
            least, most = (int(v) if v.is_Integer and v < 2**31 else None for v in (within.lower, within.upper))
            least = least if least is not None and least > 2 else 0  # torch.export says 2 where it knows nothing
            if least or most is not None:
                limits[dim.dim_param] = (least, most)
    if limits:
        entry = proto.metadata_props.add()
        entry.key, entry.value = EXTENTS, json.dumps(limits)


def _in_opset_17(proto: Any) -> Any:
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
        new = onnx.defs.get_schema(node.op_type, _opset(proto).version, "")
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
            most = -(-extent // parts)
            sizes = np.array([min(most, extent - i * most) for i in range(parts)], np.int64)
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
    _opset(older).version = 17
    return older


def _name_nodes(proto: Any) -> None:
    """Adder2d nodes are named after their modules, as torch2trt's layers are: TensorRT names its layers after them."""
    for i, node in enumerate(adder_nodes(proto.graph)):
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
        modules = [name for name in ast.literal_eval(scopes)[:-1] if name]
        node.name = f"{modules[-1] if modules else 'model'}:adder2d_{i}"


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Marks export_onnx's own call of the exporter, and drops remarks on packages that do not concern this network."""
    global translating
    logger = logging.getLogger("torch.onnx")
    with _exporting, warnings.catch_warnings():
        level, translating = logger.level, True
        logger.setLevel(logging.ERROR)
        try:
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", "# The axis name")  # one name for several axes, as asked for
            warnings.filterwarnings("ignore", "# ONNX model has different number of inputs")  # see _name_axes
            yield
        finally:
            translating = False
            logger.setLevel(level)


# ---- what the exporter leaves to do


def _finish(proto: Any) -> None:
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
                if value is None:  # computed from something else: TensorRT and ONNX Runtime do that, too
                    continue
                known[name] = value
                graph.initializer.append(onnx.numpy_helper.from_array(value, f"{name}.float32"))
            node.input[i] = f"{name}.float32"
    _drop_unused(graph)
    if adders:
        if not any(entry.domain == DOMAIN for entry in proto.opset_import):
            proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
        opset = _opset(proto).version
        proto.functions.append(onnx.parser.parse_function(_BODY % opset))
        # 8 is the first version with functions and goes with opset 17.
        proto.ir_version = max(8, min(proto.ir_version, 8 if opset <= 17 else 10))


def _drop_unused(graph: Any) -> None:
    """Removes the constants and casts that nothing reads any more."""
    while True:
        used = _read_names(graph) | {output.name for output in graph.output}
        idle = [n for n in graph.node if n.op_type in ("Cast", "Constant", "Identity") and not used & set(n.output)]
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


# The operator in standard ones. The outer Scan runs over the samples and the inner one over the filters of a group, so
# that besides one sample's taps only one filter's terms are in memory. Taps are gathered, not multiplied by a kernel of
# ones, which would turn an infinity into NaN. Sums are float32 whatever the type of x.
_BODY = """
<domain: "torch2trt_adder", opset_import: ["" : %d], doc_string: "y = bias - sum over c,r,s of |x - weight|">
Adder2d <stride, padding, dilation, groups, output_type> (x, weight, bias) => (y)
{
  step = Constant <value_ints: ints = @stride> ()
  pad = Constant <value_ints: ints = @padding> ()
  reach = Constant <value_ints: ints = @dilation> ()
  group = Constant <value_int: int = @groups> ()
  first = Constant <value_int = 0> ()
  second = Constant <value_int = 1> ()
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
  none = Constant <value_ints = [0, 0]> ()
  map_axes = Constant <value_ints = [1, 2]> ()

  pads = Concat <axis = 0> (none, pad, none, pad)
  x_float = Cast <to = 1> (x)
  padded = Pad (x_float, pads)

  N = Shape <start = 0, end = 1> (x)
  K = Shape <start = 0, end = 1> (weight)
  image = Shape <start = 2> (padded)
  RS = Shape <start = 2> (weight)
  span = Sub (RS, one)
  span_dilated = Mul (span, reach)
  room = Sub (image, span_dilated)
  room_less_one = Sub (room, one)
  steps = Div (room_less_one, step)
  PQ = Add (steps, one)

  R = Gather (RS, first)
  S = Gather (RS, second)
  P = Gather (PQ, first)
  Q = Gather (PQ, second)
  stride_h = Gather (step, first)
  stride_w = Gather (step, second)
  dilation_h = Gather (reach, first)
  dilation_w = Gather (reach, second)
  r = Range (first, R, second)
  s = Range (first, S, second)
  p = Range (first, P, second)
  q = Range (first, Q, second)
  r_dilated = Mul (r, dilation_h)
  r_column = Unsqueeze (r_dilated, one)
  p_strided = Mul (p, stride_h)
  rows = Add (r_column, p_strided)
  s_dilated = Mul (s, dilation_w)
  s_column = Unsqueeze (s_dilated, one)
  q_strided = Mul (q, stride_w)
  columns = Add (s_column, q_strided)

  groups_1d = Reshape (group, one)
  filter_size = Shape <start = 1> (weight)
  CRS = ReduceProd <keepdims = 1> (filter_size)
  taps_shape = Concat <axis = 0> (groups_1d, CRS, rest)
  filters_shape = Concat <axis = 0> (groups_1d, rest, CRS, one)
  weight_float = Cast <to = 1> (weight)
  filters_of_groups = Reshape (weight_float, filters_shape)
  filters = Transpose <perm = [1, 0, 2, 3]> (filters_of_groups)

  distances = Scan <num_scan_inputs = 1, body = of_sample (sample) => (sample_maps) {
    sample_rows = Gather <axis = 1> (sample, rows)
    sample_taps = Gather <axis = 3> (sample_rows, columns)
    sample_taps_first = Transpose <perm = [0, 1, 3, 2, 4]> (sample_taps)
    taps = Reshape (sample_taps_first, taps_shape)
    sample_maps = Scan <num_scan_inputs = 1, scan_output_axes = [1], body = of_filter (filter) => (filter_map) {
      difference = Sub (taps, filter)
      distance = Abs (difference)
      filter_map = ReduceSum <keepdims = 0> (distance, one)
    }> (filters)
  }> (padded)

  y_shape = Concat <axis = 0> (N, K, PQ)
  maps = Reshape (distances, y_shape)
  negative = Neg (maps)
  bias_float = Cast <to = 1> (bias)
  bias_maps = Unsqueeze (bias_float, map_axes)
  y_float = Add (negative, bias_maps)
  y = CastLike (y_float, x)
}
"""


# ---- the check


def onnxruntime_session(model: bytes | str | os.PathLike) -> Any:
    """An onnxruntime.InferenceSession on the CPU, for an exported file or its contents.

    Raises:
        RuntimeError: onnxruntime is missing or refuses the model.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise RuntimeError("onnxruntime is not installed: pip install onnxruntime.")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception class for each of its status codes
        raise RuntimeError(f"ONNX Runtime refuses the model: {error}") from error


def run_onnxruntime(session: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The graph's outputs for its inputs in their order, on the CPU."""
    feeds = {entry.name: tensor.detach().cpu().numpy() for entry, tensor in zip(session.get_inputs(), tensors)}
    try:
        return [torch.from_numpy(np.asarray(array)) for array in session.run(None, feeds)]
    except Exception as error:
        raise RuntimeError(f"ONNX Runtime cannot run the model: {error}") from error


def _call(model: Callable[..., Any], *args: Any) -> Any:
    """The model's outputs; `args` stay as they are, even where the model writes into its inputs."""
    with torch.no_grad():
        return model(*tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, args))


def _run(model: nn.Module, args: tuple) -> list[Tensor]:
    return [leaf.cpu() for leaf in tree_leaves(_call(model, *args)) if isinstance(leaf, Tensor)]


def _bounds(model: nn.Module, args: tuple) -> list[Tensor]:
    try:
        bounds = converter.rounding_bounds(functools.partial(_call, model), args)
    except NotImplementedError as error:  # of a dispatch mode, for torch.cond and the like
        raise RuntimeError(
            f"export_onnx: the check cannot follow this network ({str(error).splitlines()[0][:100]}); leave it out with "
            "check=False (on the command line --no-check)."
        ) from error
    return [leaf.cpu() for leaf in tree_leaves(bounds) if isinstance(leaf, Tensor)]


def _compare_with_adopted(own: nn.Module, adopted: nn.Module, args: tuple) -> None:
    """Raises unless the network that was given computes what it does with its adder layers adopted, which is exported."""
    try:
        expected = _run(own, args)
    except Exception as error:
        raise RuntimeError(
            f"export_onnx: the network itself fails on args: {type(error).__name__}: {error}; its own adder layers must run, "
            "since the file is compared with them (or replace them yourself, by adopt())."
        ) from error
    try:
        got, bounds = _run(adopted, args), _bounds(adopted, args)
    except Exception as error:
        raise RuntimeError(
            f"export_onnx: the network fails on args once its adder layers are replaced by Adder2d: {type(error).__name__}: "
            f"{error}; {_NOT_AN_ADDER}."
        ) from error
    sides = "the network with Adder2d in place of its adder layers", "the network as it is"
    _compare(got, expected, bounds, sides, "", _NOT_AN_ADDER)


_NOT_AN_ADDER = (
    "a layer that looks like an adder layer computes something else: rename its parameter `adder`, or replace the layer "
    "yourself"
)


def _compare_with_onnxruntime(
    data: bytes, own: nn.Module, module: nn.Module, args: tuple, limits: Mapping[str, tuple[int, int | None]]
) -> None:
    """Raises unless the file computes what `own` does; `module` is the same network with `Adder2d`, of known rounding."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    session = onnxruntime_session(data)
    inputs = session.get_inputs()

    def compare(args: tuple, expected: list[Tensor], where: str = "", remedy: str = "please report this network") -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        try:
            got = run_onnxruntime(session, tensors)
        except RuntimeError as error:
            if all(tensor.numel() for tensor in tensors):
                raise
            raise RuntimeError(f"export_onnx: args holds an empty tensor; give an example with values ({error}).") from error
        _compare(got, expected, _bounds(module, args), ("ONNX Runtime", "PyTorch"), where, remedy)

    compare(args, _run(own, args))
    dims = [[dim if isinstance(dim, str) else None for dim in entry.shape] for entry in inputs]
    extent_of = {dim: n for names, t in zip(dims, tensors) for dim, n in zip(names, t.shape) if dim is not None}
    for change in (_another, _double) if extent_of else ():  # the first that the network takes
        other_of = {dim: change(extent, *limits.get(dim, (0, None))) for dim, extent in extent_of.items()}
        resized = iter(
            [
                converter.resized(t, [other_of.get(dim, extent) for dim, extent in zip(names, t.shape)])
                for names, t in zip(dims, tensors)
            ]
        )
        other = tree_map(lambda leaf: next(resized) if isinstance(leaf, Tensor) else leaf, args)
        try:
            expected = _run(own, other)
        except Exception:  # in its own code: nothing to compare with
            continue
        where = f" for {', '.join(f'{dim} = {extent}' for dim, extent in other_of.items())}"
        return compare(other, expected, where, "the file holds for the extents of args alone, so make other axes dynamic, or none")


def _another(extent: int, least: int, most: int | None) -> int:
    return extent - 1 if extent > max(least, 1) else min(extent + 1, most or extent + 1)


def _double(extent: int, least: int, most: int | None) -> int:
    return min(2 * extent, most or 2 * extent)


def _compare(
    got: list[Tensor], expected: list[Tensor], bounds: list[Tensor], sides: tuple[str, str], where: str, remedy: str
) -> None:
    """Raises RuntimeError where an output of the first side is further from the second's than its bound."""
    first, second = sides
    if len(got) != len(expected):
        raise RuntimeError(
            f"export_onnx: there are {len(got)} outputs in {first} and {len(expected)} in {second}{where}; {remedy}."
        )
    for i, (y, y0, bound) in enumerate(zip(got, expected, bounds, strict=True)):
        if y.shape != y0.shape or y.dtype is not y0.dtype:
            raise RuntimeError(
                f"export_onnx: output {i} is {y.dtype} {list(y.shape)} in {first} and {y0.dtype} {list(y0.shape)} in "
                f"{second}{where}; {remedy}."
            )
        most = torch.finfo(y0.dtype).max if y0.is_floating_point() else torch.inf
        y, y0 = y.double(), y0.double()
        # Where the second is infinite, a number that is nearly too large is as good.
        y = torch.where(y0.isinf(), y.clamp(-most, most), y)
        y0 = y0.clamp(-most, most)
        numbers = ~y0.isnan()
        difference = (y - y0)[numbers].abs().max().item() if numbers.any() else 0.0
        if not difference <= bound.item() or not bool((y.isnan() == y0.isnan()).all()):
            raise RuntimeError(
                f"export_onnx: output {i} differs between {first} and {second} by up to {difference:.3g}{where}, beyond the "
                f"{bound.item():.3g} that rounding explains; {remedy}."
            )
