"""The route through ONNX."""

import os
import tempfile
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..numerics.comparison import tensor_leaves
from .shapes import SHAPE_OPTIONS, shapes_of
from .torch2trt_route import Converted

ONNX_OPTIONS = (*SHAPE_OPTIONS, "fp16_mode", "max_batch_size", "input_names", "output_names", "max_workspace_size", "fuse")


def not_for_onnx(inputs: Any, options: dict[str, Any]) -> str | None:
    """What the ONNX route cannot take of what was given to `convert`, as one sentence."""
    unknown = sorted(set(options) - set(ONNX_OPTIONS))
    if unknown:
        return (
            f"route 'onnx' has no option {unknown[0]!r}, its options are {', '.join(ONNX_OPTIONS)}; "
            "route='torch2trt' takes all of torch2trt's."
        )
    if not isinstance(inputs, (list, tuple)):
        return "route 'onnx' takes the model's arguments, not a data set; give min_shapes and max_shapes."
    return None


def through_onnx(model: nn.Module, inputs: Sequence[Any], options: dict[str, Any]) -> Converted:
    from ..export import exporter
    from ..trt import builder, engine

    barred = not_for_onnx(inputs, options)
    if barred is not None:
        raise TypeError(f"convert: {barred}")
    args, tensors = tuple(inputs), tensor_leaves(inputs)
    names = list(options.get("input_names") or (f"input_{i}" for i in range(len(tensors))))
    axes, ranges = _dynamic_axes(tensors, names, options)
    # What ONNX Runtime makes of the file does not matter here: the engine itself is compared.
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
            fuse=bool(options.get("fuse", True)),
            workspace=options.get("max_workspace_size"),
        )
        runner = engine.Engine(plan)
    output = model(*args)
    flat = all(isinstance(leaf, Tensor) for leaf in args) and isinstance(output, Tensor)
    return (runner if flat else _Structured(runner, tree_flatten(output)[1])), tensor_leaves


def _dynamic_axes(
    tensors: Sequence[Tensor], names: Sequence[str], options: dict[str, Any]
) -> tuple[list[dict[int, str]] | None, dict[str, tuple[int, int, int]]]:
    """torch2trt's shape options as `export_onnx` and `build_engine` take them: names of axes, and their ranges."""
    least, usual, most = shapes_of(tensors, options)
    axes: list[dict[int, str]] = [{} for _ in tensors]
    ranges = {}
    extent_of: dict[str, int] = {}
    for i, (a, b, c) in enumerate(zip(least, usual, most)):
        for axis, extents in enumerate(zip(a, b, c)):
            if extents[0] != extents[2]:
                # Axes of one range and one extent are taken for one and the same, which the exporter then finds out.
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
