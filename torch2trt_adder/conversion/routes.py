"""The routes from PyTorch to TensorRT: what each lacks on this machine, what it refuses, and how it converts."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import onnx_route, torch2trt_route
from .torch2trt_route import Converted


@dataclasses.dataclass(frozen=True)
class Route:
    """One route. Its sentences name the remedy."""

    missing: Callable[[], str | None]
    """What it lacks on a machine with a GPU and TensorRT, as one sentence."""
    options: Callable[[], list[str] | None]
    """The options of `convert` that it accepts; None where that cannot be known on this machine."""
    refuses: Callable[[Any, dict[str, Any]], str | None]
    """Which of `convert`'s inputs and options it does not accept, as one sentence."""
    convert: Callable[[nn.Module, Any, dict[str, Any]], Converted]
    """Builds the engine of a model from `convert`'s inputs and options."""


# In the order in which route "auto" tries them.
TABLE = {
    "torch2trt": Route(
        torch2trt_route.missing, torch2trt_route.options, torch2trt_route.refuses, torch2trt_route.through_torch2trt
    ),
    "onnx": Route(onnx_route.missing, onnx_route.options, onnx_route.refuses, onnx_route.through_onnx),
}
ROUTES = ("auto", *TABLE)


def missing(route: str = "auto") -> str | None:
    """What `convert` lacks on this machine and how to get it, as one sentence; None where everything is there.

    Args:
        route: one of ROUTES; "auto" needs only one of the others.
    """
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no NVIDIA GPU here, on which TensorRT builds its engines: use a "
            "machine with a GPU and a CUDA build of torch."
        )
    if not importlib.util.find_spec("tensorrt"):
        return "TensorRT is not installed: pip install tensorrt."
    if route != "auto":
        return TABLE[route].missing()
    reasons = [entry.missing() for entry in TABLE.values()]
    if None in reasons:
        return None
    return f"{reasons[0]} Or go through ONNX: pip install {' '.join(onnx_route.absent_packages())}."
