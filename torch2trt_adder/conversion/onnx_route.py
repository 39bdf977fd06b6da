"""The route through ONNX."""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..numerics.comparison import tensor_leaves
from .shapes import COMMON_OPTIONS, shapes_of
from .torch2trt_route import Converted


def absent_packages() -> list[str]:
    """The packages of this route that are not installed here."""
    return [package for package in ("onnx", "onnxscript") if not importlib.util.find_spec(package)]


def missing() -> str | None:
    """What this route lacks on a machine with a GPU and TensorRT, as one sentence."""
    absent = absent_packages()
    return f"{absent[0]} is not installed: pip install {' '.join(absent)}." if absent else None


def options() -> list[str] | None:
    """The options of `convert` on this route."""
    return list(COMMON_OPTIONS)


def refuses(inputs: Any, options: dict[str, Any]) -> str | None:
    """Which of `convert`'s inputs and options this route does not accept, as one sentence."""
    unknown = sorted(set(options) - set(COMMON_OPTIONS))
    if unknown:
        return (
            f"route 'onnx' has no option {unknown[0]!r}, its options are {', '.join(COMMON_OPTIONS)}; "
            "route='torch2trt' supports all of torch2trt's."
        )
    if not isinstance(inputs, (list, tuple)):
        return "route 'onnx' accepts the model's arguments, not a data set; give min_shapes and max_shapes."
    return None


def through_onnx(model: nn.Module, inputs: Any, options: dict[str, Any]) -> Converted:
    """An `Engine` for `model`, by `export_onnx` and `build_engine`, and how to flatten its outputs.

    Args:
        model: on a GPU, in eval mode.
        inputs: a list or tuple of arguments.
        options: those of COMMON_OPTIONS that were given.

    Raises:
        TypeError: an option or data set that this route does not accept.
        RuntimeError: the network cannot be exported, or TensorRT cannot build the engine.
    """
    from ..export import exporter
    from ..trt import builder, engine, plans

    barred = refuses(inputs, options)
    if barred is not None:
        raise TypeError(f"convert: {barred}")
    args, tensors = tuple(inputs), tensor_leaves(inputs)
    names = list(options.get("input_names") or (f"input_{i}" for i in range(len(tensors))))
    axes, ranges = _dynamic_axes(tensors, names, options)
    # The file is not compared with PyTorch here (check=False): `convert` compares the engine itself.
    with tempfile.TemporaryDirectory(prefix="torch2trt_adder") as folder:
        path = exporter.export_onnx(
            model,
            args,
            os.path.join(folder, f"{type(model).__name__}.onnx"),
            axes,
            input_names=names,
            output_names=options.get("output_names"),
            check=False,
        )
        plan = builder.build_engine(
            path,
            path.with_suffix(".plan"),
            ranges,
            fp16=bool(options.get("fp16_mode")),
            fuse=bool(options.get("fuse", False)),
            workspace=options.get("max_workspace_size"),
        )
        runner = engine.Engine(plan)
    output = model(*args)
    flat = all(isinstance(leaf, Tensor) for leaf in args) and isinstance(output, Tensor)
    model_trt: Any = runner if flat else _Structured(runner, tree_flatten(output)[1])
    model_trt.fused = plans.fused_layers(runner.engine.name)
    return model_trt, tensor_leaves


def _dynamic_axes(
    tensors: Sequence[Tensor], names: Sequence[str], options: dict[str, Any]
) -> tuple[list[dict[int, str]] | None, dict[str, tuple[int, int, int]]]:
    """torch2trt's shape options in the form of `export_onnx` (names of axes) and `build_engine` (their ranges)."""
    least, usual, most = shapes_of(tensors, options)
    axes: list[dict[int, str]] = [{} for _ in tensors]
    ranges = {}
    extent_of: dict[str, int] = {}
    for i, (a, b, c) in enumerate(zip(least, usual, most)):
        for axis, extents in enumerate(zip(a, b, c)):
            if extents[0] != extents[2]:
                # Axes of one range and one extent share a name; the exporter finds out whether they are the same.
                name, extent = f"axis{axis}_{extents[0]}_{extents[2]}", tensors[i].shape[axis]
                axes[i][axis] = name if extent_of.setdefault(name, extent) == extent else f"{name}_{extent}"
                ranges[f"{names[i]}:{axis}"] = (extents[0], min(max(extents[1], extents[0]), extents[2]), extents[2])
    return (axes if ranges else None), ranges


class _Structured(nn.Module):
    """An engine with the nested inputs and outputs of the model that it was made of."""

    def __init__(self, engine: nn.Module, structure: Any) -> None:
        super().__init__()
        self.engine, self._structure = engine, structure

    def forward(self, *inputs: Any) -> Any:
        outputs = self.engine(*tensor_leaves(inputs))
        return tree_unflatten([outputs] if isinstance(outputs, Tensor) else list(outputs), self._structure)
