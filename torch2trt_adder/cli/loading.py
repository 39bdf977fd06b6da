"""Networks and their inputs, for the command line: from a function, an exported program or an ONNX file."""

import importlib
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..nn.adder2d import Adder2d
from ..nn.checkpoints import load_checkpoint
from ..nn.fused import FusedAdder2d
from ..nn.recognise import layer_fields
from . import programs
from .sources import check_exportable, check_source

Shape = tuple[int, ...]
_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_INSTALLED = tuple({os.path.dirname(os.path.dirname(torch.__file__)), os.path.dirname(os.__file__)})


def load_model(
    source: str, checkpoint: pathlib.Path | None = None, half: bool = False, trust: bool = False
) -> nn.Module | torch.export.ExportedProgram:
    """A network in eval mode from ``package.module:function`` (called without arguments), or a program from a .pt2 file.

    Args:
        source: names either.
        checkpoint: parameters for the function's network.
        half: the function's network in float16.
        trust: the .pt2 file may run code of its own.

    Raises:
        RuntimeError: the function cannot be found, or raises; the checkpoint does not fit.
        ValueError: `source` is not a model, or the .pt2 file cannot be loaded.
        OSError: a file cannot be read.
    """
    check_exportable(source)
    check_source(source, checkpoint, half)
    if source.endswith(".pt2"):
        return programs.load(pathlib.Path(source), trust)
    module_name, _, function = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _import(module_name, source)
    make = getattr(module, function, None)
    if not callable(make):
        raise RuntimeError(f"the function {source} cannot be found: {module_name} has no function {function!r}.")
    try:
        model = make()
    except (Exception, SystemExit) as error:  # the user's code
        raise RuntimeError(f"{source}() raised {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise RuntimeError(f"{source}() must return a torch.nn.Module, got {type(model).__name__}.")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval().half() if half else model.eval()


def _import(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # one that the module itself imports
            raise RuntimeError(f"{name} cannot be imported: it raised {describe(error)}") from error
        raise RuntimeError(f"the function {source} cannot be found ({error}).") from error
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"{name} cannot be imported: it raised {describe(error)}") from error


def describe(error: BaseException) -> str:
    """What was raised and where in the user's code, as the end of a sentence."""
    message = str(error).strip()
    if isinstance(error, SystemExit):
        message = f"sys.exit({error.code!r})"
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    where = place(error)
    if isinstance(error, SyntaxError) or where is None:  # a SyntaxError names its file and line
        return text
    return f"{text} (at {where})"


def place(error: BaseException) -> str | None:
    """File and line of the user's code that `error` went through last; None where there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        folder = os.path.dirname(frame.filename)
        ours = folder == _PACKAGE or folder.startswith(_PACKAGE + os.sep)
        if not ours and not folder.startswith(_INSTALLED) and os.path.isfile(frame.filename):
            return f"{os.path.relpath(frame.filename)}:{frame.lineno}"
    return None


def source_file(source: str) -> pathlib.Path | None:
    """The Python file of a function that `load_model` has called."""
    file = getattr(sys.modules.get(source.partition(":")[0]), "__file__", None)
    return None if file is None else pathlib.Path(file)


def adder_layers(model: nn.Module | torch.export.ExportedProgram, args: Sequence[Any]) -> int:
    """How many adder layers a network has, ours and third-party ones; without any, how often it calls `adder2d` itself."""
    operators = torch.ops.torch2trt_adder.adder2d.default, torch.ops.torch2trt_adder.adder2d_fused.default
    if isinstance(model, torch.export.ExportedProgram):
        return sum(node.target in operators for node in model.graph.nodes)
    layers = sum(
        isinstance(layer, Adder2d | FusedAdder2d) or layer_fields(layer) is not None for layer in model.modules()
    )
    if layers:
        return layers
    calls = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls
            calls += func in operators
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Counter():  # type: ignore[no-untyped-call]
        model(*args)
    return calls


# ---- inputs


def random_inputs(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], device: torch.device | str, seed: int = 0
) -> list[Tensor]:
    """Normal draws, or 0 and 1 for integers and booleans."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(shape, generator=generator)
            if dtype.is_floating_point
            else torch.randint(2, shape, generator=generator)
        )
        .to(dtype)
        .to(device)
        for shape, dtype in zip(shapes, dtypes)
    ]


def example(
    source: str, model: nn.Module | torch.export.ExportedProgram, shapes: Sequence[Shape], half: bool
) -> list[Any]:
    """Positional arguments for the model: of the shapes that were given, or those that the program was exported with.

    Raises:
        ValueError: there are no shapes, or a program was not exported for them.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return _program_example(source, model, shapes)
    if not shapes:
        raise ValueError(
            "the model's input shapes are unknown: give one --shape for each input, as --shape 1x3x224x224."
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return random_inputs(shapes, [torch.float16 if half else torch.float32] * len(shapes), device)


def _program_example(source: str, program: torch.export.ExportedProgram, shapes: Sequence[Shape]) -> list[Any]:
    known = program.example_inputs
    if not shapes:
        if known is None:
            raise ValueError(
                f"{source} holds no example inputs: give one --shape for each input, as --shape 1x3x224x224."
            )
        return list(known[0])
    inputs = list(_program_inputs(program))
    if len(shapes) != len(inputs):
        raise ValueError(
            f"{source} has {len(inputs)} inputs, got {len(shapes)} of --shape; give one for each, or none."
        )
    for shape, (name, value) in zip(shapes, inputs):
        ranges = [_extents(program, extent) for extent in value.shape]
        if len(shape) != len(ranges) or not all(low <= n <= high for n, (low, high, _) in zip(shape, ranges)):
            wanted = ", ".join(text for *_, text in ranges)
            raise ValueError(
                f"{source} was exported for an input {name} of [{wanted}], got --shape {'x'.join(map(str, shape))}; leave "
                "--shape out, or export the program again with dynamic shapes."
            )
    tensors = random_inputs(shapes, [value.dtype for _, value in inputs], inputs[0][1].device if inputs else "cpu")
    if known is None:
        return list(tensors)
    leaves, structure = tree_flatten(known[0])
    new = iter(tensors)
    return list(tree_unflatten([next(new, leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure))


def _program_inputs(program: torch.export.ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    """Name and an empty example of each tensor that the program is called with."""
    names = program.graph_signature.user_inputs
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and isinstance(node.meta.get("val"), Tensor):
            yield node.name, node.meta["val"]


def _extents(program: torch.export.ExportedProgram, extent: int | torch.SymInt) -> tuple[float, float, str]:
    """The smallest and largest extent of an axis, and both in words."""
    if isinstance(extent, int):
        return extent, extent, str(extent)
    limits = program.range_constraints.get(extent.node.expr)
    if limits is None:  # made of other extents; the program checks it
        return 0, float("inf"), str(extent)
    low, high = float(limits.lower), float(limits.upper)
    return low, high, f"{low:.0f} to {high:.0f}" if high < 2**62 else f"{low:.0f} or more"
