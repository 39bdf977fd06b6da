"""torch2trt's shape options, and the options that every route accepts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

SHAPE_OPTIONS = ("min_shapes", "opt_shapes", "max_shapes")
COMMON_OPTIONS = (
    *SHAPE_OPTIONS,
    "fp16_mode",
    "max_batch_size",
    "input_names",
    "output_names",
    "max_workspace_size",
    "fuse",
)


def shapes_of(tensors: Sequence[Tensor], options: dict[str, Any]) -> list[list[tuple[int, ...]]]:
    """The smallest, most frequent and largest shape of each tensor, by torch2trt's shape options.

    Args:
        tensors: the example inputs; where an option is not given, their shapes hold.
        options: min_shapes, opt_shapes and max_shapes (nested like the inputs), and max_batch_size.

    Raises:
        ValueError: an option does not hold one shape of the right number of axes for each input.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    least, usual, most = (
        shapes if options.get(key) is None else [tuple(shape) for shape in _shape_leaves(options[key])]
        for key in SHAPE_OPTIONS
    )
    if options.get("max_batch_size") is not None:
        least, most = (
            [(extent, *shape[1:]) for shape in each] for extent, each in ((1, least), (options["max_batch_size"], most))
        )
    for key, each in zip(SHAPE_OPTIONS, (least, usual, most)):
        if [len(shape) for shape in each] != [len(shape) for shape in shapes]:
            raise ValueError(f"convert: {key} must hold one shape for each input, got {each} for inputs {shapes}.")
    return [least, usual, most]


def _shape_leaves(value: Any) -> list[Any]:
    """The shapes in a nested structure of shapes, which are sequences of ints themselves."""
    if isinstance(value, (list, tuple)) and all(isinstance(extent, int) for extent in value):
        return [value]
    return [shape for child in (value.values() if isinstance(value, dict) else value) for shape in _shape_leaves(child)]
