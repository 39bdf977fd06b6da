"""The public names of the package, which `__init__` hands on. To import this is to load torch and register the converters."""

import importlib.util
from collections.abc import Sequence

from torch import Tensor

from . import ops
from .checkpoints import load_checkpoint as load_checkpoint
from .converter import convert as convert
from .convolutions import adderize as adderize
from .engine import Engine as Engine, build_engine as build_engine
from .lookalikes import adopt as adopt, register_adder_class as register_adder_class
from .module import Adder2d as Adder2d, scale_gradients as scale_gradients, set_eta as set_eta
from .onnx_export import export_onnx as export_onnx


def adder2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eta: float | None = ops.ETA,
) -> Tensor:
    # Through the module: torch2trt hooks ops.adder2d by its qualified name.
    return ops.adder2d(input, weight, bias, stride, padding, dilation, groups, eta)


adder2d.__doc__ = ops.adder2d.__doc__

_torch_tensorrt_error: Exception | None = None
if importlib.util.find_spec("torch_tensorrt"):
    try:
        from . import torch_tensorrt_converter  # noqa: F401
    except Exception as error:  # a torch_tensorrt of another torch or TensorRT; all else works without it
        _torch_tensorrt_error = error


def torch_tensorrt_error() -> Exception | None:
    """Why the converter for Torch-TensorRT could not be registered where torch_tensorrt is installed."""
    return _torch_tensorrt_error
