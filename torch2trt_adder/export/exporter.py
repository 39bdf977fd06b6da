"""export_onnx(): a network with adder layers as one ONNX file, checked against PyTorch.

Each adder layer becomes one node ``torch2trt_adder::Adder2d``. TensorRT's parser makes the plugin of it; every other
runtime runs the node's body, a local function of standard operators that travels in the same file. format.py
defines it.

Importing this file needs only torch; exporting needs onnx and onnxscript, the check onnxruntime.
"""

import importlib.util
import inspect
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure

from ..nn import adopt, eval_mode
from ..utils import files, interrupts
from . import graph
from .check import call_model, compare_with_adopted, compare_with_onnxruntime
from .dynamic import Axes, by_parameter, make_dynamic_shapes, name_axes, note_extents
from .format import adder_nodes, extents
from .graph import opset_entry
from .opset17 import in_opset_17
from .postprocess import add_body, name_nodes
from .symbols import exporting, translations

_DEFAULT_OPSET = 17  # the newest that TensorRT 8.6 reads
_MIN_OPSET = 15  # of the body's operators
_EXPORTER_OPSET = 18  # the oldest that torch's exporter writes by itself


def export_onnx(
    model: nn.Module | torch.export.ExportedProgram,
    args: Tensor | Sequence[Any],
    path: str | os.PathLike[str],
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
        path: of the file; written atomically (temporary file, then rename).
        dynamic: the axes that may vary, each with a name: ``{0: "batch"}`` for every input that has that axis, or
            one such mapping (or None) for each tensor in `args`. Axes of one name have one extent. An exported program
            keeps the dynamic axes that it was exported with. Where the network's code branches on an extent, the file
            is valid only for the example's branch; the limits are stored in its metadata, and `build_engine` checks them.
        input_names, output_names: of the graph; the exporter's own where None.
        opset: of ONNX's standard operators, at least 15; by default 17, or 18 for networks that 17 cannot express
            (TensorRT 8.6 reads no further than 17).
        check: run the file in ONNX Runtime on `args`, and on `args` with other extents of the dynamic axes, and compare
            within what rounding explains.

    Returns:
        `path`.

    Raises:
        ValueError: the model is in training mode; names or axes that do not fit.
        TypeError: an adder layer in bfloat16 or float64; a model that is not an nn.Module; args that are not a list;
            `dynamic` of another type.
        RuntimeError: onnx, onnxscript or (for the check) onnxruntime is missing; the network cannot be exported in
            that opset; ONNX Runtime, or the network with `Adder2d` in place of its own adder layers, computes something
            else than the original network.
        OSError: the file cannot be written.
    """
    _need("onnx", "onnxscript")
    import onnx

    path = pathlib.Path(path)
    args = _check_arguments(args, opset)
    if check:
        _need("onnxruntime", remedy="or leave the check out with check=False (on the command line --no-check)")
    if isinstance(model, torch.export.ExportedProgram):
        if dynamic is not None:
            raise ValueError(
                "export_onnx: an exported program has its dynamic axes already; give dynamic_shapes to "
                "torch.export.export instead of dynamic to export_onnx."
            )
        dynamic_shapes = None
        own: nn.Module = model.module()
        module = own
    else:
        eval_mode.check_model("export_onnx", model)
        dynamic_shapes = make_dynamic_shapes(args, dynamic)
        own, model = model, adopt.adopted_copy(model)
        module = model
    files.check_writable(path)
    if own is not module:
        compare_with_adopted(own, module, args)
    proto = _export(model, module, args, dynamic_shapes, input_names, output_names, opset)
    add_body(proto)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise RuntimeError(f"export_onnx: torch's exporter wrote no valid ONNX model ({error}).") from error
    data = proto.SerializeToString()
    if check:
        compare_with_onnxruntime(data, own, module, args, extents(proto))
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


def _check_arguments(args: Tensor | Sequence[Any], opset: int | None) -> tuple[Any, ...]:
    """`args` as a tuple, or an error for what this torch or onnx cannot serve."""
    import onnx

    if "custom_translation_table" not in inspect.signature(torch.onnx.export).parameters:
        raise RuntimeError(f"export_onnx: torch {torch.__version__} has an older exporter: use torch 2.6 or newer.")
    if not isinstance(args, Tensor | list | tuple):
        raise TypeError(
            f"export_onnx: args must be a list or tuple of the model's arguments, or a tensor, got {type(args).__name__}."
        )
    latest = onnx.defs.onnx_opset_version()
    if opset is not None and not _MIN_OPSET <= opset <= latest:
        raise ValueError(
            f"export_onnx: opset must be from {_MIN_OPSET} to {latest} (the latest that onnx {onnx.__version__} knows), got "
            f"{opset}."
        )
    return (args,) if isinstance(args, Tensor) else tuple(args)


def _export(
    model: nn.Module | torch.export.ExportedProgram,
    module: nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    opset: int | None,
) -> Any:
    """The onnx.ModelProto that torch's exporter makes, in the opset asked for."""
    wanted = _DEFAULT_OPSET if opset is None else opset
    program = _run_exporter(model, module, args, by_parameter(model, dynamic_shapes))
    graph.finish(program.model, input_names, output_names, max(wanted, _EXPORTER_OPSET))
    proto: Any = program.model_proto
    graph.lift_constants(proto.graph)
    graph.simplify_shapes(proto)
    tensors, inputs = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(args)), len(proto.graph.input)
    if inputs != tensors:
        raise RuntimeError(
            f"export_onnx: the file has {inputs} inputs, args {tensors} tensors: an input that "
            "the network does not use was dropped by the exporter; leave it out of args."
        )
    if not proto.graph.output:
        raise RuntimeError("export_onnx: the network returns no tensor, so the file would hold nothing.")
    name_nodes(proto)
    if dynamic_shapes is not None:
        name_axes(proto, [axes for axes in tree_structure(args).flatten_up_to(dynamic_shapes) if axes is not None])
    proto = _in_opset(proto, wanted, opset)
    assert program.exported_program is not None  # the exporter has just made it
    note_extents(proto, program.exported_program)
    return proto


