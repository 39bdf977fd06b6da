"""Checks of convert()'s model and inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..nn.eval_mode import check_model

_DTYPES = (torch.float32, torch.float16)


def check_arguments(model: nn.Module, inputs: Any) -> Sequence[Any]:
    """The model's positional arguments, from a list, a tuple, or one of torch2trt's data sets; devices aside, checked.

    Raises:
        TypeError: `inputs` is something else or holds no tensor, or a dtype is neither float32 nor float16 (inputs may
            be bool).
        ValueError: see `check_model`.
    """
    if not isinstance(inputs, (list, tuple)):
        if type(inputs).__module__.partition(".")[0] == "torch2trt" and len(inputs) > 0:  # one of torch2trt's datasets
            return check_arguments(model, inputs[0])
        raise TypeError(
            f"convert: inputs must be a list or tuple of the model's arguments, or a tensor, got "
            f"{type(inputs).__name__}; write convert(model, [x])."
        )
    check_model("convert", model)
    named = [
        *((f"input {i}", t) for i, t in enumerate(tree_leaves(inputs)) if isinstance(t, Tensor)),
        *((f"parameter {name!r}", t) for name, t in model.named_parameters()),
    ]
    for name, tensor in named:
        if tensor.dtype not in _DTYPES and not (tensor.dtype is torch.bool and name.startswith("input")):
            raise TypeError(
                f"convert: {name} is {tensor.dtype}; an engine here supports torch.float32 and torch.float16, so convert "
                "model and inputs with .float() or .half()."
            )
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise TypeError("convert: inputs holds no tensor; write convert(model, [x]) with an example input x.")
    return inputs


def check_devices(model: nn.Module, example: Sequence[Any]) -> None:
    """Raises ValueError unless inputs, parameters and buffers are on one GPU."""
    named = [
        *((f"input {i}", t) for i, t in enumerate(tree_leaves(example)) if isinstance(t, Tensor)),
        *((f"parameter {name!r}", t) for name, t in model.named_parameters()),
        *((f"buffer {name!r}", t) for name, t in model.named_buffers()),
    ]
    device = named[0][1].device
    for name, tensor in named:
        if not tensor.is_cuda or tensor.device != device:
            raise ValueError(
                f"convert: {name} is on {tensor.device}, but model and inputs must be on one GPU; move both with "
                ".cuda()."
            )