def _run_exporter(
    model: nn.Module | torch.export.ExportedProgram, module: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any
) -> "torch.onnx.ONNXProgram":
    """torch's exporter, with errors that name the cause."""
    with interrupts.kept(), torch.no_grad(), exporting():
        try:
            program = torch.onnx.export(
                model,
                (*args, {}),  # the exporter takes a dict at the end for keyword arguments
                None,
                opset_version=_EXPORTER_OPSET,
                optimize=False,  # see graph.py
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
                custom_translation_table=translations(),
            )
        except RuntimeError as error:  # OnnxExporterError is one, what its passes raise is another
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, TypeError) and str(cause).startswith("adder2d:"):
                raise cause from None
            _check_outputs(module, args, error)
            raise RuntimeError(
                f"export_onnx: torch's exporter cannot express the network: {type(cause).__name__}: {cause}"
            ) from error
    assert program is not None  # the type of the older exporter's result
    return program


def _check_outputs(module: nn.Module, args: tuple[Any, ...], error: RuntimeError) -> None:
    """Raises where the exporter's `error` comes from the network: it fails itself, or returns other things than tensors."""
    try:
        output = call_model(module, *args)
    except Exception as own:
        raise RuntimeError(f"export_onnx: the network itself fails on args: {type(own).__name__}: {own}") from own
    for leaf in tree_leaves(output):
        if leaf is not None and not isinstance(leaf, Tensor):
            raise RuntimeError(
                f"export_onnx: the network returns {type(leaf).__name__} {str(leaf)[:40]!r}, but ONNX files return only "
                "tensors; make a tensor of it, or leave it out."
            ) from error


def _in_opset(proto: Any, wanted: int, opset: int | None) -> Any:
    """The model in opset `wanted`; in its own where that fails and the caller asked for none (`opset` is None)."""
    import onnx

    have = opset_entry(proto).version
    if have < wanted:  # the exporter has only logged it
        raise RuntimeError(f"export_onnx: torch's exporter cannot write opset {opset} here; leave opset out.")
    if have == wanted:
        return proto
    try:
        older = in_opset_17(proto)
        return older if wanted == 17 else onnx.version_converter.convert_version(older, wanted)
    except RuntimeError as error:
        if opset is None:
            return proto
        raise RuntimeError(
            f"export_onnx: the network cannot be written in opset {opset} "
            f"({str(error).strip().splitlines()[-1]}); leave opset out, which gives {have}."
        ) from error
